"""What a signal is worth as an alarm: watches, their thresholds from quiet runs, their leads on the others.

A signal is watched as it is ("level"), as the median of its last three looks ("median") or against that of
more of them ("change"), upwards or downwards. It speaks where it comes to exceed its threshold: a run that
lies above from the start is not warned of. The threshold, one for every eps, is the least that at most 5 % of
the quiet runs exceed, and at most 5 % of the single-step ones among them, or it would tell methods apart and
not fates. Which watch is best is decided on the collapsing runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean, median

from tangentlab import metrics
from tangentlab.studies.overfitting_signals import CHEAP_RIVALS, COSTS, RIVALS, SIGNALS
from tangentlab.studies.study import Values

SINGLE_STEP = ("fgsm", "fgsm_rs")
WATCHED_FROM = 1.0  # epochs
SMOOTHED = 3  # looks whose median is watched
BEFORE = 8  # looks whose median a change is told from; four at least
FALSE_ALARMS = 0.05
LEARNED = 0.15  # robust accuracy, of ten classes
SIGNED = (
    "fgsm_pgd_gap",
    "fgsm_pgd2_gap",
    "gradient_cosine",
    "update_cosine",
    "update_share",
    "kernel_share",
)  # may be zero or less: their change is a difference, not a ratio


@dataclass(frozen=True)
class Watch:
    """A signal, how it is watched, and which way it speaks: +1 for up."""

    signal: str
    form: str
    sign: int

    @property
    def family(self) -> str:
        return "rival" if self.signal.removeprefix("cheap/") in {*RIVALS, *CHEAP_RIVALS} else "kernel"

    @property
    def cheap(self) -> bool:
        return self.signal in COSTS

    def __str__(self) -> str:
        return f"{self.signal}, {self.form} {'up' if self.sign > 0 else 'down'}"


WATCHES = [
    Watch(signal, form, sign)
    for signal, form, sign in product(SIGNALS, ("level", "median", "change"), (1, -1))
]


@dataclass(frozen=True)
class Seen:
    """A run: what was seen of it, and when it collapsed, in epochs."""

    seed: int
    method: str
    steps_per_epoch: float
    collapse: float | None
    epochs: Sequence[float]
    signals: Sequence[Values]
    again: Sequence[Values] = ()

    def scores(self, watch: Watch) -> tuple[list[float], list[float]]:
        """(epochs, scores) from the first watched epoch on, where the signal was taken."""
        times, values = [], []
        taken: list[float] = []
        for epoch, line in zip(self.epochs, self.signals, strict=True):
            value = line.get(watch.signal)
            if value is None:
                continue
            taken.append(value)
            score: float | None = value
            if watch.form == "median":
                score = median(taken[-SMOOTHED:]) if len(taken) >= SMOOTHED else None
            if watch.form == "change":
                score = _change(taken, signed=watch.signal.removeprefix("cheap/") in SIGNED)
            if score is not None and epoch >= WATCHED_FROM:
                times.append(epoch)
                values.append(watch.sign * score)
        return times, values

    def alarm(self, chosen: Chosen) -> float | None:
        """The epoch of the first alarm."""
        times, values = self.scores(chosen.watch)
        limit = chosen.threshold
        below = next((place for place, value in enumerate(values) if value <= limit), len(values))
        return metrics.first_alarm(times[below:], values[below:], limit) if times[below:] else None

    def rise(self, watch: Watch) -> float | None:
        """What a level gained at the last look before the collapse, over its median until then."""
        assert self.collapse is not None
        before = [score for time, score in zip(*self.scores(watch), strict=True) if time < self.collapse]
        return before[-1] - median(before) if before else None

    def factors(self) -> Iterator[tuple[float, float, float]]:
        """(epoch, what the kernel leaves of the update share, what the losses' derivatives leave of that)."""
        for epoch, line in zip(self.epochs, self.signals, strict=True):
            if line.get("kernel_share", 0) > 0 and epoch >= WATCHED_FROM:
                yield epoch, line["kernel_share"], line["update_share"] / line["kernel_share"]

    def kernel_first(self) -> float | None:
        """At the last look before the collapse, the first factor minus the second."""
        assert self.collapse is not None
        before = [kernel - rest for epoch, kernel, rest in self.factors() if epoch < self.collapse]
        return before[-1] if before else None

    def lead(self, chosen: Chosen) -> float:
        """Steps from the alarm to the collapse; 0 where it is silent or late."""
        assert self.collapse is not None
        alarm = self.alarm(chosen)
        return 0.0 if alarm is None else self.steps_per_epoch * max(0.0, self.collapse - alarm)


def _change(taken: Sequence[float], *, signed: bool) -> float | None:
    before = taken[-1 - BEFORE : -1]
    if len(before) < BEFORE // 2:
        return None
    usual = median(before)
    if signed:
        return taken[-1] - usual
    return math.log(taken[-1] / usual) if taken[-1] > 0 and usual > 0 else None


def seen_runs(values: Iterable[Values]) -> list[Seen]:
    """The runs in the lines that learned something."""
    by_run: dict[str, list[Values]] = {}
    for line in values:
        by_run.setdefault(line["run"], []).append(line)
    found = []
    for lines in by_run.values():
        run = next(line for line in lines if line["what"] == "run")
        if run["best_robust_accuracy"] <= LEARNED:
            continue
        signals = [line for line in lines if line["what"] == "signals"]
        found.append(
            Seen(
                run["seed"],
                run["run"].split("-")[0],
                run["steps_per_epoch"],
                run.get("collapse"),
                [line["epoch"] for line in signals],
                signals,
                [line for line in lines if line["what"] == "again"],
            )
        )
    return found


@dataclass(frozen=True)
class Chosen:
    """A watch with its threshold, and what it was worth on the runs that set it: share of collapses that it
    spoke before, and its mean lead in steps."""

    watch: Watch
    threshold: float
    in_time: float = 0.0
    lead: float = 0.0


def choose(runs: Sequence[Seen]) -> list[Chosen]:
    """Every watch with its threshold, the best first; empty where no run is quiet or none collapses."""
    collapsing = [run for run in runs if run.collapse is not None]
    quiet = [run for run in runs if run.collapse is None]
    single_step = [run for run in quiet if run.method in SINGLE_STEP]
    found = []
    for watch in WATCHES:
        groups = [
            [scores for run in group if (scores := run.scores(watch)[1])] for group in (quiet, single_step)
        ]
        limits = [metrics.alarm_threshold(group, false_alarms=FALSE_ALARMS) for group in groups if group]
        if not limits or not collapsing:
            continue
        set_by = Chosen(watch, max(limits))
        leads = [run.lead(set_by) for run in collapsing]
        found.append(replace(set_by, in_time=fmean(lead > 0 for lead in leads), lead=fmean(leads)))
    return sorted(found, key=lambda one: (one.in_time, one.lead), reverse=True)


def even_and_odd(values: Sequence[Values]) -> tuple[list[Seen], dict[int, list[Seen]]]:
    """The runs of even seeds, and those of odd ones by seed."""
    runs = seen_runs(values)
    odd: dict[int, list[Seen]] = {}
    for run in runs:
        if run.seed % 2:
            odd.setdefault(run.seed, []).append(run)
    return [run for run in runs if run.seed % 2 == 0], odd


def watch_worth(one: Chosen, runs: Sequence[Seen]) -> dict[str, float]:
    """Share of the collapses it spoke before, mean lead in steps, share of quiet runs it spoke in, and the
    area under its ROC; those that the runs allow."""
    collapsing = [run for run in runs if run.collapse is not None]
    quiet = [run for run in runs if run.collapse is None]
    found: dict[str, float] = {}
    if collapsing:
        leads = [run.lead(one) for run in collapsing]
        found |= {"in_time": fmean(lead > 0 for lead in leads), "lead": fmean(leads)}
    if quiet:
        found["false_alarms"] = fmean(run.alarm(one) is not None for run in quiet)
    if collapsing and quiet:
        until = fmean(run.collapse for run in collapsing if run.collapse is not None)
        peaks = [_peaks(group, one.watch, until) for group in (collapsing, quiet)]
        if all(peaks):
            found["area"] = metrics.detection_area(*peaks)
    return found


def watch_noise(watch: Watch, runs: Sequence[Seen]) -> dict[str, float]:
    """The standard deviation of a level between sets of examples, and how often the rise before a collapse
    exceeds twice that."""
    pairs = []
    for run in runs:
        first = dict(zip(run.epochs, run.signals, strict=True))
        for line in run.again:
            a, b = line.get(watch.signal), first[line["epoch"]].get(watch.signal)
            if a is not None and b is not None and line["epoch"] >= WATCHED_FROM:
                pairs.append((a - b) ** 2 / 2)
    if not pairs:
        return {}
    noise = math.sqrt(fmean(pairs))
    rises = [rise for run in runs if run.collapse is not None and (rise := run.rise(watch)) is not None]
    clear = {"above_noise": fmean(rise > 2 * noise for rise in rises)} if rises else {}
    return {"noise": noise, **clear}


def _peaks(runs: Sequence[Seen], watch: Watch, quiet_until: float) -> list[float]:
    """The highest score of each run until its collapse; of the others as long, or they would peak higher."""
    found = []
    for run in runs:
        times, scores = run.scores(watch)
        until = quiet_until if run.collapse is None else run.collapse
        before = [score for time, score in zip(times, scores, strict=True) if time < until]
        if before:
            found.append(max(before))
    return found
