"""A run with an alarm: what is logged, kept and told, what it costs, and training that turns to two steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tangentlab.errors import ConfigError
from tangentlab.files import read_tensors
from tangentlab.probes import overfitting_alarm
from tangentlab.runs import RunConfig, evaluate, load_config, resolve, train
from tangentlab.runs.alarming import Alarming
from tangentlab.runs.parsing import dump
from tangentlab.training import TrainingState, all_weights
from tiny import TINY

Make = Callable[..., RunConfig]
LOOKS = ("--alarm.every=1", "--alarm.size=60", "--alarm.threshold=0.6")


class Said:
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, name: str, *, epochs: int, steps_per_epoch: int) -> None: ...

    def show(self, state: Any, values: Mapping[str, Any]) -> None: ...

    def say(self, text: str) -> None:
        self.lines.append(text)

    def note(self, text: str) -> None: ...


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """The shares that the alarm sees, look by look."""

    def plant(shares: Sequence[float]) -> None:
        left = iter(shares)
        monkeypatch.setattr(overfitting_alarm, "right_confidences", lambda *_: (1.0, next(left)))

    return plant


def single_step(*words: str) -> RunConfig:
    tiny = [word for word in TINY if not word.startswith("--method")]
    return load_config("digits", [*tiny, *words])


SHARES = [0.9, 0.9, 0.9, 0.5, 0.2, 0.9, 0.9, 0.2, 0.1]  # means of three: low at the looks 4, 5 and 8


def test_the_weights_before_the_alarm_are_kept_judged_and_told_of(
    planted: Callable[[Sequence[float]], None], tmp_path: Path
) -> None:
    planted(SHARES)
    said = Said()
    config = single_step("--method=fgsm", "--training.keep_every=0.334", *LOOKS)
    record = train(config, tmp_path / "run", display=said)
    looks = [line for line in record.metrics if "alarm/raised" in line]
    assert [line["step"] for line in looks] == list(range(9))
    assert [line["alarm/share"] for line in looks] == SHARES
    assert [line["alarm/raised"] for line in looks] == [False] * 4 + [True, True, False, False, True]
    assert looks[4]["alarm/pooled"] == pytest.approx(1.6 / 3)
    assert looks[4]["alarm/threshold"] == 0.6
    path = tmp_path / "run" / "checkpoints" / "before-alarm.safetensors"
    kept, metadata = read_tensors(path)
    # Those of the first: after it they may be of a network that is lost already.
    assert said.lines == [
        "alarm at epoch 1.33: catastrophic overfitting may begin, confidence share 0.53 below 0.6; "
        f"the weights of epoch 1 are kept in {path}",
        "alarm at epoch 2.67: catastrophic overfitting may begin, confidence share 0.40 below 0.6",
    ]
    assert metadata["step"] == 3
    then = read_tensors(path.with_name("step-3.safetensors"))[0]
    assert all(torch.equal(tensor, then[name]) for name, tensor in kept.items())
    judged = {line["checkpoint"] for line in record.evaluations}
    assert judged == {"best", "last", "before-alarm"}
    again = evaluate(tmp_path / "run", attacks=("none",), checkpoints=("before-alarm",), test_size=20)
    assert [line["epoch"] for line in again] == pytest.approx([1])


def test_an_alarm_that_only_watches_changes_nothing(tmp_path: Path) -> None:
    plain = ("--method=fgsm_rs", "--probe.size=0")
    watched = train(single_step(*plain, *LOOKS), tmp_path / "watched")
    alone = train(single_step(*plain), tmp_path / "alone")
    ours, others = (
        read_tensors(run.folder / "checkpoints" / "best.safetensors")[0] for run in (watched, alone)
    )
    assert all(torch.equal(tensor, others[name]) for name, tensor in ours.items())
    assert watched.series("cost") == alone.series("cost")
    assert watched.status["probe_seconds"] > 0 == alone.status["probe_seconds"]
    assert not (tmp_path / "alone" / "checkpoints" / "before-alarm.safetensors").exists()


def test_while_it_is_raised_the_other_method_trains_and_all_is_counted(
    planted: Callable[[Sequence[float]], None], tmp_path: Path
) -> None:
    planted(SHARES)
    record = train(single_step("--method=spectral", *LOOKS), tmp_path / "run")
    costs = {line["epoch"]: line for line in record.metrics if "cost" in line}
    # A batch is a third of an epoch: one step's crafting, two where it is raised.
    crafted = [1 + int(line["alarm/raised"]) for line in record.metrics if "alarm/raised" in line]
    for epoch in (1, 2, 3):
        assert costs[epoch]["input_backwards"] == pytest.approx(sum(crafted[: 3 * epoch]) / 3)
    assert costs[3]["steering_cost"] == pytest.approx(9 * (6 * 20 + 1) / 120)
    spent = costs[3]["forwards"] + costs[3]["input_backwards"] + 2 * costs[3]["full_backwards"]
    assert costs[3]["cost"] == pytest.approx(spent + costs[3]["steering_cost"])
    assert record.status["steering_seconds"] > 0


def test_looks_are_at_the_eps_of_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crafted, seen = overfitting_alarm.one_and_two_steps, []

    def watched(*args: Any, eps: float) -> Any:
        seen.append(eps)
        return crafted(*args, eps=eps)

    monkeypatch.setattr(overfitting_alarm, "one_and_two_steps", watched)
    config = single_step("--method=fgsm", *LOOKS, "--training.eps_schedule=linear", "--eps=0.2")
    train(config, tmp_path / "run")
    # Nine steps; a thousandth at the first.
    assert seen == pytest.approx([0.0002, *(0.2 * min(1, 2 * step / 9) for step in range(1, 9))])
    seen.clear()
    train(single_step("--method=fgsm", *LOOKS, "--eps=0.2", "--method.eps=0.3"), tmp_path / "own")
    assert seen == pytest.approx([0.3] * 9)


@pytest.mark.parametrize("average", [(), ("--training.ema_decay=0.9",)])
def test_training_goes_back_to_the_weights_before_each_alarm(
    planted: Callable[[Sequence[float]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    average: Sequence[str],
) -> None:
    planted(SHARES)
    restore = Alarming._restore
    before: dict[int, dict[str, torch.Tensor]] = {}
    after: dict[int, dict[str, torch.Tensor]] = {}

    def weights(state: TrainingState) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in all_weights(state).items()}

    def watched(self: Alarming, state: TrainingState, good: dict[str, torch.Tensor] | None) -> None:
        before[state.step] = weights(state)
        restore(self, state, good)
        if good is not None:
            after[state.step] = weights(state)
            assert not state.optimizer.state

    monkeypatch.setattr(Alarming, "_restore", watched)
    words = ("--method=fgsm", *LOOKS, "--alarm.restore=true", *average)
    record = train(single_step(*words), tmp_path / "run")
    restored = [line["step"] for line in record.metrics if line.get("alarm/restored")]
    assert restored == list(after) == [4, 8]
    for step, found in after.items():
        assert {name.partition("/")[0] for name in found} == {"model", *(["averaged"] if average else [])}
        trained = [name for name in found if name.endswith("weight")]
        assert not any(torch.equal(before[step][name], before[step - 1][name]) for name in trained)
        for name, tensor in found.items():
            assert torch.equal(tensor, before[step - 1][name]), name


def test_spectral_is_one_step_and_two_while_the_alarm_is_raised(tmp_path: Path) -> None:
    config = load_config("digits", ["--method=spectral", "--eps=0.2"])
    assert config.method["name"] == "fgsm_rs"
    assert (config.switch.rule, config.alarm.every, config.alarm.threshold) == ("alarm", 25, 0.95)
    assert load_config("digits", []).alarm.threshold < 0.95
    to = dict(config.switch.to)
    assert (to["name"], to["num_steps"], to["eps"], to["step_size"]) == ("pgd", 2, 0.2, 0.125)
    assert resolve(config.to_dict()) == config
    (tmp_path / "config.yaml").write_text(dump(config))
    again = load_config(tmp_path, ["--eps=0.4"])
    assert (again.switch.to["eps"], again.switch.to["step_size"]) == (0.4, 0.25)
    off = load_config(tmp_path, ["--switch.rule=none"])
    assert (off.switch.rule, off.switch.to) == ("none", {})
    (tmp_path / "config.yaml").write_text(dump(load_config("digits", [])))
    on = load_config(tmp_path, ["--method=spectral"])
    assert (on.method["name"], on.switch.rule, on.alarm.every) == ("fgsm_rs", "alarm", 25)
    own = load_config("digits", ["--method=n_fgsm", "--switch.rule=alarm", "--alarm.every=50"])
    assert (own.method["name"], own.alarm.every, own.switch.to["name"]) == ("n_fgsm", 50, "pgd")


def test_what_steers_by_the_alarm_is_taken_and_left_from_a_run_folder_too(tmp_path: Path) -> None:
    folders = {}
    for name, method in (("plain", "fgsm_rs"), ("steered", "spectral")):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        config = load_config("digits", [f"--method={method}"])
        (folders[name] / "config.yaml").write_text(dump(config))
    steered = load_config(folders["plain"], ["--method=spectral"])
    assert steered == load_config(folders["steered"])
    assert (steered.alarm.every, steered.alarm.threshold) == (25, 0.95)
    plain = load_config(folders["steered"], ["--switch.rule=none"])
    assert plain == load_config(folders["plain"])
    assert (plain.alarm.every, plain.alarm.threshold) == (None, 0.85)
    own = load_config(folders["plain"], ["--method=spectral", "--alarm.threshold=0.5"])
    assert (own.alarm.every, own.alarm.threshold) == (25, 0.5)


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ((), 0.625),
        (("--switch.to.num_steps=10",), 0.25),
        (("--switch.to=trades",), 0.25),
        (("--switch.to=pgd", "--switch.to.num_steps=2"), 0.625),
    ],
)
def test_two_steps_are_long_and_more_are_not(words: Sequence[str], share: float) -> None:
    to = load_config("digits", ["--method=spectral", "--eps=0.2", *words]).switch.to
    assert to["step_size"] == pytest.approx(share * 0.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alarm.every=0"], "alarm.every=0 is out of range; at least 1"),
        (["--alarm.every=0.5"], "alarm.every"),
        (["--alarm.size=2"], "alarm.size=2 is out of range"),
        (["--alarm.threshold=1"], r"alarm.threshold=1.0 is out of range \(0, 1\)"),
        (["--alarm.every=1", "--alarm.size=5000"], "size=5000 is out of range"),
        (["--alarm=5"], "alarm"),
        (["--method=spectral", "--switch.rule=kernel"], "'spectral' is fgsm_rs with switch.rule 'alarm'"),
        (["--method=free", "--switch.rule=alarm"], "takes each batch 1 times in a row and method 'free' 8"),
        (["--method=spectrall"], "did you mean 'spectral'"),
    ],
)
def test_an_alarm_that_cannot_be_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_config("digits", words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_rule_needs_looks() -> None:
    values = load_config("digits", ["--method=spectral"]).to_dict()
    config = resolve({**values, "alarm": {**values["alarm"], "every": None}})
    assert config.alarm.every == 25
    with pytest.raises(ConfigError, match=r"alarm.every is null"):
        RunConfig(switch=config.switch)
