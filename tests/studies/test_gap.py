"""The study of the gap on a tiny run: what it measures is what it says, and its claims follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tangentlab import modes
from tangentlab.probes import output_change
from tangentlab.records import read_run
from tangentlab.runs import RunConfig, train
from tangentlab.runs.again import train_again
from tangentlab.runs.build import build_data, build_model, build_state
from tangentlab.runs.evaluation import checkpoint_path
from tangentlab.studies import gap
from tangentlab.training import load_checkpoint, load_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _small() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ROWS": 10,
            "SCALED_ROWS": 2,
            "POINTS": 12,
            "STEPS": (1, 2),
            "BATCH_SIZES": (20, 40),
        }.items():
            patch.setattr(gap, name, value)
        yield


@pytest.fixture
def tiny(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., tuple[RunConfig, Path]]:
    def make(*overrides: str) -> tuple[RunConfig, Path]:
        words = ["--training.keep_every=1", "--probe.size=0", "--training.schedule=piecewise"]
        config = tiny_config(*words, *overrides)
        train(config, tmp_path / "run")
        return config, tmp_path / "run"

    return make


def test_a_run_is_measured(tiny: Callable[..., tuple[RunConfig, Path]]) -> None:
    config, folder = tiny("--training.epochs=2")
    lines = list(gap.measure(folder, config))
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert {line["arm"] for line in lines} == {"pgd"}
    assert not any("velocity" in line for line in lines)
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        at = "gap/clean/mixed"
        both = line[f"{at}/values"] + line[f"{at}/derivative"]
        assert line[f"{at}/relative_error"] <= both + 1e-6
        one = "change/1/batch/clean"
        # After one step there is nothing that a frozen Jacobian would miss.
        for name in ("relative_error", "cosine"):
            assert line[f"{one}/frozen/{name}"] == pytest.approx(line[f"{one}/tangent/{name}"], abs=1e-3)
        assert line[f"{one}/running/cosine"] < line[f"{one}/frozen/cosine"]
        evaluated = "change/1/evaluation/clean"
        assert line[f"{evaluated}/settled/relative_error"] < line[f"{evaluated}/no_drift/relative_error"]
        assert line["change/2/evaluation/pgd/jump"] > 0
    assert "scale/20/values" in lines[-1]
    assert "scale/20/values" not in lines[0]


def test_the_velocity_is_the_probes(tiny: Callable[..., tuple[RunConfig, Path]]) -> None:
    _, folder = tiny("--training.epochs=2", "--probe.size=10", "--probe.every=1")
    epochs, (first, second) = read_run(folder).series("kernel/clean/class/angle_velocity")
    assert epochs == [1, 2]
    assert first != second
    at = gap._velocities(folder)
    assert [at(epoch)["velocity"] for epoch in (0, 1, 2)] == [first, first, second]
    assert at(3) == {}


def test_trades_has_two_terms(tiny: Callable[..., tuple[RunConfig, Path]]) -> None:
    config, folder = tiny("--method=trades", "--method.num_steps=2", "--training.epochs=1")
    (line, *_) = gap.measure(folder, config)
    # At the start the divergence hardly pulls against the clean term's direction: neither is all of it.
    assert 0.01 < line["change/1/batch/clean/crafted_term"] < 100
    assert abs(line["change/1/batch/clean/terms_cosine"]) < 0.999
    # Both terms, each on its batch, make the step: in direction and in size.
    for name in ("cosine", "relative_error"):
        assert line[f"change/1/batch/clean/frozen/{name}"] == pytest.approx(
            line[f"change/1/batch/clean/tangent/{name}"], abs=1e-3
        )


def test_training_goes_on_as_the_run_did(tiny: Callable[..., tuple[RunConfig, Path]]) -> None:
    """Without momentum from the kept weights at epoch 1 to the run's own at its end, bit for bit."""
    config, folder = tiny("--training.momentum=0", "--training.weight_decay=0")
    examples = build_data(config)
    model, ended = (build_model(config, examples, CPU) for _ in range(2))
    load_checkpoint(checkpoint_path(folder, "last"), build_state(config, ended))
    load_weights(checkpoint_path(folder, "step-3"), model)
    before = build_model(config, examples, CPU)
    before.load_state_dict(model.state_dict())
    done = train_again(config, examples, model, step=3, steps=6)
    assert all(torch.equal(value, ended.state_dict()[name]) for name, value in model.state_dict().items())
    assert [len(made.terms) for made in done] == [1] * 6
    assert [made.learning_rate for made in done] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    # ∂L/∂f of a mean cross-entropy: rows that sum to zero, at most 1/40 each.
    cotangent = done[0].terms[0].cotangent
    assert cotangent.shape == (40, 10)
    assert float(cotangent.sum(1).abs().max()) < 1e-7
    assert 0 < float(cotangent.abs().max()) <= 1 / 40
    assert not model._forward_hooks
    with modes.evaluation(before):
        assert float(output_change(before, model, done[0].terms[0].x).actual.norm()) > 0


