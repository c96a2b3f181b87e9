"""The study of catastrophic overfitting: its runs, what is read off one, signals chosen on planted runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

import tangentlab as tl
from tangentlab.metrics import wilson_interval
from tangentlab.probes.overfitting_alarm import COST, POOLED
from tangentlab.report.values import value_figure
from tangentlab.runs import train
from tangentlab.runs.build import build_data, build_model
from tangentlab.studies import overfitting, overfitting_signals
from tangentlab.studies import overfitting_claims as judging
from tangentlab.studies.claims import Verdict
from tangentlab.studies.overfitting import STUDY, TIERS, Tier
from tangentlab.studies.overfitting_signals import BUDGET, COSTS, SIGNALS
from tangentlab.studies.overfitting_watches import (
    UPDATE_SHARES,
    Chosen,
    Seen,
    Watch,
    cells_worth,
    choose,
    detection,
    fate,
    folds,
    seen_runs,
    watch_noise,
    watch_worth,
)
from tiny import TINY

Line = dict[str, Any]


@pytest.mark.parametrize("tier", TIERS)
def test_runs_collapse_or_are_controls(tier: int) -> None:
    runs = STUDY.runs(tier, [3, 4])
    chosen = TIERS[tier]
    assert len(runs) == 2 * len(chosen.eps) * (len(chosen.collapsing) + len(chosen.controls))
    for key, config in runs.items():
        assert key == f"{config.name}-{config.seed}"
        assert config.training.keep_every == config.evaluation.every == chosen.every
        assert config.alarm.every == 25
        assert config.switch.rule == "none"
        assert config.method["eps"] == config.eps


def test_a_run_is_read_checkpoint_by_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = " ".join(word for word in TINY if not word.startswith(("--method", "--probe")))
    monkeypatch.setitem(TIERS, 0, Tier("digits", words, (0.2,), every=0.5))
    for module in (overfitting, overfitting_signals):
        monkeypatch.setattr(module, "PROBED", 20)
        monkeypatch.setattr(module, "EXAMPLES", 60)
    monkeypatch.setattr(overfitting_signals, "BUDGET", 60)
    monkeypatch.setattr(overfitting, "AGAIN", 2)
    monkeypatch.setattr(overfitting, "JUDGED", overfitting.FATES)
    config = STUDY.runs(0, [1])["fgsm-0.2-1"]
    record = train(config, tmp_path / "run")
    run, *lines = STUDY.measure(tmp_path / "run", config)
    signals = [line for line in lines if line["what"] == "signals"]
    again = [line for line in lines if line["what"] == "again"]
    assert run["what"] == "run"
    assert run["steps_per_epoch"] == 3
    assert run["collapse"] is None
    assert run["robust_accuracy"] == record.series("robust_accuracy")[1]
    assert run["alarm_epochs"] == record.series("alarm/pooled")[0]
    assert [line["step"] for line in signals] == [0, 2, 4, 6, 8]
    assert [line["step"] for line in again] == [0, 4, 8]
    pooled = {name for name in COSTS if "pooled" in name}  # of three looks, and of the first examples alone
    for line in lines:
        assert set(COSTS) - set(line) <= pooled
        assert (set(line) & pooled == pooled) == (line["what"] == "signals" and line["step"] >= 4)
        assert set(SIGNALS) - pooled <= set(line)
        assert line["cheap_seconds"] > 0 < line["full_seconds"]
    by_step = {line["step"]: line for line in signals}
    assert all(
        line[name] != by_step[line["step"]][name] for line in again for name in COSTS if name.endswith("norm")
    )


def planted(collapse: float | None, seed: int, number: int, **changed: Any) -> list[Line]:
    """40 looks, one an epoch; fgsm~pgd parts five epochs before the collapse, the cosine falls two after."""
    name = f"{'fgsm' if collapse else 'fgsm_rs' if number == 5 else 'pgd'}-{number}-{seed}"
    down = [collapse is not None and epoch >= collapse for epoch in range(40)]
    run = {
        "what": "run",
        "run": name,
        "method": name.partition("-")[0],
        "seed": seed,
        "eps": 0.2,
        "steps_per_epoch": 10.0,
        "epochs": list(range(40)),
        "robust_accuracy": [0.0 if now else 0.5 for now in down],
        "fgsm_accuracy": [0.9] * 40,
        "alarm_epochs": list(range(40)),
        "alarm_pooled": [
            0.3 if collapse is not None and epoch >= collapse - 3 else 0.9 for epoch in range(40)
        ],
        "train_seconds": 100.0,
        "probe_seconds": 2.0,
    }
    lines: list[Line] = [run | changed]
    for epoch in range(40):
        noise = 0.01 * ((7 * epoch + 3 * number + seed) % 5)
        parted = collapse is not None and epoch >= collapse - 5
        fallen = collapse is not None and epoch >= collapse - 2
        bent = collapse is not None and epoch >= collapse + 2
        line = {
            "what": "signals",
            "run": name,
            "seed": seed,
            "epoch": float(epoch),
            "fgsm~pgd/class/distance": (0.5 if parted else 0.05) + noise,
            "gradient_cosine": (0.2 if bent else 0.9) - noise,
            "clean/class/entropy_rank": 5.0 + noise,
            "cheap/fgsm~pgd": (0.5 if parted else 0.05) + 2 * noise,
            "cheap/pooled_update_share": (0.3 if parted else 0.9) - noise,
            "cheap/gradient_cosine": (0.2 if bent else 0.9) - noise,
            "kernel_share": 0.3 if fallen else 1.0,
            "update_share": 0.27 if fallen else 0.9,
            "derivative_share": 0.8 if fallen else 0.9,
        }
        # Before the watch begins everything is wild.
        lines.append({**line, "fgsm~pgd/class/distance": 9.0} if epoch == 0 else line)
        if epoch % 8 == 0:
            lines.append({**line, "what": "again"})
    return lines


SEEDS = range(3, 13)


def test_the_pooled_confidence_share_is_the_shipped_alarms() -> None:
    config = STUDY.runs(0, [1])["fgsm-0.24-1"]
    examples = build_data(config)
    x, y = overfitting.probed(examples, config)[0]
    model = build_model(config, examples, torch.device("cpu"))  # in training mode
    assert all(module.training for module in model.modules())
    n = POOLED * (BUDGET // COST)
    pooled, alarm = overfitting_signals.PooledSignals(x, y), tl.OverfittingAlarm(x[:n], y[:n], eps=0.24)
    for step in range(2 * POOLED):
        alarm.update(model, step)
        found = pooled.look(model, config).get("cheap/pooled_confidence_share")
        assert found == (None if step < POOLED - 1 else pytest.approx(alarm.looks[-1].pooled))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)


@pytest.fixture
def values() -> list[Line]:
    found = []
    for seed in SEEDS:
        for number in range(4):
            found += planted(20.5 + seed, seed, number)
        for number in range(4, 13):
            found += planted(None, seed, number)
    return found


def test_the_signal_that_leads_is_chosen(values: list[Line]) -> None:
    best = choose(seen_runs(values))[0]
    assert best.watch.signal == "fgsm~pgd/class/distance"
    assert best.watch.sign == 1
    assert best.in_time == 1
    assert best.lead == pytest.approx(45)  # 4.5 epochs of ten steps: parted at the first look after −5
    assert 0.05 <= best.threshold < 0.5


def test_a_signal_that_hardly_rises_over_its_noise_is_not_chosen(values: list[Line]) -> None:
    signal = "fgsm~pgd/class/distance"
    noisy = [{**line, signal: line[signal] + 0.5} if line["what"] == "again" else line for line in values]
    chosen = choose(seen_runs(noisy))
    assert chosen
    assert signal not in {one.watch.signal for one in chosen}


def test_verdicts_on_planted_values(values: list[Line]) -> None:
    found: dict[str, Verdict] = {v.claim.id.partition("/")[2]: v for v in STUDY.judge(values, "here")}
    assert {name: verdict.verdict for name, verdict in found.items()} == {
        "in-time": "supported",
        "false-alarms": "supported",
        "earlier": "supported",
        "cheap-in-time": "supported",
        "cheap-false-alarms": "supported",
        "cheap-earlier": "supported",
        "deployed": "supported",
        "deployed-false-alarms": "supported",
        "deployed-controls": "supported",
        "deployed-one-step": "inconclusive",  # of ten runs
        "alarm-signal": "refuted",  # it says nothing here, and others do
        "time": "supported",
        "spectrum": "inconclusive",  # it does not rise above its noise: nothing is chosen
        "kernel-part": "supported",
    }
    assert set(found["in-time"].values) == set(SEEDS)
    assert found["in-time"].interval == pytest.approx(wilson_interval(40, 40))
    assert found["deployed-false-alarms"].interval == pytest.approx(wilson_interval(0, 90))
    assert found["deployed-controls"].interval == pytest.approx(wilson_interval(0, 80))
    assert found["earlier"].effect == pytest.approx(45)
    assert found["deployed-one-step"].interval == pytest.approx(wilson_interval(0, 10))
    assert found["alarm-signal"].effect == pytest.approx(-45)
    assert found["time"].effect == pytest.approx(0.02)
    assert found["spectrum"].values == {}


def test_the_shipped_alarm_is_judged_by_when_it_spoke_itself(values: list[Line]) -> None:
    late = [
        {**line, "alarm_epochs": [1.0, 38.0, 39.0], "alarm_pooled": [0.3, 0.9, 0.3]}
        if line["what"] == "run" and line["seed"] % 2 and line["method"] != "pgd"
        else line
        for line in values
    ]
    found = {v.claim: v for v in STUDY.judge(late, "here")}
    assert found[judging.DEPLOYED].effect == 0.5
    assert found[judging.DEPLOYED_QUIET].effect == pytest.approx(0.5 / 9)
    assert found[judging.DEPLOYED_CONTROLS].effect == 0
    assert found[judging.IN_TIME].effect == 1


@pytest.mark.parametrize(("late", "effect"), [(0, 0), (3, -30)])
def test_the_alarms_signal_and_others_are_watched_alike(values: list[Line], late: int, effect: float) -> None:
    own, other = "cheap/pooled_confidence_share", "cheap/pooled_update_share"
    seen = {(line["run"], line["epoch"]): line[other] for line in values if other in line}
    lines = [
        {**line, own: seen[line["run"], max(0, line["epoch"] - late)]} if other in line else line
        for line in values
    ]
    found = {v.claim: v for v in STUDY.judge(lines, "here")}
    assert found[judging.SIGNAL_EARLIER].effect == pytest.approx(effect)


def test_the_shipped_alarm_at_other_thresholds(values: list[Line]) -> None:
    found = {
        (line["seed"], line["threshold"]): (line["in_time"], line["false_alarms"])
        for line in STUDY.derive(values)
        if line["what"] == "alarm"
    }
    seed = SEEDS[0]
    assert found[seed, 0.3] == (0, 0)
    assert found[seed, 0.35] == found[seed, 0.9] == (1, 0)
    assert found[seed, 0.95] == (0, 1)  # it would be raised from the first look on: a warning of nothing


def test_no_seed_is_judged_by_its_own_choice(values: list[Line]) -> None:
    assert [seed for seed, *_ in folds(values)] == list(SEEDS)
    # On seed 5 another signal is the better one; only there would it be chosen.
    odd = [
        {**line, "cheap/input_top_mass": 1.0 + (line["epoch"] > 5) * (line["run"] == "fgsm-0-5")}
        if line["what"] == "signals"
        else line
        for line in values
    ]
    order = {seed: chosen[0].watch.signal for seed, _, chosen in folds(odd)}
    assert order[5] == "fgsm~pgd/class/distance"
    one = [line for line in values if line["seed"] == 3]
    judged = {v.claim for v in STUDY.judge(one, "here") if v.values}
    # Whose threshold is the shipped one, or which have none.
    assert judged == {
        judging.DEPLOYED,
        judging.DEPLOYED_QUIET,
        judging.DEPLOYED_CONTROLS,
        judging.DEPLOYED_ONE_STEP,
        judging.TIME,
        judging.KERNEL_PART,
    }


def seen(*lines: Line, collapse: float | None = 4.0, epochs: Sequence[float] = ()) -> Seen:
    """A run whose looks are an epoch apart, from the first on."""
    at = epochs or [1.0 + place for place in range(len(lines))]
    return Seen(3, "fgsm", 0.2, 10.0, collapse, at, lines)


@pytest.mark.parametrize(
    ("after", "part"),
    [
        ((0.25, 0.25, 0.8), 1.0),  # the kernel alone in one order, and all of the fall is in the other
        ((0.25, 0.8, 0.25), 0.0),
        ((0.2, 0.4, 0.4), 0.5),
        ((0.5, 0.4, 0.8), None),  # it did not halve
        ((-0.2, 0.008, 0.8), 1.0),  # nothing is left of it
    ],
)
def test_the_kernels_part_of_the_fall(after: tuple[float, float, float], part: float | None) -> None:
    """From 0.8 each; on the way the shares are what they were but for one look."""
    before = [(0.8, 0.8, 0.8), (0.9, 0.7, 0.8), (0.8, 0.8, 0.8)]
    lines = [dict(zip(UPDATE_SHARES, shares, strict=True)) for shares in (*before, after, (0.0, 0.0, 0.0))]
    found = seen(*lines, collapse=3.5).kernel_part()
    assert found == (None if part is None else pytest.approx(part))
    assert seen(*lines, collapse=0.5).kernel_part() is None  # no look before it
    assert seen(*lines, collapse=9.0).kernel_part() is None  # none after


def test_fates() -> None:
    def of(*robust: float, fgsm: float = 0.9) -> tuple[str, float | None]:
        epochs = list(range(len(robust)))
        return fate({"epochs": epochs, "robust_accuracy": robust, "fgsm_accuracy": [fgsm] * len(robust)})

    assert of(0.1, 0.4, 0.1, 0.1, 0.1) == ("collapsed", pytest.approx(1 + 2 / 3))
    # Dated to the first fall of half an epoch, of those that once lasted.
    assert of(0.1, 0.4, 0.1, 0.4, 0.4, 0.1, 0.1, 0.1) == ("collapsed", pytest.approx(1 + 2 / 3))
    assert of(0.1, 0.4, 0.19, 0.4, 0.4, 0.1, 0.1, 0.1) == ("collapsed", pytest.approx(4 + 2 / 3))
    assert of(0.1, 0.4, 0.1, 0.4, 0.4) == ("neither", None)
    assert of(0.1, 0.4, 0.1, 0.1, 0.1, fgsm=0.2) == ("neither", None)  # no gap to FGSM
    assert of(0.1, 0.4, 0.19, 0.4, 0.4, 0.4, 0.4) == ("quiet", None)  # for less than half an epoch
    assert of(0.1, 0.4, 0.3, 0.25, 0.25, 0.25) == ("neither", None)  # it decays
    assert of(0.1, 0.4, 0.3, 0.21, 0.4, 0.4) == ("quiet", None)
    assert of(0.1, 0.14, 0.0, 0.0, 0.0) == ("unlearned", None)
    assert of(0.1, 0.16, 0.0, 0.0, 0.0) == ("unlearned", None)  # once, by chance


def test_the_factors_about_a_collapse_are_derived(values: list[Line]) -> None:
    lines = [line for line in STUDY.derive(values) if line["what"] == "factors" and line["seed"] == 3]
    by_when = {line["when"]: line for line in lines}
    assert list(by_when) == ["over 8 before", "4 to 8", "2 to 4", "1 to 2", "the last", "after"]
    assert by_when["over 8 before"]["derivative_share"] == pytest.approx(0.9)
    assert by_when["the last"]["derivative_share"] == pytest.approx(0.8)
    assert by_when["the last"]["kernel_share"] == 0.3


def test_what_a_signal_is_worth_is_derived(values: list[Line], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overfitting, "SHOWN", 3)
    derived = list(STUDY.derive([*values, *planted(None, 4, 99, robust_accuracy=[0.4, 0.1] * 20)]))
    lines = [line for line in derived if line.get("watch") == "fgsm~pgd/class/distance, level up"]
    of_seeds = [line for line in lines if line["what"] == "watch"]
    assert [line["seed"] for line in of_seeds] == list(SEEDS)
    for line in of_seeds:
        assert line["family"] == "kernel"
        assert line["in_time"] == 1.0
        assert line["false_alarms"] == 0.0
        assert line["noise"] == 0.0
        assert line["above_noise"] == 1.0
    (area,) = (line for line in lines if line["what"] == "area")
    assert area["area"] == 1.0
    roc = [(line["false_alarms"], line["detected"]) for line in lines if line["what"] == "roc"]
    assert (0.0, 1.0) in roc
    assert roc[-1] == (1.0, 1.0)
    assert len({false_alarms for false_alarms, _ in roc}) == len(roc)  # a curve against them
    for what in ("watch", "area"):
        ranked = [line for line in derived if line["what"] == what and line["cost"] == "any"]
        signals = list(dict.fromkeys(line["signal"] for line in ranked))
        shown = {line["signal"] for line in ranked if line["shown"]}
        assert len(signals) > overfitting.SHOWN
        assert shown - {"method and eps"} == set(signals[: overfitting.SHOWN]) - {"method and eps"}
        worth = "area" if what == "area" else "in_time"
        means = [fmean(line[worth] for line in ranked if line["signal"] == signal) for signal in signals]
        assert means == sorted(means, reverse=True)
    assert {line["cost"] for line in derived if line["what"] == "roc"} == {"any", "cheap"}
    fates = [line for line in derived if line["what"] == "fate"]
    assert [sum(line[name] for line in fates) for name in overfitting.FATES] == [40, 90, 1, 0]
    for figure in STUDY.figures:
        drawn = value_figure(figure, [*values, *derived])
        assert drawn.panels or figure.where["what"] == "signals"


def test_what_knows_the_method_and_eps_alone_is_held_against_the_signals(values: list[Line]) -> None:
    runs = seen_runs(values)
    found = cells_worth(runs, runs)
    # All FGSM runs collapse, one look after the first watched one at the earliest; no other does.
    assert (found["in_time"], found["false_alarms"]) == (1, 0)
    quiet = [run for run in runs if run.collapse is None]
    assert cells_worth(runs, quiet)["in_time"] == 0
    derived = [line for line in STUDY.derive(values) if line.get("family") == "no signal"]
    assert [line["seed"] for line in derived] == list(SEEDS)
    assert derived[0]["lead"] == pytest.approx(10 * (20.5 + SEEDS[0] - 1), abs=10)


def test_leads_to_other_falls_are_told_beside(values: list[Line]) -> None:
    """A run that fell at 5 for a moment, at 10 for longer and at 20 for good."""
    robust = [0.4] * 5 + [0.19] + [0.4] * 4 + [0.1] + [0.4] * 9 + [0.1] * 20
    (run,) = seen_runs(planted(20.5, 3, 0, robust_accuracy=robust))
    assert (run.fell, run.collapse, run.lost) == pytest.approx((4.95, 9 + 2 / 3, 19 + 2 / 3), abs=0.01)
    one = Chosen(Watch("fgsm~pgd/class/distance", "level", 1), 0.3)
    found = watch_worth(one, [run])
    assert (found["in_time"], found["in_time_of_the_first_fall"], found["in_time_of_the_lasting_fall"]) == (
        0,
        0,
        1,
    )
    assert found["lead_of_the_lasting_fall"] == pytest.approx(10 * (19 + 2 / 3 - 16))


def test_the_noise_of_a_pooled_signal_is_that_of_its_looks_averaged(values: list[Line]) -> None:
    lines = [line | ({"cheap/update_share": 0.5 + 0.1 * (line["what"] == "again")}) for line in values]
    runs = seen_runs(lines)
    single, pooled = (
        watch_noise(Watch(f"cheap/{name}", "level", -1), runs)["noise"]
        for name in ("update_share", "pooled_update_share")
    )
    assert single == pytest.approx(0.1 / 2**0.5)
    assert pooled == pytest.approx(single / 3**0.5)


def test_noise_is_that_before_a_collapse_and_of_logarithms(values: list[Line]) -> None:
    lines = [
        line | {"loss_ratio": (100.0 if line.get("epoch", 0) > 33 else 1.0) * (1 + (line["what"] == "again"))}
        for line in values
        if line["run"].startswith("fgsm") or line["what"] == "run"
    ]
    found = watch_noise(Watch("loss_ratio", "level", 1), seen_runs(lines))
    assert found["noise"] == pytest.approx(math.log(2) / 2**0.5)


def test_the_runs_own_evaluations_are_a_rival(values: list[Line]) -> None:
    run = seen_runs(values)[0]
    assert [line["validation_gap"] for line in run.signals][:2] == [pytest.approx(0.4)] * 2
    assert run.signals[-1]["validation_accuracy"] == 0
    assert Watch("validation_gap", "level", 1).family == "rival"
    assert Watch("cheap/pooled_update_share", "level", -1).family == "update"
    assert Watch("cheap/clean~pgd", "level", 1).family == "kernel"


def test_a_change_is_told_from_the_last_looks() -> None:
    lines = [{"gradient_norm": value} for value in (1.0, 1.0, 1.0, 1.0, 2.0)]
    lines += [{}, {"gradient_norm": 1.0}]
    run = seen(*lines, collapse=None)
    times, scores = run.scores(Watch("gradient_norm", "change", 1))
    assert times == [5.0, 7.0]
    assert scores == pytest.approx([0.6931, 0.0], abs=1e-3)
    signed = seen(*({"gradient_cosine": -0.5 * k} for k in range(7)), collapse=None)
    assert signed.scores(Watch("gradient_cosine", "change", -1))[1][0] == pytest.approx(1.25)


def test_a_run_that_lies_above_from_the_start_is_not_warned_of() -> None:
    chosen = Chosen(Watch("gradient_norm", "level", 1), 1.5)
    epochs = [1.0, 2.0, 3.0, 4.0]

    def alarm(*values: float) -> float | None:
        lines = [{"gradient_norm": value} for value in values]
        return seen(*lines, epochs=epochs).alarm(chosen)

    assert alarm(1.0, 2.0, 1.0, 1.0) == 2.0
    assert alarm(2.0, 2.0, 2.0, 2.0) is None
    assert alarm(2.0, 1.0, 2.0, 2.0) == 3.0
    lines = [{"gradient_norm": 2.0}] * 4
    assert seen(*lines, collapse=None).exceeds(chosen)  # of a quiet run it is a false alarm


def test_a_collapse_before_the_first_look_that_counts_was_missed() -> None:
    def run(collapse: float | None, *values: float) -> Seen:
        lines = [{"gradient_norm": value} for value in values]
        return seen(*lines, collapse=collapse)

    found = [run(2.5, 1.0, 2.0, 2.0), run(0.9, 2.0, 2.0, 2.0), run(None, 0.5, 0.5, 0.5)]
    told = detection(Watch("gradient_norm", "level", 1), found)
    assert told is not None
    area, points = told
    assert area == 0.5
    assert points[0] == (0.0, 0.5)


def test_runs_that_never_learned_are_left_out() -> None:
    assert seen_runs(planted(None, 3, 1, robust_accuracy=[0.1] * 40)) == []


def test_a_threshold_lets_few_of_the_quiet_single_step_runs_speak() -> None:
    """A signal that only tells single-step training from PGD is none."""
    found = []
    for seed in (3, 5, 7, 9):
        found += planted(20.5, seed, 0)
        for number in range(1, 30):
            found += planted(None, seed, number)
        quiet = planted(None, seed, 30)
        for line in quiet:
            line["run"] = f"fgsm-30-{seed}"
        found += [{**line, "gradient_norm": 3.0 if line.get("epoch", 0) > 20 else 1.0} for line in quiet]
    chosen = choose(seen_runs(found))
    limit = next(one.threshold for one in chosen if str(one.watch) == "gradient_norm, level up")
    assert limit == 3.0
