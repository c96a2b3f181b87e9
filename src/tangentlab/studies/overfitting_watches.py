"""What a signal is worth as an alarm: watches, their thresholds from quiet runs, their leads on the others.

A run has collapsed where its robust accuracy fell by tangentlab.metrics.catastrophic_overfitting and stayed
down for one and a half epochs; what it recovered from before is none. It is quiet where it never lost half of
its best; what lies between is neither, and is left out. So is what never learned.

A signal is watched as it is ("level"), as the median of its last three looks ("median") or against that of
more of them ("change"), upwards or downwards. It speaks where it comes to exceed its threshold: a collapsing
run that lies above from the start is not warned of, a quiet one that does is a false alarm. The threshold,
one for every eps, is the least that at most 5 % of the quiet runs exceed, and at most 5 % of the single-step
ones among them, or it would tell methods apart and not fates. Which watch is best is decided on the
collapsing runs; a signal whose rise before a collapse is seldom twice its noise between sets of examples is
none (pooled ones, of three sets each, are not taken again).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from statistics import fmean, median

from tangentlab import metrics
from tangentlab.studies.overfitting_signals import CHEAP_RIVALS, COSTS, RIVALS, SIGNALS
from tangentlab.studies.study import Values

SINGLE_STEP = ("fgsm", "fgsm_rs")  # that may collapse
ONE_STEP = (*SINGLE_STEP, "n_fgsm")
TUNING_SEEDS = (0, 1, 2)  # eps, rates, the shipped threshold and how often it looks were chosen on
WATCHED_FROM = 1.0  # epochs
SMOOTHED = 3  # looks whose median is watched
BEFORE = 8  # looks whose median a change is told from; four at least
FALSE_ALARMS = 0.05
JUDGED = ("collapsed", "quiet")  # fates
LEARNED = 0.15  # robust accuracy, of ten classes
HALVED = 0.5
CLEAR = 2.0  # times the noise that a rise exceeds
SIGNED = (
    "fgsm_pgd_gap",
    "fgsm_pgd2_gap",
    "gradient_cosine",
    "update_cosine",
    "update_share",
    "kernel_share",
    "pooled_share",
    "pooled_fgsm_pgd2_gap",
    "pooled_gradient_cosine",
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


@dataclass
class Seen:
    """A run: what was seen of it, and when it collapsed, in epochs.

    ``raised_at`` is the epoch at which the run's own alarm was first raised, ``warned_at`` that at which it
    was after a look that could have raised it and did not.
    """

    seed: int
    method: str
    steps_per_epoch: float
    collapse: float | None
    epochs: Sequence[float]
    signals: Sequence[Values]
    again: Sequence[Values] = ()
    raised_at: float | None = None
    warned_at: float | None = None
    _scores: dict[Watch, tuple[list[float], list[float]]] = field(default_factory=dict)

    def scores(self, watch: Watch) -> tuple[list[float], list[float]]:
        """(epochs, scores) from the first watched epoch on, where the signal was taken."""
        if watch not in self._scores:
            self._scores[watch] = self._watched(watch)
        return self._scores[watch]

    def _watched(self, watch: Watch) -> tuple[list[float], list[float]]:
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

    def exceeds(self, chosen: Chosen) -> bool:
        """Whether it ever lies above the threshold."""
        return any(score > chosen.threshold for score in self.scores(chosen.watch)[1])

    def factors(self) -> Iterator[tuple[float, float, float | None]]:
        """(epoch, what the kernel leaves of the update share, what the losses' derivatives leave of that):
        without the latter where the kernel leaves nothing."""
        for epoch, line in zip(self.epochs, self.signals, strict=True):
            if "kernel_share" in line and epoch >= WATCHED_FROM:
                kernel = line["kernel_share"]
                yield epoch, kernel, line["update_share"] / kernel if kernel > 0 else None

    def kernel_first(self) -> bool | None:
        """Whether the first factor was the first to fall below half, the smaller one where both did at one
        look; None where neither did until the collapse. What never was above half has not fallen."""
        assert self.collapse is not None
        was_above = [False, False]
        for epoch, kernel, rest in self.factors():
            here = [kernel, math.inf if rest is None else rest]  # no kernel is left: it went
            fell = [was and share < HALVED for was, share in zip(was_above, here, strict=True)]
            if epoch < self.collapse and any(fell):
                return fell[0] and not (fell[1] and here[1] < here[0])
            was_above = [was or share >= HALVED for was, share in zip(was_above, here, strict=True)]
        return None

    def lead(self, chosen: Chosen) -> float:
        """Steps from the alarm to the collapse; 0 where it is silent or late."""
        return self.steps_until_collapse(self.alarm(chosen))

    def steps_until_collapse(self, epoch: float | None) -> float:
        """From that epoch on; 0 without one, and after it."""
        assert self.collapse is not None
        return 0.0 if epoch is None else self.steps_per_epoch * max(0.0, self.collapse - epoch)


def _change(taken: Sequence[float], *, signed: bool) -> float | None:
    before = taken[-1 - BEFORE : -1]
    if len(before) < BEFORE // 2:
        return None
    usual = median(before)
    if signed:
        return taken[-1] - usual
    return math.log(taken[-1] / usual) if taken[-1] > 0 and usual > 0 else None


def fate(run: Values) -> tuple[str, float | None]:
    """collapsed, and when; quiet; neither; or unlearned, of a run's line."""
    epochs, robust = run["epochs"], run["robust_accuracy"]
    if max(robust[1:]) < LEARNED:
        return "unlearned", None
    lasting = metrics.catastrophic_overfitting(
        epochs, run["fgsm_accuracy"], robust, lasting=metrics.LASTING_EPOCHS
    )
    if lasting is not None:
        return "collapsed", lasting.epoch
    halved = any(
        best >= LEARNED and now <= metrics.COLLAPSE_SHARE * best
        for best, now in zip(accumulate(robust, max), robust, strict=True)
    )
    return "neither" if halved else "quiet", None


def seen_runs(values: Iterable[Values]) -> list[Seen]:
    """The runs in the lines that collapsed or stayed quiet."""
    by_run: dict[str, list[Values]] = {}
    for line in values:
        by_run.setdefault(line["run"], []).append(line)
    found = []
    for lines in by_run.values():
        run = next(line for line in lines if line["what"] == "run")
        name, collapse = fate(run)
        if name not in JUDGED:
            continue
        signals = [line for line in lines if line["what"] == "signals"]
        found.append(
            Seen(
                run["seed"],
                run["run"].split("-")[0],
                run["steps_per_epoch"],
                collapse,
                [line["epoch"] for line in signals],
                signals,
                [line for line in lines if line["what"] == "again"],
                run.get("raised_at"),
                run.get("warned_at"),
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
    """Every watch whose signal rises above its noise with its threshold, the best first; empty where no run
    of one step is quiet or none collapses."""
    collapsing = [run for run in runs if run.collapse is not None]
    quiet = [run for run in runs if run.collapse is None]
    one_step = [run for run in quiet if run.method in ONE_STEP]
    found = []
    for watch in WATCHES:
        groups = [
            [scores for run in group if (scores := run.scores(watch)[1])] for group in (quiet, one_step)
        ]
        if not all(groups) or not collapsing:
            continue
        limits = [metrics.alarm_threshold(group, false_alarms=FALSE_ALARMS) for group in groups]
        if watch_noise(replace(watch, form="level"), runs).get("above_noise", 1.0) < 0.5:
            continue
        set_by = Chosen(watch, max(limits))
        leads = [run.lead(set_by) for run in collapsing]
        found.append(replace(set_by, in_time=fmean(lead > 0 for lead in leads), lead=fmean(leads)))
    return sorted(found, key=lambda one: (one.in_time, one.lead), reverse=True)


def folds(values: Sequence[Values]) -> Iterator[tuple[int, list[Seen], list[Chosen]]]:
    """(seed, its runs, the watches as the other seeds choose them)."""
    runs = seen_runs(values)
    for seed in sorted({run.seed for run in runs}):
        yield (
            seed,
            [run for run in runs if run.seed == seed],
            choose([run for run in runs if run.seed != seed]),
        )


def watch_worth(one: Chosen, runs: Sequence[Seen]) -> dict[str, float]:
    """Share of the collapses it spoke before, mean lead in steps, share of quiet runs it spoke in; those
    that the runs allow."""
    leads = [run.lead(one) for run in runs if run.collapse is not None]
    alarms = [run.exceeds(one) for run in runs if run.collapse is None]
    found: dict[str, float] = {}
    if leads:
        found |= {"in_time": fmean(lead > 0 for lead in leads), "lead": fmean(leads)}
    if alarms:
        found["false_alarms"] = fmean(alarms)
    return found


def detection(watch: Watch, runs: Sequence[Seen]) -> tuple[float, list[tuple[float, float]]] | None:
    """The area under the ROC of the runs' highest scores until a collapse, and its points: (share of the
    quiet runs, share of the collapsing ones) above each score. Quiet runs are watched as long as the others
    on average, or they would peak higher."""
    collapses = [run.collapse for run in runs if run.collapse is not None]
    if not collapses:
        return None
    until = fmean(collapses)
    events = _peaks([run for run in runs if run.collapse is not None], watch, until)
    others = _peaks([run for run in runs if run.collapse is None], watch, until)
    if not events or not others:
        return None

    def above(score: float, peaks: Sequence[float]) -> float:
        return fmean(peak >= score for peak in peaks)

    scores = sorted({*events, *others}, reverse=True)
    points = [(above(score, others), above(score, events)) for score in scores]
    return metrics.detection_area(events, others), points


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
    clear = {"above_noise": fmean(rise > CLEAR * noise for rise in rises)} if rises else {}
    return {"noise": noise, **clear}


def _peaks(runs: Sequence[Seen], watch: Watch, quiet_until: float) -> list[float]:
    """The highest score of each run until its collapse; of the others as long, or they would peak higher. A
    collapse that no look came before was missed."""
    found = []
    for run in runs:
        times, scores = run.scores(watch)
        until = quiet_until if run.collapse is None else run.collapse
        before = [score for time, score in zip(times, scores, strict=True) if time < until]
        if before or run.collapse is not None:
            found.append(max(before, default=-math.inf))
    return found
