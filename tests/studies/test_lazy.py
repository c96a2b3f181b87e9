"""The study of the lazy switch: its arms, what is read off a run, verdicts that planted values give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tangentlab.report.values import value_figure
from tangentlab.runs import RunConfig, train
from tangentlab.runs.parsing import build_method
from tangentlab.studies import lazy
from tangentlab.studies.claims import Verdict
from tangentlab.studies.lazy import STUDY, TIERS, Tier
from tiny import TINY

Line = dict[str, Any]


@pytest.mark.parametrize("tier", TIERS)
def test_arms_have_the_cost_that_their_name_says(tier: int) -> None:
    runs = STUDY.runs(tier, [4])
    assert set(lazy.FINALISTS) <= {config.name for config in runs.values()}

    def cost(config: RunConfig) -> float:
        method = build_method(config)
        return method.passes.cost * method.replays * config.training.epochs

    for key, config in runs.items():
        assert key == f"{config.name}-4"
        assert config.seed == 4
        assert config.threads == 1
        assert config.training.schedule == "piecewise"
        assert (config.switch.rule == "kernel") == config.name.startswith("kernel")
        assert (config.switch.rule == "fixed") == ("-at-" in config.name or config.name == "clean-first")
        share = cost(config) / cost(runs["pgd-4"])
        if config.name.partition("-ema")[0].endswith("-half"):
            assert lazy.HALF - 0.1 < share <= lazy.HALF
        if "-at-" in config.name:
            shown = float(config.name.rpartition("-")[2]) * config.training.epochs
            assert config.switch.epoch == pytest.approx(shown, abs=1e-3)
    if TIERS[tier].whole:
        assert set(lazy.STORED) | set(lazy.HALF_RIVALS) <= {config.name for config in runs.values()}


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> Tier:
    words = " ".join(word for word in TINY if not word.startswith(("--method", "--probe")))
    tiny = Tier("digits", words, points=40, autoattack=10)
    monkeypatch.setitem(TIERS, 0, tiny)
    return tiny


def test_a_run_is_read_with_its_looks(tier: Tier, tmp_path: Path) -> None:
    config = STUDY.runs(0, [1])["kernel-clean-guarded-1"]
    config = replace(
        config, switch=replace(config.switch, threshold=0.9, resume=1.1, patience=1, every=0.34, held_out=20)
    )
    record = train(config, tmp_path / "run")
    lines = list(STUDY.measure(tmp_path / "run", config))
    best, last = (line for line in lines if line["what"] == "checkpoint")
    assert (best["checkpoint"], last["checkpoint"], last["at"]) == ("best", "last", 3.0)
    assert last["apgd_n"] == 40
    assert last["apgd_accuracy"] <= last["clean_accuracy"]
    assert "autoattack_accuracy" not in last
    assert last["cost"] == record.status["cost"] > last["steering_cost"] > 0
    first = next(line for line in record.metrics if "switch/reason" in line)
    assert last["epoch"] == first["epoch"]
    looks = [line for line in lines if line["what"] == "look"]
    assert len(looks) == sum("switch/velocity" in line for line in record.metrics)
    assert {line["arm"] for line in lines} == {"kernel-clean-guarded"}


def test_finalists_meet_autoattack(tier: Tier, tmp_path: Path) -> None:
    config = STUDY.runs(0, [1])["n_fgsm-half-1"]
    train(config, tmp_path / "run")
    last = list(STUDY.measure(tmp_path / "run", config))[-1]
    assert last["autoattack_n"] == 10
    assert "epoch" not in last  # it has no switch


def planted(seed: int, *, switched: float = 3.0, **changed: float) -> list[Line]:
    """Last checkpoints of one seed; robust accuracies in points. All trained for 15 epochs."""
    robust = {
        "pgd": 60.0,
        "kernel-clean": 20.0,
        "kernel-stored": 59.5 + 0.1 * seed,
        "kernel-stored-returning": 60.5 + 0.1 * seed,
        "stored-throughout": 50.0,
        "clean-at-0.2": 5.0,
        "clean-at-0.8": 10.0 + seed,
        "pgd-ema": 61.0,
        "kernel-stored-ema": 60.5,
        **dict.fromkeys(lazy.HALF_RIVALS, 55.0),
        **dict.fromkeys(lazy.STORED, 58.0),
        **changed,
    }
    cost = {"kernel-stored": 100.0, "stored-throughout": 80.0, "pgd": 345.0}
    cost |= {arm: 90.0 + 20 * place for place, arm in enumerate(lazy.STORED)}
    cost |= dict.fromkeys(lazy.HALF_RIVALS, 172.0)
    return [
        {
            "what": "checkpoint",
            "arm": arm,
            "kind": lazy.kind(arm),
            "seed": seed,
            "checkpoint": checkpoint,
            "at": 15.0,
            "epoch": switched,
            "clean_accuracy": 0.9,
            "apgd_accuracy": value / 100 if checkpoint == "last" else 0.99,
            "cost": cost.get(arm, 345.0),
            "train_seconds": 50.0,
            "steering_seconds": 1.0,
        }
        for arm, value in robust.items()
        for checkpoint in ("best", "last")
    ]


def verdicts(lines: list[Line]) -> dict[str, Verdict]:
    return {verdict.claim.id.partition("/")[2]: verdict for verdict in STUDY.judge(lines, "here")}


SEEDS = (3, 4, 5, 6)


def test_verdicts_on_planted_values() -> None:
    found = verdicts([line for seed in SEEDS for line in planted(seed)])
    assert {name: verdict.verdict for name, verdict in found.items()} == {
        "clean": "refuted",
        "stored": "supported",
        "cost": "supported",
        "steering": "supported",
        "rivals": "supported",
        "kernel-knows": "supported",
        "full-first": "supported",
        "return": "supported",
        "forgetting": "inconclusive",
        "ema": "supported",
    }
    assert found["clean"].effect == pytest.approx(40)
    assert found["stored"].effect == pytest.approx(60 - 59.95)
    assert found["cost"].effect == pytest.approx(100 / 345)
    assert found["steering"].effect == pytest.approx(0.02)
    assert found["rivals"].effect == pytest.approx(59.95 - 55)


def test_fixed_points_are_compared_at_the_kernels_cost() -> None:
    lines = [line for seed in SEEDS for line in planted(seed, **{"stored-at-0.2": 59.0})]
    # At 100: halfway between stored-at-0.1 (90, 58) and stored-at-0.2 (110, 59).
    assert verdicts(lines)["kernel-knows"].values[4] == pytest.approx(59.9 - 58.5)


def test_the_seeds_that_set_the_levels_are_not_judged() -> None:
    found = verdicts([line for seed in (0, 1, 2, 3) for line in planted(seed)])
    assert set(found["stored"].values) == {3}


def test_a_kernel_that_was_not_lazy_before_the_first_fall_says_nothing() -> None:
    lines = [*planted(3), *planted(4, switched=7.5)]
    lines += [{name: value for name, value in line.items() if name != "epoch"} for line in planted(5)]
    found = verdicts(lines)
    for name in ("clean", "stored", "cost", "kernel-knows", "return", "ema"):
        assert set(found[name].values) == {3}
    assert set(found["full-first"].values) == {3, 4, 5}


def test_the_rival_is_chosen_on_the_other_seeds() -> None:
    lines = [*planted(3, **{"free-half": 90.0}), *planted(4, **{"atta-half": 57.0}), *planted(5)]
    found = verdicts(lines)["rivals"].values
    assert found[3] == pytest.approx(59.8 - 55)  # its own lucky rival is not asked
    assert found[5] == pytest.approx(60.0 - 55)  # free-half, for it won on seed 3
    dear = [{**line, "cost": 200.0} if line["arm"] == "kernel-stored" else line for line in lines]
    assert verdicts(dear)["rivals"].values == {}


def test_a_seed_without_an_arm_counts_where_it_is_not_needed() -> None:
    lines = [line for seed in SEEDS for line in planted(seed)]
    lines = [line for line in lines if (line["seed"], line["arm"]) != (5, "free-half")]
    found = verdicts(lines)
    assert {3, 4, 6} <= set(found["rivals"].values)  # it is the others' choice that matters
    assert set(found["stored"].values) == {3, 4, 5, 6}
    lines = [line for line in lines if (line["seed"], line["arm"]) != (6, "kernel-stored")]
    assert 6 not in verdicts(lines)["stored"].values


def test_the_frontier_has_a_point_an_arm() -> None:
    lines = [line for seed in (3, 4, 5) for line in planted(seed)]
    figure = value_figure(next(f for f in STUDY.figures if f.key == "frontier"), lines)
    robust = figure.panels[0]
    points = {
        label: (x, y)
        for line in robust.lines
        for label, x, y in zip(line.labels, line.x, line.y, strict=True)
    }
    assert points["kernel-stored"] == (100.0, pytest.approx(0.599))
    assert set(points) == {line["arm"] for line in lines}
    kinds = {line.name for line in robust.lines}
    assert {"reference", "rival", "with EMA", "the kernel decides", "stored from a fixed epoch"} <= kinds
