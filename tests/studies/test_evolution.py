"""The study of the kernel's evolution: its runs, what is read off one, and verdicts on planted values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tangentlab as tl
from tangentlab.models import PreActResNet18, SmallCNN
from tangentlab.records import read_run
from tangentlab.runs import RunConfig, train
from tangentlab.studies import evolution
from tangentlab.studies import evolution_claims as judging
from tangentlab.studies.claims import Verdict

Make = Callable[..., RunConfig]
Line = dict[str, Any]


def test_runs_that_are_compared_have_as_many_steps_and_snapshots() -> None:
    runs = evolution.configurations(1, [7])
    kinds = {
        place: {k[len(place) + 1 :] for k in runs if k.startswith(place)}
        for place in ("images", "few", "table")
    }
    assert len(kinds["images"]) == 13
    assert kinds["images"] == kinds["table"]
    assert kinds["few"] == {"pgd-piecewise-7", "pgd-constant-7"}
    assert runs["table-trades-cosine-7"].model["name"] == "mlp"
    for tier in evolution.WORDS:
        runs = evolution.configurations(tier, [0])
        many, few = (runs[f"{place}-pgd-piecewise-0"] for place in ("images", "few"))
        of_many, of_few = (_in_steps(config) for config in (many, few))
        assert of_few == pytest.approx(of_many, rel=0.02)
        assert replace(few, data=many.data, training=many.training) == replace(
            many, name=few.name, evaluation=few.evaluation, probe=few.probe
        )
        for config in runs.values():
            assert config.threads == 1  # or the number of jobs would change the numbers
            assert config.probe.early
            # Stages take eight snapshots.
            assert config.training.epochs / config.probe.every >= 12


def _in_steps(config: RunConfig) -> list[float]:
    epoch = (config.data.train_size or 0) // config.training.batch_size
    times = (config.training.epochs, config.training.keep_every, config.evaluation.every, config.probe.every)
    return [epoch * (time or 0) for time in times]


def test_layers_share_out_the_parameters() -> None:
    torch.manual_seed(0)
    model = SmallCNN((1, 6, 6), 3, widths=(2, 3), strides=(1, 2), hidden=4).double()
    groups = evolution.layers(model)
    assert list(groups) == ["features.0", "normalization", "features.3", "head.0", "head.2"]
    x = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    whole = tl.ntk(model, x, kind="class")
    total = torch.zeros_like(whole)
    for parameters in groups.values():
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        total += tl.ntk(model, x, kind="class")
    assert torch.allclose(total, whole, rtol=1e-10)
    convolutions = [
        name
        for name, own in evolution.layers(PreActResNet18((3, 8, 8), 2, width=2)).items()
        if own[0].dim() == 4
    ]
    assert (convolutions[0], convolutions[-1]) == ("stem", "blocks.7.conv2")


@pytest.fixture
def folder(tiny_config: Make, tmp_path: Path) -> tuple[Path, RunConfig]:
    """A PGD run, and a standard one beside it."""
    config = tiny_config(
        "--training.schedule=piecewise",
        "--probe.every=1",
        "--training.keep_every=1.5",
        "--probe.early=true",
        "--name=images-pgd-piecewise",
    )
    standard = replace(config, method={"name": "standard"})
    train(standard, tmp_path / "images-standard-piecewise-0")
    train(config, tmp_path / "images-pgd-piecewise-0")
    return tmp_path / "images-pgd-piecewise-0", config


def test_what_is_read_off_a_run(folder: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution, "CARRIED_STEPS", 2)
    monkeypatch.setattr(evolution, "CARRIED_BATCH", 8)
    path, config = folder
    lines = list(evolution.measure(path, config))
    record = read_run(path)
    assert json.loads(json.dumps(lines)) == lines
    by_kind = {kind: [line for line in lines if line["what"] == kind] for kind in {x["what"] for x in lines}}
    assert set(by_kind) == {"snapshot", "stages", "run", "layer", "carried"}
    assert len(by_kind["snapshot"]) == 3 * len(record.kernel_steps())
    last = [line for line in by_kind["snapshot"] if line["inputs"] == "pgd"][-1]
    assert last["entropy_rank"] == pytest.approx(
        record.series("kernel/pgd/class/entropy_rank")[1][-1], rel=1e-4
    )
    (run,) = by_kind["run"]
    kernels = [record.kernels(step)["clean/class"] for step in (0, record.kernel_steps()[-1])]
    other = read_run(path.parent / "images-standard-piecewise-0")
    reached = other.kernels(other.kernel_steps()[-1])["clean/class"]
    assert run["to_standard"] == pytest.approx(
        float(tl.metrics.kernel_distance(kernels[1], reached).mean()), rel=1e-4
    )
    assert "to_trades" not in run
    assert 0 < run["turned"] <= 1
    assert 0 <= run["settled"] < 1
    # The head's gradient is the same for every class.
    ended = [line for line in by_kind["layer"] if line["step"] == by_kind["layer"][-1]["step"]]
    assert [line["layer"] for line in ended] == ["features.0", "normalization", "features.3", "head.0"]
    assert ended[-1]["specialization_clean"] == pytest.approx(1)
    assert by_kind["carried"][0]["n"] == 60


def planted(seed: int = 0, data: str = "images", **changed: float) -> Iterable[Line]:
    """One seed's lines with known effects: what the claims say, unless changed."""
    numbers = {"settled": 0.1, "to_trades": 0.01, "robust": 0.5, "moved": 0.6, "third": 0.9} | changed
    few = {"data": "few", "seed": seed, "method": "pgd", "schedule": "piecewise", "what": "run"}
    yield few | {"robust_overfitting": 0.1, "moved": 1.26}
    for method in judging.METHODS:
        for schedule in (*judging.DECAYING, "constant"):
            place = {"seed": seed, "data": data, "method": method, "schedule": schedule}
            adversarial = method != "standard"
            overfits = judging.METHODS.index(method)
            yield place | {
                "what": "run",
                "settled": numbers["settled"] if adversarial else 0.3,
                "turned": 0.1,
                "grown": 0.3,
                "moved": numbers["moved"] if schedule == "piecewise" else 0.2,
                "robust_overfitting": 0.02,
                "top_mass": 0.9 if adversarial else 0.8,
                "specialization": 2.0,
                "to_standard": 0.1,
                "to_trades": numbers["to_trades"],
            }
            stages = {"what": "stages", "inputs": "clean", "speed": "angle_per_learning_rate"}
            stages |= {"first_ratio": 3.0}
            found = (
                {"learning_end": 2.0, "third_start": 8.0, "third_after_drop": -0.01} if adversarial else {}
            )
            yield place | stages | found | {"third_probability": numbers["third"] if adversarial else 0.1}
            for step in range(5):
                counts = {name: float(step**2 + overfits) for name in judging.COUNTS}
                yield place | {"what": "snapshot", "inputs": "clean", "step": step} | counts
                yield place | {"what": "snapshot", "inputs": "clean~pgd", "step": step, "in_top": 0.8}
            for layer, distance in (("first", 0.4), ("last", 0.1)):
                for step in (0, 4):
                    layered = {"what": "layer", "layer": layer, "convolution": True, "step": step}
                    yield place | layered | {"distance": distance if step else 0.1}
            yield place | {"what": "carried", "robust": numbers["robust"] if adversarial else 0.1}


