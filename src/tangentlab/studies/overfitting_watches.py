"""What a signal is worth as an alarm: watches, their thresholds from quiet runs, their leads on the others.

A run has collapsed where its robust accuracy fell by tangentlab.metrics.catastrophic_overfitting and once
stayed down for one and a half epochs. Its collapse is dated to the first such fall of half an epoch, which it
may have recovered from; leads to the first fall of all and to the one that lasted are told beside. It is
quiet where it never lost half of its best for half an epoch and ends with more than two thirds of it; what
lies between is neither, and is left out. So is what never learned.

A signal is watched as it is ("level"), as the median of its last three looks ("median") or against that of
more of them ("change"), upwards or downwards. It speaks where it comes to exceed its threshold: a collapsing
run that lies above from the start is not warned of, a quiet one that does is a false alarm. The threshold,
one for every eps, is the least that at most 5 % of the quiet runs exceed, and at most 5 % of the single-step
ones among them, or it would tell methods apart and not fates. Which watch is best is decided on the
collapsing runs; a signal whose rise before a collapse is seldom twice its noise between sets of examples is
none (of a pooled one the noise of its looks, averaged). Held against all is what needs no signal: to warn at
the first look of every run of a method at an eps where most of the other seeds' runs collapse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import fmean, median

from tangentlab import metrics
from tangentlab.probes.overfitting_alarm import POOLED
from tangentlab.studies.overfitting_signals import (
    CHEAP_RIVALS,
    COSTS,
    POOLED_UPDATES,
    RIVALS,
    SIGNALS,
    UPDATE_SIGNALS,
)
from tangentlab.studies.study import Values

SINGLE_STEP = ("fgsm", "fgsm_rs")  # that may collapse
ONE_STEP = (*SINGLE_STEP, "n_fgsm")
CONTROLS = ("pgd", "n_fgsm", "grad_align")  # that are said not to
TUNING_SEEDS = (0, 1, 2)  # eps, rates, the shipped threshold and how often it looks were chosen on
# Those that were looked at before the alarm's signal was chosen, of one tier or another.
SEEN_SEEDS = (*TUNING_SEEDS, 3, *range(20, 25))
WATCHED_FROM = 1.0  # epochs
SMOOTHED = 3  # looks whose median is watched
BEFORE = 8  # looks whose median a change is told from; four at least
FALSE_ALARMS = 0.05
THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(2, 20))  # that the shipped alarm is tried at
JUDGED = ("collapsed", "quiet")  # fates
# Robust accuracy of ten classes; what one look of few points says may be chance.
LEARNED = 0.15  # in the median of three looks
LEARNED_ONCE = 0.2
DATED_EPOCHS = 0.5  # below half of its best, from which a collapse is dated and a run not quiet
KEPT = 2 / 3  # of its best, with which a quiet run ends
UPDATE_SHARES = ("update_share", "kernel_share", "derivative_share")
LEAST_SHARE = 0.01  # of a PGD update, so that there is a logarithm
CLEAR = 2.0  # times the noise that a rise exceeds
SIGNED = (
    "fgsm_pgd_gap",
    "fgsm_pgd2_gap",
    "gradient_cosine",
    "update_cosine",
    "update_share",
    "kernel_share",
    "derivative_share",
    "pooled_update_share",
    "pooled_fgsm_pgd2_gap",
    "pooled_gradient_cosine",
    "validation_gap",
    "validation_accuracy",
)  # may be zero or less: their changes are differences; those of others are of their logarithms
# Of the run's own evaluations, PGD in ten steps on the validation split: what Wong et al. (2020) watch.
VALIDATION = ("validation_gap", "validation_accuracy")


@dataclass(frozen=True)
class Watch:
    """A signal, how it is watched, and which way it speaks: +1 for up."""

    signal: str
    form: str
    sign: int

    @property
    def family(self) -> str:
        name = self.signal.removeprefix("cheap/")
        if name in {*RIVALS, *CHEAP_RIVALS, *VALIDATION}:
            return "rival"
        return "update" if name in {*UPDATE_SIGNALS, *POOLED_UPDATES} else "kernel"

    @property
    def cheap(self) -> bool:
        return self.signal in COSTS

    def __str__(self) -> str:
        return f"{self.signal}, {self.form} {'up' if self.sign > 0 else 'down'}"


WATCHES = [
    Watch(signal, form, sign)
    for signal, form, sign in product((*SIGNALS, *VALIDATION), ("level", "median", "change"), (1, -1))
]


@dataclass
class Seen:
    """A run: what was seen of it, and when it collapsed, in epochs.

    ``fell`` and ``lost`` are when it first fell, and when it did for one and a half epochs. ``alarm_epochs``
    are those of the looks of its own alarm that could raise it, ``alarm_pooled`` the shares that they saw.
    """

    seed: int
    method: str
    eps: float
    steps_per_epoch: float
    collapse: float | None
    epochs: Sequence[float]
    signals: Sequence[Values]
    again: Sequence[Values] = ()
    alarm_epochs: Sequence[float] = ()
    alarm_pooled: Sequence[float] = ()
    fell: float | None = None
    lost: float | None = None
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
        return _warning(*self.scores(chosen.watch), chosen.threshold)

    def raised(self, threshold: float) -> bool:
        """Whether its own alarm would ever be raised."""
        return any(pooled < threshold for pooled in self.alarm_pooled)

    def warned(self, threshold: float) -> float | None:
        """The epoch of the first alarm of its own, at that threshold."""
        return _warning(self.alarm_epochs, [-pooled for pooled in self.alarm_pooled], -threshold)

    def rise(self, signal: str, sign: int) -> float | None:
        """What a signal gained at the last look before the collapse, over its median until then."""
        assert self.collapse is not None
        before = [
            value
            for epoch, line in zip(self.epochs, self.signals, strict=True)
            if WATCHED_FROM <= epoch < self.collapse and (value := _scaled(line, signal)) is not None
        ]
        return sign * (before[-1] - median(before)) if before else None

    def exceeds(self, chosen: Chosen) -> bool:
        """Whether it ever lies above the threshold."""
        return any(score > chosen.threshold for score in self.scores(chosen.watch)[1])

    def shares(self) -> Iterator[tuple[float, dict[str, float]]]:
        """(epoch, the update share, what the kernel alone leaves of it, what the losses' derivatives do)."""
        for epoch, line in zip(self.epochs, self.signals, strict=True):
            if epoch >= WATCHED_FROM and all(name in line for name in UPDATE_SHARES):
                yield epoch, {name: line[name] for name in UPDATE_SHARES}

    def kernel_part(self) -> float | None:
        """The kernel's part of the fall of the update share, from its median before the collapse to the first
        look after it, in logarithms: the mean of both orders in which the kernel and the losses' derivatives
        may be taken for those on PGD inputs. None where the share did not halve."""
        assert self.collapse is not None
        seen = [
            (epoch, [math.log(max(share, LEAST_SHARE)) for share in shares.values()])
            for epoch, shares in self.shares()
        ]
        before = [shares for epoch, shares in seen if epoch < self.collapse]
        after = next((shares for epoch, shares in seen if epoch >= self.collapse), None)
        if not before or after is None:
            return None
        usual = map(median, zip(*before, strict=True))
        share, kernel, derivatives = (was - now for was, now in zip(usual, after, strict=True))
        return (kernel + share - derivatives) / (2 * share) if share >= math.log(2) else None

    def lead(self, chosen: Chosen) -> float:
        """Steps from the alarm to the collapse; 0 where it is silent or late."""
        return self.steps_until(self.collapse, self.alarm(chosen))

    def steps_until(self, event: float | None, epoch: float | None) -> float:
        """From that epoch to the event of a run that collapses; 0 without an alarm, and after the event."""
        assert event is not None
        return 0.0 if epoch is None else self.steps_per_epoch * max(0.0, event - epoch)


def _warning(times: Sequence[float], scores: Sequence[float], limit: float) -> float | None:
    """The first time above the limit after one that was not."""
    below = next((place for place, score in enumerate(scores) if score <= limit), len(scores))
    return metrics.first_alarm(times[below:], scores[below:], limit) if times[below:] else None


def _change(taken: Sequence[float], *, signed: bool) -> float | None:
    before = taken[-1 - BEFORE : -1]
    if len(before) < BEFORE // 2:
        return None
    usual = median(before)
    if signed:
        return taken[-1] - usual
    return math.log(taken[-1] / usual) if taken[-1] > 0 and usual > 0 else None


def _scaled(line: Values, signal: str) -> float | None:
    """As it is compared: a positive signal's logarithm."""
    value: float | None = line.get(signal)
    if value is None or signal.removeprefix("cheap/") in SIGNED:
        return value
    return math.log(value) if value > 0 else None


def falls(run: Values, *, lasting: float) -> metrics.Collapse | None:
    """The first collapse that lasted as long, of a run's line."""
    return metrics.catastrophic_overfitting(
        run["epochs"], run["fgsm_accuracy"], run["robust_accuracy"], lasting=lasting
    )


def fate(run: Values) -> tuple[str, float | None]:
    """collapsed, and when; quiet; neither; or unlearned, of a run's line."""
    robust = run["robust_accuracy"]
    best = max(robust[1:])
    steadily = max(map(median, zip(*(robust[k:] for k in range(SMOOTHED)), strict=False)), default=0.0)
    if best < LEARNED_ONCE and steadily < LEARNED:
        return "unlearned", None
    if falls(run, lasting=metrics.LASTING_EPOCHS) is not None:
        dated = falls(run, lasting=DATED_EPOCHS)
        assert dated is not None
        return "collapsed", dated.epoch
    # Whatever FGSM accuracy did.
    halved = falls({**run, "fgsm_accuracy": [1.0] * len(robust)}, lasting=DATED_EPOCHS) is not None
    kept = median(robust[-SMOOTHED:]) > KEPT * best
    return "quiet" if kept and not halved else "neither", None


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
        evaluated = {
            epoch: dict(zip(VALIDATION, (one_step - robust, robust), strict=True))
            for epoch, one_step, robust in zip(
                run["epochs"], run["fgsm_accuracy"], run["robust_accuracy"], strict=True
            )
        }
        signals = [
            {**line, **evaluated.get(line["epoch"], {})} for line in lines if line["what"] == "signals"
        ]
        first, lasting = (falls(run, lasting=time) for time in (0.0, metrics.LASTING_EPOCHS))
        found.append(
            Seen(
                seed=run["seed"],
                method=run["run"].split("-")[0],
                eps=run["eps"],
                steps_per_epoch=run["steps_per_epoch"],
                collapse=collapse,
                epochs=[line["epoch"] for line in signals],
                signals=signals,
                again=[line for line in lines if line["what"] == "again"],
                alarm_epochs=run["alarm_epochs"],
                alarm_pooled=run["alarm_pooled"],
                fell=None if first is None else first.epoch,
                lost=None if lasting is None else lasting.epoch,
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
        if watch_noise(watch, runs).get("above_noise", 1.0) < 0.5:
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
    return _worth(runs, lambda run: run.alarm(one), lambda run: run.exceeds(one))


def alarm_worth(threshold: float, runs: Sequence[Seen]) -> dict[str, float]:
    """Likewise, of the alarm that the runs train under, at that threshold."""
    return _worth(runs, lambda run: run.warned(threshold), lambda run: run.raised(threshold))


def cells_worth(runs: Sequence[Seen], others: Sequence[Seen]) -> dict[str, float]:
    """Likewise, of what knows the method and eps alone: it speaks at the first look where most of the other
    seeds' runs collapse."""

    def speaks(run: Seen) -> bool:
        alike = [other.collapse is not None for other in others if _cell(other) == _cell(run)]
        return sum(alike) > len(alike) / 2

    def alarm(run: Seen) -> float | None:
        watched = (epoch for epoch in run.epochs if epoch >= WATCHED_FROM)
        return next(watched, None) if speaks(run) else None

    return _worth(runs, alarm, speaks)


def _cell(run: Seen) -> tuple[str, float]:
    return run.method, run.eps


def _worth(
    runs: Sequence[Seen], alarm: Callable[[Seen], float | None], speaks: Callable[[Seen], bool]
) -> dict[str, float]:
    collapsing = [run for run in runs if run.collapse is not None]
    quiet = [run for run in runs if run.collapse is None]
    found: dict[str, float] = {}
    if collapsing:
        events = {"": "collapse", "_of_the_first_fall": "fell", "_of_the_lasting_fall": "lost"}
        alarms = [(run, alarm(run)) for run in collapsing]
        for name, event in events.items():
            leads = [run.steps_until(getattr(run, event), epoch) for run, epoch in alarms]
            found |= {f"in_time{name}": fmean(lead > 0 for lead in leads), f"lead{name}": fmean(leads)}
    if quiet:
        found["false_alarms"] = fmean(speaks(run) for run in quiet)
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
    """The standard deviation of a signal between sets of examples, before any collapse, and how often the
    rise before a collapse exceeds twice that. A pooled signal's is that of its looks, averaged."""
    name = watch.signal.removeprefix("cheap/pooled_")
    pooled = name != watch.signal
    single = f"cheap/{name}" if pooled else watch.signal
    pairs = []
    for run in runs:
        first = dict(zip(run.epochs, run.signals, strict=True))
        for line in run.again:
            epoch = line["epoch"]
            a, b = _scaled(line, single), _scaled(first[epoch], single)
            before = run.collapse is None or epoch < run.collapse
            if a is not None and b is not None and epoch >= WATCHED_FROM and before:
                pairs.append((a - b) ** 2 / 2)
    if not pairs:
        return {}
    noise = math.sqrt(fmean(pairs) / (POOLED if pooled else 1))
    rises = [
        rise
        for run in runs
        if run.collapse is not None and (rise := run.rise(watch.signal, watch.sign)) is not None
    ]
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