def planted(**changed: float) -> list[dict[str, Any]]:
    """Values of three checkpoints of every arm for three seeds, under which every claim holds."""
    line: dict[str, Any] = {
        "gap/pgd/batch/relative_error": 0.5,
        "gap/clean/batch/relative_error": 0.3,
        "gap/pgd/mixed/derivative": 0.4,
        "gap/pgd/mixed/values": 0.1,
        "scale/64/derivative": 0.4,
        "scale/512/derivative": 0.3,
        "change/1/evaluation/clean/running/relative_error": 0.5,
        "change/1/evaluation/clean/settled/relative_error": 0.1,
        "change/1/evaluation/clean/no_drift/relative_error": 0.4,
        "change/1/evaluation/pgd/jump": 0.6,
    } | changed
    cosines = {0: 0.2, 3: 0.4, 9: 0.9}
    return [
        line | {"arm": arm, "seed": seed, "step": step, "change/20/batch/pgd/frozen/cosine": cosine}
        for arm in gap.ARMS
        for seed in range(3)
        for step, cosine in cosines.items()
    ]


@pytest.fixture
def full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap, "STEPS", (1, 20))
    monkeypatch.setattr(gap, "BATCH_SIZES", (64, 512))


EXPECTED: Mapping[str, float] = {
    "error": 0.5,
    "adversarial": 0.2,
    "derivative": 4.0,
    "batch-size": 0.75,
    "mixed": 0.4,
    "drift": 2.0,
    "jump": 0.6,
    "lazy": 0.5,
}


@pytest.mark.usefixtures("full_size")
def test_the_claims_follow_from_the_values() -> None:
    verdicts = {verdict.claim.id.removeprefix("gap/"): verdict for verdict in gap.judged(planted(), "here")}
    assert {name: verdict.effect for name, verdict in verdicts.items()} == pytest.approx(EXPECTED)
    assert {verdict.verdict for verdict in verdicts.values()} == {"supported"}
    worse = planted(
        **{
            "gap/pgd/batch/relative_error": 0.05,
            "gap/pgd/mixed/values": 0.6,
            "scale/512/derivative": 0.1,
            "change/1/evaluation/clean/running/relative_error": 0.1,
            "change/1/evaluation/clean/no_drift/relative_error": 0.1,
            "change/1/evaluation/pgd/jump": 0.1,
        }
    )
    refuted = [v.claim.id for v in gap.judged(worse, "here") if v.verdict == "refuted"]
    assert refuted == [f"gap/{name}" for name in EXPECTED if name != "lazy"]


@pytest.mark.usefixtures("full_size")
def test_a_claim_waits_for_the_runs_that_it_needs() -> None:
    some = [line for line in planted() if line["arm"] != "trades" or line["seed"] == 0]
    seeds = {v.claim.id: list(v.values) for v in gap.judged(some, "here")}
    assert seeds.pop("gap/derivative") == [0]
    assert set(map(tuple, seeds.values())) == {(0, 1, 2)}


@pytest.mark.usefixtures("full_size")
def test_lazy_is_judged_where_the_rate_does_not_fall() -> None:
    lines = planted()
    for line in lines:
        if line["arm"] == "pgd-constant":
            line["change/20/batch/pgd/frozen/cosine"] = 0.4
    (lazy,) = (v for v in gap.judged(lines, "here") if v.claim.id == "gap/lazy")
    assert (lazy.effect, lazy.verdict) == (0, "refuted")


@pytest.mark.usefixtures("full_size")
def test_a_network_that_died_is_left_out() -> None:
    lines = planted()
    for line in lines:
        if (line["arm"], line["seed"]) == ("n_fgsm", 1) and line["step"]:
            line |= {name: 0.0 for name in line if name.startswith("gap/")}
    found = {verdict.claim.id.partition("/")[2]: verdict for verdict in gap.STUDY.judge(lines, "here")}
    assert set(found["derivative"].values) == {0, 2}
    assert set(found["error"].values) == {0, 1, 2}


def test_the_runs_are_those_of_the_tiers() -> None:
    for tier in (0, 1, 2):
        configs = gap.runs(tier, [0])
        assert set(configs) == {f"{arm}-0" for arm in gap.ARMS}
        assert {config.name for config in configs.values()} == set(gap.ARMS)
        assert configs["pgd-constant-0"].training.schedule == "constant"
        assert {config.threads for config in configs.values()} == {1}
        for config in configs.values():
            assert config.training.keep_every == 1
            assert gap._looked_at(config)[-1] == config.training.epochs
