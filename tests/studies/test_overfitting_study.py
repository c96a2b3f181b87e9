"""The study of catastrophic overfitting: its runs, what is read off one, signals chosen on planted runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tangentlab.report.values import value_figure
from tangentlab.runs import train
from tangentlab.studies import overfitting, overfitting_signals
from tangentlab.studies.claims import Verdict
from tangentlab.studies.overfitting import STUDY, TIERS, Tier
from tangentlab.studies.overfitting_signals import COSTS, SIGNALS
from tangentlab.studies.overfitting_watches import Chosen, Seen, Watch, choose, seen_runs
from tiny import TINY

Line = dict[str, Any]


@pytest.mark.parametrize("tier", TIERS)
def test_runs_collapse_or_are_controls(tier: int) -> None:
    runs = STUDY.runs(tier, [3, 4])
    chosen = TIERS[tier]
    assert len(runs) == 2 * len(chosen.eps) * (len(chosen.collapsing) + len(chosen.controls))
    for key, config in runs.items():
        assert key == f"{config.name}-{config.seed}"
        assert config.training.keep_every == config.evaluation.every
        assert config.method["eps"] == config.eps


def test_a_run_is_read_checkpoint_by_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = " ".join(word for word in TINY if not word.startswith(("--method", "--probe")))
    monkeypatch.setitem(TIERS, 0, Tier("digits", words, (0.2,)))
    for module in (overfitting, overfitting_signals):
        monkeypatch.setattr(module, "PROBED", 20)
        monkeypatch.setattr(module, "BUDGET", 60)
    monkeypatch.setattr(overfitting, "AGAIN", 2)
    config = STUDY.runs(0, [1])["fgsm-0.2-1"]
    train(config, tmp_path / "run")
    run, *lines = STUDY.measure(tmp_path / "run", config)
    signals = [line for line in lines if line["what"] == "signals"]
    again = [line for line in lines if line["what"] == "again"]
    assert run["what"] == "run"
    assert run["steps_per_epoch"] == 3
    assert run["collapse"] is None
    assert [line["step"] for line in signals] == [0, 2, 4, 6, 8]
    assert [line["step"] for line in again] == [0, 4, 8]
    pooled = {name for name in COSTS if "pooled" in name}  # of three looks, and of the first examples alone
    for line in lines:
        assert set(COSTS) - set(line) <= pooled
        assert (set(line) & pooled == pooled) == (line["what"] == "signals" and line["step"] >= 4)
        assert (set(SIGNALS) - pooled <= set(line)) == (line["step"] % 4 == 0)
    by_step = {line["step"]: line for line in signals}
    assert all(
        line[name] != by_step[line["step"]][name] for line in again for name in COSTS if name.endswith("norm")
    )


def planted(collapse: float | None, seed: int, number: int) -> list[Line]:
    """40 looks, one an epoch; fgsm~pgd parts five epochs before the collapse, the cosine falls two after."""
    name = f"{'fgsm' if collapse else 'pgd'}-{number}-{seed}"
    lines: list[Line] = [
        {
            "what": "run",
            "run": name,
            "seed": seed,
            "eps": 0.2,
            "steps_per_epoch": 10.0,
            "collapse": collapse,
            "best_robust_accuracy": 0.5,
        }
    ]
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
            "clean/entropy_rank": 5.0 + noise,
            "cheap/fgsm~pgd": (0.5 if parted else 0.05) + 2 * noise,
            "cheap/pooled_share": (0.3 if parted else 0.9) - noise,
            "cheap/gradient_cosine": (0.2 if bent else 0.9) - noise,
            "kernel_share": 0.5 if fallen else 1.0,
            "update_share": 0.4 if fallen else 0.9,
        }
        # Before the watch begins everything is wild.
        lines.append({**line, "fgsm~pgd/class/distance": 9.0} if epoch == 0 else line)
        if epoch % 8 == 0:
            lines.append({**line, "what": "again", "clean/entropy_rank": 5.2 + noise})
    return lines


@pytest.fixture
def values() -> list[Line]:
    found = []
    for seed in range(8):
        found += planted(20.5 + seed, seed, 0) + planted(None, seed, 1) + planted(None, seed, 2)
    return found


def test_the_signal_that_leads_is_chosen(values: list[Line]) -> None:
    even = [run for run in seen_runs(values) if run.seed % 2 == 0]
    best = choose(even)[0]
    assert best.watch.signal == "fgsm~pgd/class/distance"
    assert best.watch.sign == 1
    assert best.in_time == 1
    assert best.lead == pytest.approx(45)  # 4.5 epochs of ten steps: parted at the first look after −5
    assert 0.05 <= best.threshold < 0.5


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
        "spectrum": "refuted",
        "kernel-first": "supported",
    }
    assert set(found["in-time"].values) == {1, 3, 5, 7}
    assert found["earlier"].effect == pytest.approx(45)
    assert found["kernel-first"].effect == pytest.approx(0.5 - 0.8)


def test_seeds_that_set_the_threshold_are_not_judged(values: list[Line]) -> None:
    even = [line for line in values if line["seed"] % 2 == 0]
    assert all(verdict.values == {} for verdict in STUDY.judge(even, "here"))
    odd = [line for line in values if line["seed"] % 2]
    judged = [v.claim for v in STUDY.judge(odd, "here") if v.values]
    # Whose threshold is the shipped one, or which have none.
    assert judged == [overfitting.DEPLOYED, overfitting.DEPLOYED_QUIET, overfitting.KERNEL_FIRST]
    assert {line["what"] for line in STUDY.derive(odd)} == {"factors"}


def test_the_factors_about_a_collapse_are_derived(values: list[Line]) -> None:
    lines = [line for line in STUDY.derive(values) if line["what"] == "factors" and line["seed"] == 0]
    by_when = {line["when"]: line for line in lines}
    assert list(by_when) == ["over 8 before", "4 to 8", "2 to 4", "1 to 2", "the last", "after"]
    assert by_when["over 8 before"]["derivative_share"] == pytest.approx(0.9)
    assert by_when["the last"]["derivative_share"] == pytest.approx(0.8)
    assert by_when["the last"]["kernel_share"] == 0.5


def test_what_a_signal_is_worth_is_derived(values: list[Line]) -> None:
    lines = [
        line for line in STUDY.derive(values) if line.get("watch") == "fgsm~pgd/class/distance, level up"
    ]
    assert [line["seed"] for line in lines] == [1, 3, 5, 7]
    for line in lines:
        assert line["family"] == "kernel"
        assert line["in_time"] == line["area"] == 1.0
        assert line["false_alarms"] == 0.0
        assert line["noise"] == 0.0
        assert line["above_noise"] == 1.0
    rank = [line for line in STUDY.derive(values) if line.get("watch") == "clean/entropy_rank, level up"]
    assert all(line["noise"] == pytest.approx(0.2 / 2**0.5) for line in rank)
    assert all(line["above_noise"] == 0.0 for line in rank)
    figure = value_figure(next(f for f in STUDY.figures if f.key == "in-time"), list(STUDY.derive(values)))
    assert figure.panels


def test_a_change_is_told_from_the_last_looks() -> None:
    lines = [{"gradient_norm": value} for value in (1.0, 1.0, 1.0, 1.0, 2.0)]
    lines += [{}, {"gradient_norm": 1.0}]
    run = Seen(0, "fgsm", 10.0, None, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], lines)
    times, scores = run.scores(Watch("gradient_norm", "change", 1))
    assert times == [5.0, 7.0]
    assert scores == pytest.approx([0.6931, 0.0], abs=1e-3)
    signed = Seen(0, "fgsm", 10.0, None, run.epochs, [{"gradient_cosine": -0.5 * k} for k in range(7)])
    assert signed.scores(Watch("gradient_cosine", "change", -1))[1][0] == pytest.approx(1.25)


def test_a_run_that_lies_above_from_the_start_is_not_warned_of() -> None:
    chosen = Chosen(Watch("gradient_norm", "level", 1), 1.5)
    epochs = [1.0, 2.0, 3.0, 4.0]

    def alarm(*values: float) -> float | None:
        lines = [{"gradient_norm": value} for value in values]
        return Seen(0, "fgsm", 10.0, 4.0, epochs, lines).alarm(chosen)

    assert alarm(1.0, 2.0, 1.0, 1.0) == 2.0
    assert alarm(2.0, 2.0, 2.0, 2.0) is None
    assert alarm(2.0, 1.0, 2.0, 2.0) == 3.0


def test_runs_that_never_learned_are_left_out() -> None:
    dead = planted(None, 0, 1)
    dead[0]["best_robust_accuracy"] = 0.1
    assert seen_runs(dead) == []


def test_a_threshold_lets_few_of_the_quiet_single_step_runs_speak() -> None:
    """A signal that only tells single-step training from PGD is none."""
    found = []
    for seed in (0, 2, 4, 6):
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
