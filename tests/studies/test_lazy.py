"""The study of the lazy switch: its arms, what is read off a run, verdicts that planted values give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tangentlab.records import RunRecord
from tangentlab.report.values import value_figure
from tangentlab.runs import RunConfig, train
from tangentlab.runs.parsing import build_method, build_other_method
from tangentlab.studies import lazy, lazy_arms
from tangentlab.studies.claims import Verdict
from tangentlab.studies.lazy import STUDY
from tangentlab.studies.lazy_arms import TIERS, Tier
from tiny import TINY

Line = dict[str, Any]


@pytest.mark.parametrize("tier", TIERS)
def test_arms_have_the_cost_that_their_name_says(tier: int) -> None:
    runs = STUDY.runs(tier, [4])
    assert set(lazy_arms.FINALISTS) <= {config.name for config in runs.values()}

    def cost(config: RunConfig) -> float:
        method, epochs = build_method(config), config.training.epochs
        if config.switch.rule != "fixed":
            return method.passes.cost * method.replays * epochs
        other = build_other_method(config)
        assert other is not None
        return method.passes.cost * config.switch.epoch + other.passes.cost * (epochs - config.switch.epoch)

    for key, config in runs.items():
        assert key == f"{config.name}-4"
        assert config.seed == 4
        assert config.threads == 1
        constant = config.name.endswith("+constant")
        assert config.training.schedule == ("constant" if constant else "piecewise")
        assert (config.switch.rule == "kernel") == config.name.startswith("kernel")
        fixed = "-at-" in config.name or config.name in ("clean-first-half", "stored-half")
        assert (config.switch.rule == "fixed") == fixed
        assert (config.probe.size > 0) == (config.name in ("pgd", "trades"))
        if config.name.partition("-ema")[0].endswith("-half"):
            assert lazy_arms.HALF - 0.1 < cost(config) / cost(runs["pgd-4"]) <= lazy_arms.HALF
        if "-at-" in config.name:
            shown = float(config.name.split("-at-")[1].split("+")[0].split("-")[0]) * config.training.epochs
            assert config.switch.epoch == pytest.approx(shown, abs=1e-3)
        if config.name.startswith(("stored", "kernel-stored")):
            way = config.switch.to or config.method
            assert (way["crafting_statistics"], way["buffer_updates"]) == ("batch", ("crafting", "loss"))
    if TIERS[tier].whole:
        assert set(lazy_arms.STORED) | set(lazy_arms.HALF_RIVALS) <= {config.name for config in runs.values()}
        assert set(lazy_arms.ON_ALL_POINTS) <= {config.name for config in runs.values()}
        usual = runs["stored-at-0.2-4"]
        back, twice, reference = (
            runs[f"{name}-4"]
            for name in (lazy_arms.CAME_BACK, lazy_arms.CHOSEN_TWICE, lazy_arms.REFERENCE_TWICE)
        )
        assert back == replace(usual, name=back.name, switch=replace(usual.switch, return_on_drop=True))
        assert (
            twice.training == reference.training == replace(usual.training, epochs=2 * usual.training.epochs)
        )
        others = [runs[f"stored-at-0.2+{condition}-4"] for condition in ("cold", "slow", "weak", "narrow")]
        assert [other.training.warmup for other in others] == [0.0, 0.2, 0.2, 0.2]
        assert [other.training.learning_rate for other in others] == [0.1, 0.02, 0.1, 0.1]
        assert [other.switch.to["eps"] for other in others] == [
            usual.eps,
            usual.eps,
            usual.eps / 2,
            usual.eps,
        ]
        assert others[3].model["widths"] != usual.model["widths"]


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> Tier:
    words = " ".join(word for word in TINY if not word.startswith(("--method", "--probe")))
    tiny = Tier("digits", words, points=40, all_points=50, autoattack=10, narrow="[2]")
    monkeypatch.setitem(TIERS, 0, tiny)
    return tiny


def test_a_run_is_read_with_its_looks(tier: Tier, tmp_path: Path) -> None:
    config = STUDY.runs(0, [1])["kernel-clean-guarded-1"]
    config = replace(
        config, switch=replace(config.switch, threshold=0.9, resume=1.1, patience=1, every=0.34, held_out=20)
    )
    record = train(config, tmp_path / "run")
    lines = list(STUDY.measure(tmp_path / "run", config))
    (last,) = (line for line in lines if line["what"] == "checkpoint")
    assert (last["checkpoint"], last["at"]) == ("last", 3.0)
    assert last["apgd_n"] == 40
    assert last["apgd_accuracy"] <= last["clean_accuracy"]
    assert "autoattack_accuracy" not in last
    assert last["cost"] == record.status["cost"] > last["steering_cost"] > 0
    first = next(line for line in record.metrics if "switch/reason" in line)
    assert last["epoch"] == first["epoch"]
    looks = [line for line in lines if line["what"] == "look"]
    assert len(looks) == sum("switch/velocity" in line for line in record.metrics)
    assert {line["arm"] for line in lines} == {"kernel-clean-guarded"}
    along = [line for line in lines if line["what"] == "evaluation"]
    assert [line["epoch"] for line in along] == [0, 1, 2, 3]
    assert along[-1]["robust_accuracy"] <= last["best_validation_accuracy"]


def test_finalists_meet_autoattack(tier: Tier, tmp_path: Path) -> None:
    config = STUDY.runs(0, [1])["atta-half-1"]
    train(config, tmp_path / "run")
    lines = list(STUDY.measure(tmp_path / "run", config))
    best, last = (line for line in lines if line["what"] == "checkpoint")
    assert (best["checkpoint"], last["checkpoint"]) == ("best", "last")
    assert (last["apgd_n"], last["apgd_all_n"], last["autoattack_n"]) == (40, 50, 10)
    assert "autoattack_n" not in best
    assert "epoch" not in last  # it has no switch
    assert last["autoattack_accuracy"] <= last["autoattack_apgd_accuracy"] <= 1


def test_arms_of_fine_claims_meet_all_points(tier: Tier, tmp_path: Path) -> None:
    config = STUDY.runs(0, [1])["n_fgsm-half-1"]
    train(config, tmp_path / "run")
    (last,) = (line for line in STUDY.measure(tmp_path / "run", config) if line["what"] == "checkpoint")
    assert (last["checkpoint"], last["apgd_n"], last["apgd_all_n"]) == ("last", 40, 50)
    assert "autoattack_n" not in last


def test_a_reference_has_its_kernel_watched(tier: Tier, tmp_path: Path) -> None:
    config = STUDY.runs(0, [1])["pgd-1"]
    record = train(config, tmp_path / "run")
    lines = list(STUDY.measure(tmp_path / "run", config))
    seen = [line["velocity"] for line in lines if line["what"] == "kernel"]
    assert seen == record.series("kernel/clean/class/angle_velocity")[1] != []
    (usual,) = (x for x in lines if x["what"] == "checkpoint" and x["checkpoint"] == "last")
    assert (usual["condition"], usual["replaced_by"]) == ("usual", "pgd")
    assert lazy._condition("one-step-at-0.2+slow") == {"condition": "slow", "replaced_by": "one-step-at-0.2"}
    assert lazy._condition("kernel-clean") == {}
    assert lazy._condition(f"{lazy_arms.KERNEL}+cold")["condition"] == "cold"


def test_the_first_switch_and_the_last_way_back_are_told() -> None:
    changes = [(2, "cheap"), (4, "full"), (5, "cheap"), (8, "full"), (9, "cheap")]
    lines = [{"epoch": at, "switch/phase": phase, "switch/reason": "x"} for at, phase in changes]
    record = RunRecord(Path(), {}, {}, {}, [{"epoch": 1, "switch/phase": "full"}, *lines], [])
    assert lazy._switched(record) == {"epoch": 2, "back": 8}
    assert lazy._switched(replace(record, metrics=lines[:1])) == {"epoch": 2}
    assert lazy._switched(replace(record, metrics=[])) == {}


def planted(seed: int, *, switched: float = 3.0, **changed: float) -> list[Line]:
    """Last checkpoints of one seed; robust accuracies in points. All trained for 15 epochs."""
    robust = {
        "pgd": 60.0,
        "kernel-clean": 20.0,
        "kernel-stored-staying": 59.3 + 0.1 * seed,
        "clean-at-0.2": 5.0,
        "clean-at-0.8": 8.0 + seed,
        "clean-at-0.5": 7.0,
        "pgd-ema": 61.0,
        "kernel-stored-staying-ema": 60.5,
        **dict.fromkeys(lazy_arms.HALF_RIVALS, 55.0),
        **dict.fromkeys(lazy_arms.STORED, 58.0),
        lazy_arms.THROUGHOUT: 50.0,
        lazy_arms.REFERENCE_TWICE: 63.0,
        lazy_arms.CHOSEN_TWICE: 60.5,
        lazy_arms.CAME_BACK: 59.0,
        **changed,
    }
    cost = {lazy_arms.KERNEL: 150.0, "pgd": 345.0}
    cost |= {arm: 90.0 + 30 * place for place, arm in enumerate(lazy_arms.STORED)}
    cost |= {**dict.fromkeys(lazy_arms.HALF_RIVALS, 172.0), lazy_arms.THROUGHOUT: 80.0}
    return [
        {
            "what": "checkpoint",
            "arm": arm,
            "kind": lazy_arms.kind(arm),
            "seed": seed,
            "checkpoint": checkpoint,
            "at": 15.0,
            "epoch": switched,
            "clean_accuracy": 0.9,
            "apgd_accuracy": value / 100 if checkpoint == "last" else 0.99,
            "apgd_all_accuracy": value / 100 - 0.02,
            "cost": cost.get(arm, 345.0),
            "train_seconds": 50.0,
            "steering_seconds": 1.0,
        }
        for arm, value in robust.items()
        for checkpoint in ("best", "last")
    ]


def verdicts(lines: list[Line]) -> dict[str, Verdict]:
    return {verdict.claim.id.partition("/")[2]: verdict for verdict in STUDY.judge(lines, "here")}


SEEDS = (7, 8, 9, 10)


def test_verdicts_on_planted_values() -> None:
    found = verdicts([line for seed in SEEDS for line in planted(seed)])
    assert {name: verdict.verdict for name, verdict in found.items()} == {
        "clean": "refuted",
        "fires": "supported",
        "stored": "supported",
        "cost": "supported",
        "steering": "supported",
        "fixed": "refuted",
        "longer": "refuted",
        "rivals": "supported",
        "kernel-knows": "supported",
        "timing": "supported",
        "full-first": "supported",
        "return": "supported",
        "forgetting": "inconclusive",
        "ema": "supported",
    }
    assert found["clean"].effect == pytest.approx(40)
    assert found["fires"].effect == pytest.approx(0.2)
    assert found["return"].effect == pytest.approx(1)
    assert found["stored"].effect == pytest.approx(60 - 60.15)
    assert found["fixed"].effect == pytest.approx(2)
    assert found["longer"].effect == pytest.approx(2.5)
    assert found["cost"].effect == pytest.approx(150 / 345)
    assert found["steering"].effect == pytest.approx(0.02)
    assert found["rivals"].effect == pytest.approx(60.15 - 55)
    assert found["kernel-knows"].effect == found["timing"].effect == pytest.approx(60.15 - 58)


def test_the_fixed_point_is_chosen_on_the_other_seeds_among_those_that_cost_half() -> None:
    lines = [*planted(5, **{"stored-at-0.1": 70.0}), *planted(6, **{"stored-at-0.8": 90.0}), *planted(7)]
    found = verdicts(lines)["kernel-knows"].values
    assert found[5] == pytest.approx(59.8 - 58)  # its own lucky point is not asked
    assert found[7] == pytest.approx(60.0 - 58)  # stored-at-0.1 was the best on seed 5; here it has 58
    assert verdicts([*lines, *planted(8, **{"stored-at-0.1": 61.0})])["kernel-knows"].values[8] < 0


def test_a_kernel_that_was_not_lazy_before_the_first_fall_says_nothing() -> None:
    lines = [*planted(5), *planted(6, switched=7.5)]
    lines += [{name: value for name, value in line.items() if name != "epoch"} for line in planted(7)]
    found = verdicts(lines)
    assert set(found["clean"].values) == {5}
    assert found["fires"].values == {5: 0.2, 6: 0.5, 7: 1.0}
    for name in ("cost", "kernel-knows"):  # the rule as it is, whatever it does
        assert set(found[name].values) == {5, 6, 7}
    for name in ("stored", "ema"):  # where it changed nothing it lost nothing
        assert set(found[name].values) == {5, 6}


def test_claims_are_judged_on_seeds_that_were_seen_after_them() -> None:
    found = verdicts([line for seed in (5, 6, *SEEDS) for line in planted(seed)])
    for name, verdict in found.items():
        assert set(verdict.values) == {*(() if name in ("fixed", "rivals", "timing") else (5, 6)), *SEEDS}


def test_timing_is_held_against_fixed_points_at_the_same_cost() -> None:
    # stored-at-0.1, 0.2, 0.35, 0.5 cost 120, 150, 180 and 210.
    lines = planted(7, **{"stored-at-0.2": 56.0, "stored-at-0.35": 59.0})
    for line in lines:
        if line["arm"] == lazy_arms.KERNEL:
            line["cost"] = 170.0
    assert verdicts(lines)["timing"].values[7] == pytest.approx(60 - 58)
    for line in lines:
        if line["arm"] == lazy_arms.KERNEL:
            line["cost"] = 220.0
    assert verdicts(lines)["timing"].values == {}


def test_a_rival_that_never_attacks_fully_is_a_fixed_point_too() -> None:
    throughout = {lazy_arms.THROUGHOUT: 65.0}
    found = verdicts([line for seed in SEEDS for line in planted(seed, **throughout)])
    assert {found[name].verdict for name in ("rivals", "kernel-knows", "full-first")} == {"refuted"}


def test_the_rival_is_chosen_on_the_other_seeds() -> None:
    lines = [*planted(7, **{"free-half": 90.0}), *planted(8, **{"atta-half": 57.0}), *planted(9)]
    found = verdicts(lines)["rivals"].values
    assert found[7] == pytest.approx(60.0 - 55)  # its own lucky rival is not asked
    assert found[9] == pytest.approx(60.2 - 55)  # free-half, for it won on seed 7


def test_a_seed_without_an_arm_counts_where_it_is_not_needed() -> None:
    lines = [line for seed in SEEDS for line in planted(seed)]
    lines = [line for line in lines if (line["seed"], line["arm"]) != (7, "free-half")]
    found = verdicts(lines)
    assert set(SEEDS) - {7} <= set(found["rivals"].values)  # it is the others' choice that matters
    assert set(found["stored"].values) == set(SEEDS)
    lines = [line for line in lines if (line["seed"], line["arm"]) != (8, lazy_arms.KERNEL)]
    assert 8 not in verdicts(lines)["stored"].values


def test_the_frontier_has_a_point_an_arm() -> None:
    lines = [line for seed in (5, 6, 7) for line in planted(seed)]
    figure = value_figure(next(f for f in STUDY.figures if f.key == "frontier"), lines)
    robust = figure.panels[0]
    points = {
        label: (x, y)
        for line in robust.lines
        if line.labels
        for label, x, y in zip(line.labels, line.x, line.y, strict=True)
    }
    assert points[lazy_arms.KERNEL] == (150.0, pytest.approx(0.599))
    forgets = ("clean-at", "kernel-clean")
    assert set(points) == {
        line["arm"]
        for line in lines
        if not line["arm"].startswith(forgets) or line["arm"] == "kernel-clean-guarded"
    }
    kinds = {line.name for line in robust.lines if line.labels}
    assert kinds <= set(lazy_arms.KINDS)
    assert {lazy_arms.kind(arm) for arm in lazy_arms.arms(TIERS[1])} == {
        *lazy_arms.KINDS,
        lazy_arms.OTHERWISE,
    }