def judged(lines: Iterable[Line]) -> dict[tuple[str, str], Verdict]:
    found = judging.verdicts(list(lines), "images")
    return {(v.claim.id.removeprefix("evolution/"), v.setting): v for v in found}


def test_planted_effects_are_found_and_can_be_refuted() -> None:
    true = judged(line for seed in range(3) for line in planted(seed))
    assert {name for name, _ in true} == {claim.id.removeprefix("evolution/") for claim in judging.CLAIMS}
    assert {verdict.verdict for verdict in true.values()} == {"supported"}
    assert true["settles-earlier", "images"].effect == pytest.approx(3)
    assert true["elsewhere", "images"].effect == pytest.approx(10)
    assert true["first-layer", "images"].effect == pytest.approx(4)
    assert true["drop-triggers", "images"].effect == pytest.approx(3)
    assert true["overfitting-triggers", "images"].effect == pytest.approx(2.1)
    assert true["third-at-drop", "images"].effect == pytest.approx(0.01)
    assert true["few-overfit", "images"].effect == pytest.approx(0.08)
    assert true["counts-repeat", "images"].effect == pytest.approx(1)
    false = {"settled": 0.29, "to_trades": 0.09, "robust": 0.15, "moved": 0.2, "third": 0.2}
    for key, claim in zip(
        false,
        ("settles-earlier", "elsewhere", "carries-robustness", "drop-triggers", "third-is-adversarial"),
        strict=True,
    ):
        found = judged(line for seed in range(3) for line in planted(seed, **{key: false[key]}))
        assert {name for (name, _), v in found.items() if v.verdict == "refuted"} == {claim}


def test_metrics_that_repeat_another_are_found() -> None:
    def snapshots(run: str, shift: float) -> Iterable[Line]:
        for step in range(6):
            line = {"run": run, "seed": 0, "data": "images", "what": "snapshot", "inputs": "clean"}
            metrics = {"entropy_rank": step + shift, "top_mass": -((step + shift) ** 3)}
            metrics |= {"specialization": 1.0, "target_alignment": (-1) ** step * 9 + shift}
            yield line | {"step": step} | metrics

    lines = [line for shift in range(4) for line in snapshots(f"run-{shift}", shift)]
    found = {line["pair"]: line for line in judging.repetitions([*lines, lines[0] | {"data": "table"}])}
    # A constant is in no order.
    assert set(found) == {
        "entropy rank, top mass",
        "entropy rank, target alignment",
        "top mass, target alignment",
    }
    assert next(iter(found)) == "entropy rank, top mass"
    assert found["entropy rank, top mass"]["along"] == pytest.approx(1)
    # They go together from run to run, and along a run they do not.
    other = found["entropy rank, target alignment"]
    assert other["ended"] == pytest.approx(1)
    assert other["along"] < 0.5


def test_the_table_is_judged_by_itself_and_missing_runs_are_no_evidence() -> None:
    lines = [line for seed in range(3) for line in planted(seed)]
    table = [line for seed in range(3) for line in planted(seed, "table", settled=0.29)]
    found = judged([*lines, *table])
    assert found["settles-earlier", "images"].verdict == "supported"
    assert found["settles-earlier", judging.TABLE_SETTING].verdict == "refuted"
    assert ("first-layer", judging.TABLE_SETTING) not in found
    # Without TRADES, and the constant rate of one seed alone.
    some = [x for x in lines if x["method"] != "trades" and (x["schedule"] != "constant" or x["seed"] == 1)]
    found = judged([{key: value for key, value in line.items() if key != "to_trades"} for line in some])
    assert found["elsewhere", "images"].values == {}
    assert list(found["drop-triggers", "images"].values) == [1]
    assert found["top-mass", "images"].verdict == "supported"
