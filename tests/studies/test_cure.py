"""The study of cures: its arms, what is read off a run, verdicts that planted values give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tangentlab.metrics import wilson_interval
from tangentlab.probes import overfitting_alarm
from tangentlab.report.values import value_figure
from tangentlab.runs import train
from tangentlab.runs.parsing import build_method
from tangentlab.studies import cure_arms
from tangentlab.studies.claims import Verdict
from tangentlab.studies.cure import STUDY
from tangentlab.studies.cure_arms import FINALISTS, TIERS, Tier
from tiny import TINY

Line = dict[str, Any]


@pytest.mark.parametrize("tier", TIERS)
def test_arms_meet_at_both_radii(tier: int) -> None:
    runs = STUDY.runs(tier, [3])
    names = {config.name.rpartition("-")[0] for config in runs.values()}
    assert set(FINALISTS) <= names
    tuned = {config.name.rpartition("-")[0] for config in STUDY.runs(tier, [1]).values()}
    steered = {arm for arm in tuned if cure_arms.kind(arm) == cure_arms.STEERED}
    steered -= {cure_arms.SPECTRAL, cure_arms.FROM_FGSM}
    assert names == tuned - steered  # variants are for the seeds that choose
    assert bool(steered) == TIERS[tier].whole
    assert len(runs) == 2 * len(names)
    low, high = sorted({config.eps for config in runs.values()})
    assert (low, high) == TIERS[tier].eps
    for key, config in runs.items():
        arm = config.name.rpartition("-")[0]
        assert key == f"{config.name}-3"
        assert config.method["eps"] == config.eps
        assert list(config.method["buffer_updates"]) == ["loss"]
        assert (config.switch.rule == "alarm") == arm.startswith("spectral")
        assert (config.switch.rule == "fixed") == (arm in (cure_arms.FIXED, cure_arms.GUARDED))
        if config.switch.to:
            assert config.switch.to["eps"] == config.eps
            assert list(config.switch.to["buffer_updates"]) == ["loss"]


def test_two_steps_throughout_cost_what_the_question_says() -> None:
    runs = STUDY.runs(0, [3])
    found = {arm: runs[f"{arm}-0.28-3"] for arm in ("fgsm", "pgd-2", "n_fgsm-long")}
    cost = {arm: build_method(run).passes.cost * run.training.epochs for arm, run in found.items()}
    assert cost["pgd-2"] == pytest.approx(1.4 * cost["fgsm"])
    assert cost["n_fgsm-long"] == pytest.approx(1.4 * cost["fgsm"], rel=0.02)


def test_a_run_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = " ".join(word for word in TINY if not word.startswith(("--method", "--probe")))
    monkeypatch.setitem(TIERS, 0, Tier("digits", words, (0.2, 0.3), 20, 5))
    runs = STUDY.runs(0, [3])
    found = {}
    monkeypatch.setattr(overfitting_alarm, "right_confidences", lambda *_: (1.0, 0.1))  # is raised
    for arm in ("spectral", "zero_grad", "fgsm"):
        config = runs[f"{arm}-0.2-3"]
        if config.alarm.every:
            config = replace(config, alarm=replace(config.alarm, every=1))
        train(config, tmp_path / arm)
        (found[arm],) = STUDY.measure(tmp_path / arm, config)
    for arm, line in found.items():
        assert line["arm"] == arm
        assert line["apgd_n"] == 20
        assert 0 <= line["apgd_accuracy"] <= line["clean_accuracy"] <= 1
        assert line["collapse"] is None
        assert len(line["epochs"]) == len(line["robust_accuracy"]) == len(line["fgsm_accuracy"])
    assert found["spectral"]["autoattack_n"] == 5
    assert 0 < found["spectral"]["raised"] < 1
    assert 0 <= found["fgsm"]["kept_accuracy"] <= 1
    assert found["fgsm"]["kept_epoch"] == pytest.approx(1 / 3)
    assert found["spectral"]["steering_seconds"] > 0
    assert found["spectral"]["cost"] > found["spectral"]["steering_cost"] > 0
    assert "autoattack_n" not in found["zero_grad"]
    assert not {"raised", "kept_accuracy"} & set(found["zero_grad"])


# arm -> robust accuracy in points, cost, whether it collapses
PLANTED = {
    "fgsm": (5.0, 50.0, True),
    "fgsm_rs": (40.0, 50.0, True),
    "n_fgsm": (44.0, 50.0, False),
    "zero_grad": (30.0, 50.0, False),
    "grad_align": (45.0, 110.0, False),
    "fgsm_pgi": (46.0, 70.0, False),
    "pgd-2": (47.0, 70.0, False),
    "n_fgsm-long": (45.0, 70.0, False),
    "atta": (46.5, 50.0, False),
    "spectral": (48.0, 54.0, False),
    "spectral-from-fgsm": (47.0, 55.0, False),
}


def along(collapses: bool, *, lasting: bool = True) -> Line:
    """Accuracies on the way, of a run that learned."""
    robust = [0.0, 0.4, 0.5]
    if collapses:
        robust += [0.1] * 4 if lasting else [0.1, 0.5]
    return {
        "epochs": [float(epoch) for epoch in range(len(robust))],
        "robust_accuracy": robust,
        "fgsm_accuracy": [0.0, *[0.6] * (len(robust) - 1)],
    }


SEEDS = range(3, 13)


def planted(seeds: range, **changed: tuple[float, float, bool]) -> list[Line]:
    lines = []
    for seed in seeds:
        for arm, (robust, cost, collapses) in {**PLANTED, **changed}.items():
            for eps, place in ((0.2, "lower"), (0.3, "larger")):
                line: Line = {
                    "run": f"{arm}-{eps}-{seed}",
                    "seed": seed,
                    "arm": arm,
                    "kind": cure_arms.kind(arm),
                    "eps": eps,
                    "place": place,
                    "clean_accuracy": 0.8,
                    "apgd_accuracy": robust / 100 + 0.001 * (seed % 3) - 0.2 * (eps == 0.3),
                    "autoattack_accuracy": robust / 100 + 0.001 * (seed % 3) - 0.05,
                    "best_validation_accuracy": 0.5,
                    **along(collapses),
                    "cost": cost,
                    "steering_cost": 8.0 if arm == "spectral" else 0.0,
                    "train_seconds": 200.0,
                    "steering_seconds": 4.0 if arm == "spectral" else 0.0,
                }
                if arm == "spectral":
                    line["raised"] = 0.1
                if arm == "fgsm" and eps == 0.2:  # at 0.3 the alarm is silent
                    line["kept_accuracy"] = line["apgd_accuracy"] + 0.3
                lines.append(line)
    return lines


def verdicts(values: list[Line]) -> dict[str, Verdict]:
    return {v.claim.id.removeprefix("cure/"): v for v in STUDY.judge(values, "here")}


def test_verdicts_on_planted_values() -> None:
    found = verdicts(planted(SEEDS))
    assert {name: verdict.verdict for name, verdict in found.items()} == {
        "collapses": "supported",
        "cured": "supported",
        "by-the-alarm": "supported",
        "fgsm-too": "supported",
        "cost": "supported",
        "n-fgsm": "supported",
        "grad-align": "supported",
        "best": "supported",
        "steering": "supported",
        "kept": "supported",
    }
    assert found["kept"].effect == pytest.approx(15)
    assert all(set(verdict.values) == set(SEEDS) for verdict in found.values())
    assert found["best"].effect == pytest.approx(1)  # over PGD in two steps; GradAlign costs too much
    assert found["cost"].effect == pytest.approx(54 / 50)
    assert found["steering"].effect == pytest.approx(0.02)
    assert found["cured"].interval == pytest.approx(wilson_interval(10, 10))
    assert found["by-the-alarm"].effect == 1
    assert found["n-fgsm"].effect == pytest.approx(-4)


def test_a_cure_that_fails_is_refuted() -> None:
    found = verdicts(planted(SEEDS, spectral=(20.0, 90.0, True)))
    assert [name for name, verdict in found.items() if verdict.verdict == "refuted"] == [
        "cured",
        "cost",
        "n-fgsm",
        "grad-align",
        "best",
    ]
    assert found["cured"].effect == 0


def test_a_cure_at_one_eps_is_none() -> None:
    for kept in cure_arms.PLACES:
        lines = [
            line | along(True) if (line["arm"], line["place"]) == ("spectral", kept) else line
            for line in planted(SEEDS)
        ]
        found = verdicts(lines)
        assert found["cured"].verdict == "refuted"
        assert found["by-the-alarm"].effect == 0.5
        # Nor is what was tried at one alone.
        alone = [line for line in planted(SEEDS) if line["place"] == kept]
        judged = {name for name, verdict in verdicts(alone).items() if verdict.values}
        of_the_lower = {"collapses", "n-fgsm", "grad-align", "steering"}
        assert judged == (of_the_lower if kept == "lower" else set())


def test_a_network_that_never_learned_is_not_cured_nor_one_that_dipped() -> None:
    unlearned = {**along(False), "robust_accuracy": [0.0, 0.1, 0.1]}
    without_fgsm = {**along(True, lasting=False), "fgsm_accuracy": [0.0, 0.6, 0.6, 0.1, 0.6]}
    for changed in (unlearned, along(True, lasting=False), without_fgsm):
        lines = [line | changed if line["arm"] == "spectral" else line for line in planted(SEEDS)]
        assert verdicts(lines)["cured"].effect == 0
        assert verdicts(lines)["by-the-alarm"].effect == 0
    dips = [line | along(True, lasting=False) if line["arm"] == "fgsm" else line for line in planted(SEEDS)]
    found = verdicts(dips)
    assert found["collapses"].verdict == "refuted"
    assert found["kept"].values == {}


def test_what_was_not_run_is_not_judged() -> None:
    few = [line for line in planted(SEEDS) if line["arm"] in ("fgsm", "spectral")]
    found = verdicts(few)
    assert found["cured"].verdict == "supported"
    assert found["n-fgsm"].values == {}
    assert found["best"].values  # against FGSM alone
    more = [line for line in planted(SEEDS) if line["seed"] < 6 or line in few]
    assert verdicts(more)["best"].values == pytest.approx(dict.fromkeys(range(3, 6), 1.0))
    one = verdicts([line for line in few if line["seed"] == 3])
    assert one["best"].values == {}


def test_figures_are_drawn() -> None:
    values = planted(range(4))
    for declared in STUDY.figures:
        assert value_figure(declared, values).panels
