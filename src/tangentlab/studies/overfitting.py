"""Catastrophic overfitting: which signal speaks before it, the kernel's or another, how often for nothing.

Asked: arXiv 2312.02236 explains the collapse of single-step training by the kernel's spectrum. FGSM and
FGSM-RS training over eps collapse or do not; PGD, N-FGSM and GradAlign training are the controls. At every
second kept checkpoint, an epoch apart, the kernel's signals are taken (spectrum and distances of the class
kernels on clean, FGSM and PGD inputs) and the rivals' (tangentlab.probes.linearity_signals), on the same 64
examples; and at every one, named "cheap/...", those of as many examples as BUDGET forward passes pay for,
with PGD in two steps of eps/2 and kernels of one signed sum of the logits, which are the trace kernel in the
mean over signs. Of the kernel between FGSM and PGD inputs there is also what the losses' derivatives make of
it (tangentlab.probes.update_signals), in two factors: what the kernel alone leaves of the share, and what the
derivatives leave of that. And the shipped alarm's share, which pools three looks at other
examples each.

A signal is watched as it is ("level"), as the median of its last three looks ("median") or against that of
more of them ("change"), upwards or downwards. It speaks where it comes to exceed its threshold: a run that
lies above from the start is not warned of. The threshold, one for every eps, is the least that at most 5 % of
the quiet runs of the even seeds exceed, and at most 5 % of the single-step ones among them, or it would tell
methods apart and not fates; which signal is best is decided on the collapsing runs of the even seeds; the
verdicts are on the odd seeds alone. The first epoch is not watched, and runs that never learned are left out.
A collapse is that of tangentlab.metrics.catastrophic_overfitting, by PGD-10 on the validation split: an alarm
is in time if it speaks before PGD accuracy has lost half of its best.

The lines of values.jsonl, by ``what``: "run", its collapse if any; "signals" of a checkpoint; "again", the
same on other examples, now and then: a signal's noise. What each signal is worth is derived from them
(study.json, "derived"). Hardware and time: a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab import data, metrics, modes, randomness
from tangentlab.attacks import FGSM, PGD, Attack
from tangentlab.attacks.threat import cross_entropies, uniform_start
from tangentlab.errors import KernelError
from tangentlab.kernels import ntk
from tangentlab.probes import (
    KernelProbe,
    OverfittingAlarm,
    SignedSum,
    fgsm_pgd_gap,
    gradient_signals,
    linearity_error,
    linearity_signals,
    update_signals,
)
from tangentlab.probes.overfitting_alarm import POOLED, THRESHOLD
from tangentlab.records import read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig, load_config
from tangentlab.runs.build import build_attack, build_data, build_model
from tangentlab.runs.evaluation import kept_checkpoints
from tangentlab.studies.claims import PAPER, Claim, Verdict, judge
from tangentlab.studies.study import Study, Values
from tangentlab.training import load_weights

SINGLE_STEP = ("fgsm", "fgsm_rs")


@dataclass(frozen=True)
class Tier:
    """What a tier trains.

    Args:
        config: a shipped configuration.
        words: overrides of it.
        eps: radii that every method trains at.
    """

    config: str
    words: str
    eps: tuple[float, ...]
    controls: tuple[str, ...] = ("pgd", "n_fgsm", "grad_align")
    collapsing: tuple[str, ...] = SINGLE_STEP


_COMMON = (
    "--probe.size=0 --threads=1 --training.keep_every=0.5 --evaluation.every=0.5 --evaluation.num_steps=10 "
    "--evaluation.test_num_steps=10 --evaluation.test_size=200"
)
TIERS = {
    0: Tier("digits", "", (0.2, 0.28, 0.34)),
    1: Tier(
        "fashion-mnist",
        "--training.epochs=10 --training.batch_size=64 --training.schedule=constant --channels_last=true",
        (0.1, 0.15, 0.2),
    ),
    2: Tier("cifar10-narrow", "--training.epochs=15", (16 / 255,), ("pgd",), ("fgsm",)),
}
PROBED = 64  # class-balanced training examples
FULL = 2  # looks between those that are not only cheap
AGAIN = 8  # looks between those on other examples
AFTERWARDS = 3  # epochs that are looked at after a collapse
BUDGET = 250  # forward passes of a cheap look: at eight looks an epoch 2 % of FGSM training on 20,000 images
WATCHED_FROM = 1.0  # epochs
SMOOTHED = 3  # looks whose median is watched
BEFORE = 8  # looks whose median a change is told from; four at least
FALSE_ALARMS = 0.05
LEARNED = 0.15  # robust accuracy, of ten classes
# Epochs to a collapse, for figures: above so many.
WHEN = {"over 8 before": 8, "4 to 8": 4, "2 to 4": 2, "1 to 2": 1, "the last": 0}
AFTER = "after"

INPUTS = ("clean", "fgsm", "pgd")
PAIRS = ("clean~fgsm", "clean~pgd", "fgsm~pgd")
SPECTRUM = ("entropy_rank", "participation_ratio", "intrinsic_dimension", "top_mass", "top_eigenvalue")
RIVALS = (
    "fgsm_pgd_gap",
    "loss_ratio",
    "gradient_cosine",
    "linearity_error",
    "gradient_norm",
    "input_entropy_rank",
    "input_top_mass",
)
UPDATES = ("update_share", "update_cosine")
KERNEL = (
    *UPDATES,
    "kernel_share",
    *(f"{inputs}/{name}" for inputs, name in product(INPUTS, SPECTRUM)),
    *(f"{pair}/{kind}/distance" for pair, kind in product(PAIRS, ("class", "trace"))),
)
# Of a cheap look: forward equivalents an example.
CRAFTING = {"clean": 0, "noise": 0, "fgsm": 2, "pgd": 4}
GRADIENT = 3  # forward, and backward to the parameters
CHEAP_SPECTRUM = {inputs: CRAFTING[inputs] + GRADIENT for inputs in ("clean", "fgsm")}
CHEAP_PAIRS = {
    f"{a}~{b}": CRAFTING[a] + CRAFTING[b] + 2 * GRADIENT
    for a, b in (("clean", "noise"), ("clean", "fgsm"), ("noise", "fgsm"), ("clean", "pgd"), ("fgsm", "pgd"))
}
POOLED_SHARE, POOLED_RATIO = "pooled_share", "pooled_loss_ratio"  # of three looks at other examples each
CHEAP_UPDATES = dict.fromkeys(UPDATES, CHEAP_PAIRS["fgsm~pgd"])
CHEAP_RIVALS = {
    "fgsm_pgd_gap": 24,
    "fgsm_pgd2_gap": 8,
    "loss_ratio": 8,
    POOLED_RATIO: 8,
    "gradient_cosine": 4,
    "linearity_error": 3,
    "gradient_norm": 2,
    "input_entropy_rank": 2,
    "input_top_mass": 2,
}
COSTS = {
    **{f"cheap/{inputs}/{name}": cost for (inputs, cost) in CHEAP_SPECTRUM.items() for name in SPECTRUM},
    **{f"cheap/{pair}": cost for pair, cost in (CHEAP_PAIRS | CHEAP_UPDATES).items()},
    f"cheap/{POOLED_SHARE}": CHEAP_PAIRS["fgsm~pgd"],
    **{f"cheap/{name}": cost for name, cost in CHEAP_RIVALS.items()},
}
SIGNALS = (*KERNEL, *RIVALS, *COSTS)
SIGNED = (
    "fgsm_pgd_gap",
    "fgsm_pgd2_gap",
    "gradient_cosine",
    "update_cosine",
    "update_share",
    "kernel_share",
)  # may be zero or less: their change is a difference, not a ratio

# --- runs ------------------------------------------------------------------------------------------------


def runs(tier: int, seeds: Sequence[int]) -> dict[str, RunConfig]:
    """METHOD-EPS-SEED -> configuration."""
    chosen = TIERS[tier]
    found = {}
    for method, eps in product((*chosen.collapsing, *chosen.controls), chosen.eps):
        name = f"{method}-{eps:.3g}"
        words = f"{_COMMON} {chosen.words} --eps={eps} --method={method} --name={name}"
        # As the demo: crafting leaves BatchNorm's buffers alone.
        words += " --method.buffer_updates=[loss]"
        for seed in seeds:
            found[f"{name}-{seed}"] = load_config(chosen.config, [*words.split(), f"--seed={seed}"])
    return found


# --- measurements ----------------------------------------------------------------------------------------


def measure(folder: Path, config: RunConfig) -> Iterator[Values]:
    """A line of the run and one of each kept checkpoint."""
    record = read_run(folder)
    epochs, robust = record.series("robust_accuracy")
    fgsm = record.series("fgsm_accuracy")[1]
    collapse = metrics.catastrophic_overfitting(epochs, fgsm, robust)
    step, epoch = record.metrics[-1]["step"], record.metrics[-1]["epoch"]
    yield {
        "what": "run",
        "eps": config.eps,
        "best_robust_accuracy": max(robust[1:]),
        "last_robust_accuracy": robust[-1],
        "last_fgsm_accuracy": fgsm[-1],
        "steps_per_epoch": step / epoch,
        "collapse": None if collapse is None else collapse.epoch,
    }
    examples = build_data(config)
    model = build_model(config, examples, torch.device("cpu"))
    size = max(PROBED, *(BUDGET // cost for cost in COSTS.values()))
    # Disjoint; the first PROBED of either have equally many of each class.
    sets = data.class_balanced(examples.train.labels, 2 * size, seed=config.seed).split(size)
    first, second = ((examples.train.x(index), examples.train.labels[index]) for index in sets)
    pooled = _Pooled(*first, config)
    for look, (number, path) in enumerate(kept_checkpoints(folder).items()):
        at = load_weights(path, model)["extra"]["epoch"]
        if collapse is not None and at > collapse.epoch + AFTERWARDS:
            break
        for what, points in {"signals": first, **({} if look % AGAIN else {"again": second})}.items():
            seen = _cheap_signals(model, *points, config)
            seen |= pooled.look(model, number) if what == "signals" else {}
            seen |= {} if look % FULL else _signals(model, *points, config)
            rounded = {name: float(f"{value:.4g}") for name, value in seen.items()}
            yield {"what": what, "eps": config.eps, "step": number, "epoch": at, **rounded}


class _Pooled:
    """The shipped alarm's share, and the losses' ratio pooled in the same way."""

    def __init__(self, x: Tensor, y: Tensor, config: RunConfig) -> None:
        n = POOLED * (BUDGET // COSTS[f"cheap/{POOLED_SHARE}"])
        self.alarm = OverfittingAlarm(x[:n], y[:n], eps=config.eps)
        n = POOLED * (BUDGET // CHEAP_RIVALS[POOLED_RATIO])
        self.parts = list(zip(x[:n].tensor_split(POOLED), y[:n].tensor_split(POOLED), strict=True))
        self.losses: list[tuple[float, float]] = []
        self.config = config

    def look(self, model: nn.Module, step: int) -> dict[str, float]:
        self.alarm.update(model, step)
        points = self.parts[(len(self.alarm.looks) - 1) % POOLED]
        inputs = _inputs(model, *points, self.config)
        self.losses = [*self.losses, _losses(model, inputs["fgsm"], inputs["pgd"], points[1])][-POOLED:]
        found = {}
        if (share := self.alarm.looks[-1].pooled) is not None:
            found[f"cheap/{POOLED_SHARE}"] = share
        if len(self.losses) == POOLED:
            of_one, of_several = map(sum, zip(*self.losses, strict=True))
            found[f"cheap/{POOLED_RATIO}"] = of_several / of_one
        return found


def _signals(model: nn.Module, x: Tensor, y: Tensor, config: RunConfig) -> dict[str, float]:
    """Those on PROBED examples, by name."""
    x, y = x[:PROBED], y[:PROBED]
    attacks: dict[str, Attack] = {"fgsm": FGSM(config.eps), "pgd": build_attack(config, num_steps=10)}
    probe = KernelProbe(x, y, inputs={"clean": None, **attacks}, seed=config.seed)
    seen = linearity_signals(model, x, y, eps=config.eps, seed=config.seed)
    with modes.evaluation(model):
        noise = randomness.generator(config.seed, "full")
        one_step, several = (attack(model, x, y, generator=noise) for attack in attacks.values())
    of_one, of_several = _losses(model, one_step, several, y)
    seen["loss_ratio"] = of_several / of_one
    seen |= update_signals(model, one_step, several, y)
    with suppress(KernelError):  # a network that has died has no kernel: its other signals remain
        seen |= _of_kernels(probe.measure(model, 0).values)
    return seen


def _cheap_signals(model: nn.Module, x: Tensor, y: Tensor, config: RunConfig) -> dict[str, float]:
    """Those of BUDGET passes each, by name."""
    eps, seed = config.eps, config.seed

    def few(name: str) -> tuple[Tensor, Tensor]:
        n = BUDGET // CHEAP_RIVALS[name]
        return x[:n], y[:n]

    seen = {
        **gradient_signals(model, *few("gradient_norm"), eps=eps, seed=seed),
        "fgsm_pgd_gap": fgsm_pgd_gap(model, *few("fgsm_pgd_gap"), eps=eps, seed=seed),
        "fgsm_pgd2_gap": fgsm_pgd_gap(model, *few("fgsm_pgd2_gap"), eps=eps, num_steps=2, seed=seed),
        "linearity_error": linearity_error(model, *few("linearity_error"), eps=eps, seed=seed),
    }
    of_fewer = gradient_signals(model, *few("gradient_cosine"), eps=eps, seed=seed)
    seen["gradient_cosine"] = of_fewer["gradient_cosine"]
    points = _inputs(model, *few("gradient_norm"), config)
    n = BUDGET // CHEAP_RIVALS["loss_ratio"]
    of_one, of_several = _losses(model, points["fgsm"][:n], points["pgd"][:n], y[:n])
    seen["loss_ratio"] = of_several / of_one
    with suppress(KernelError):
        seen |= _of_cheap_kernels(model, points, config)
    n = BUDGET // CHEAP_UPDATES["update_share"]
    updates = update_signals(model, points["fgsm"][:n], points["pgd"][:n], y[:n])
    seen |= {name: updates[name] for name in UPDATES if name in updates}
    return {f"cheap/{name}": value for name, value in seen.items()}


def _inputs(model: nn.Module, x: Tensor, y: Tensor, config: RunConfig) -> dict[str, Tensor]:
    noise = randomness.generator(config.seed, "cheap")
    with modes.evaluation(model):
        return {
            "clean": x,
            "noise": uniform_start(x, config.eps, noise),
            "fgsm": FGSM(config.eps)(model, x, y),
            "pgd": PGD(config.eps, config.eps / 2, 2, random_start=False)(model, x, y),
        }


def _losses(model: nn.Module, one_step: Tensor, several: Tensor, y: Tensor) -> tuple[float, float]:
    """The mean loss on FGSM inputs, and on PGD inputs."""
    with modes.evaluation(model), torch.no_grad():
        of_one, of_several = (float(cross_entropies(model(x), y=y).mean()) for x in (one_step, several))
    return of_one, of_several


def _of_cheap_kernels(model: nn.Module, points: Mapping[str, Tensor], config: RunConfig) -> dict[str, float]:
    """Distances and spectra, of a prefix of the examples each."""
    signed = SignedSum(model, seed=config.seed)
    most = BUDGET // GRADIENT
    kernels = {name: ntk(signed, inputs[:most]).double() for name, inputs in points.items()}
    found: dict[str, float] = {}
    for inputs, cost in CHEAP_SPECTRUM.items():
        spectrum = metrics.spectrum(kernels[inputs][: BUDGET // cost, : BUDGET // cost])
        values = {
            "entropy_rank": spectrum.entropy_rank,
            "participation_ratio": spectrum.participation_ratio,
            "intrinsic_dimension": spectrum.intrinsic_dimension,
            "top_mass": spectrum.top_mass(min(10, BUDGET // cost)),
            "top_eigenvalue": spectrum.values[0],
        }
        found |= {f"{inputs}/{name}": float(values[name]) for name in SPECTRUM}
    for pair, cost in CHEAP_PAIRS.items():
        a, b = (kernels[name][: BUDGET // cost, : BUDGET // cost] for name in pair.split("~"))
        found[pair] = float(metrics.kernel_distance(a, b))
    return found


def _of_kernels(values: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for inputs, name in product(INPUTS, SPECTRUM):
        at = f"kernel/{inputs}/class"
        value = values[f"{at}/top_eigenvalues"][0] if name == "top_eigenvalue" else values[f"{at}/{name}"]
        found[f"{inputs}/{name}"] = value
    for pair, kind in product(PAIRS, ("class", "trace")):
        found[f"{pair}/{kind}/distance"] = values[f"kernel/{pair}/{kind}/distance"]
    return found


# --- what a signal is worth ------------------------------------------------------------------------------


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


def _split(values: Sequence[Values]) -> tuple[list[Seen], dict[int, list[Seen]]]:
    """The runs of even seeds, and those of odd ones by seed."""
    runs = seen_runs(values)
    odd: dict[int, list[Seen]] = {}
    for run in runs:
        if run.seed % 2:
            odd.setdefault(run.seed, []).append(run)
    return [run for run in runs if run.seed % 2 == 0], odd


def derive(values: Sequence[Values]) -> Iterator[Values]:
    """For each watch and odd seed: share of collapses it spoke before, lead, false alarms; of a level
    what it rises by over its noise between sets of examples too. And the share's factors about a collapse."""
    for run in seen_runs(values):
        if run.collapse is None:
            continue
        for epoch, kernel, rest in run.factors():
            when = next((name for name, least in WHEN.items() if run.collapse - epoch > least), AFTER)
            line = {"update_share": kernel * rest, "kernel_share": kernel, "derivative_share": rest}
            yield {"what": "factors", "seed": run.seed, "method": run.method, "when": when, **line}
    even, odd = _split(values)
    for one in choose(even):
        for seed, runs in odd.items():
            worth = _worth(one, runs)
            noise = _noise(one.watch, runs) if one.watch.form == "level" else {}
            yield {
                "what": "watch",
                "signal": one.watch.signal,
                "watch": str(one.watch),
                "family": one.watch.family,
                "seed": seed,
                "chosen_in_time": one.in_time,
                "threshold": one.threshold,
                "cost": "cheap" if one.watch.cheap else "any",
                **worth,
                **noise,
            }


def _worth(one: Chosen, runs: Sequence[Seen]) -> dict[str, float]:
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


def _noise(watch: Watch, runs: Sequence[Seen]) -> dict[str, float]:
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


# --- claims ----------------------------------------------------------------------------------------------

IN_TIME = Claim(
    "overfitting/in-time",
    "The kernel's best signal, chosen on other seeds, speaks before PGD accuracy has lost half of its best "
    "in more than 90 % of the runs that collapse.",
    "share of a seed's collapsing runs",
    0.9,
    source=f"{PAPER}, with a figure of ours",
)
QUIET = Claim(
    "overfitting/false-alarms",
    "That signal speaks in less than 10 % of the runs that never collapse.",
    "share of a seed's quiet runs",
    0.1,
    above=False,
)
EARLIER = Claim(
    "overfitting/earlier",
    "It speaks earlier than the best rival, chosen likewise.",
    "difference of the mean leads, steps; silence is a lead of 0",
    0.0,
)
CHEAP_IN_TIME = Claim(
    "overfitting/cheap-in-time",
    f"At {BUDGET} passes a look the kernel's best signal speaks in time in more than 90 % of the runs that "
    "collapse.",
    "share of a seed's collapsing runs",
    0.9,
)
CHEAP_QUIET = Claim(
    "overfitting/cheap-false-alarms",
    "That signal speaks in less than 10 % of the runs that never collapse.",
    "share of a seed's quiet runs",
    0.1,
    above=False,
)
CHEAP_EARLIER = Claim(
    "overfitting/cheap-earlier",
    f"At {BUDGET} passes a look the kernel's best signal speaks earlier than the best rival.",
    "difference of the mean leads, steps; silence is a lead of 0",
    0.0,
)
DEPLOYED = Claim(
    "overfitting/deployed",
    "The alarm as it is shipped speaks before PGD accuracy has lost half of its best in more than 90 % of "
    "the runs that collapse.",
    "share of a seed's collapsing runs",
    0.9,
)
DEPLOYED_QUIET = Claim(
    "overfitting/deployed-false-alarms",
    "The alarm as it is shipped speaks in less than 5 % of the runs that never collapse.",
    "share of a seed's quiet runs",
    0.05,
    above=False,
)
SPECTRUM_ALONE = Claim(
    "overfitting/spectrum",
    "The spectrum of the kernel on clean inputs is enough: its best signal speaks in time in more than half "
    "of the runs that collapse.",
    "share of a seed's collapsing runs",
    0.5,
    source=f"{PAPER}, as we read it",
)
KERNEL_FIRST = Claim(
    "overfitting/kernel-first",
    "Of the update share the kernel's factor goes first: at the last look before the collapse it is below "
    "that of the losses' derivatives.",
    "r_Pᵀ Θ(x_F, x_P) r_P / ‖g_P‖² minus the share over it, mean over a seed's collapsing runs",
    0.0,
    above=False,
    source=f"{PAPER}, as we read it",
)
CLAIMS = (
    IN_TIME,
    QUIET,
    EARLIER,
    CHEAP_IN_TIME,
    CHEAP_QUIET,
    CHEAP_EARLIER,
    DEPLOYED,
    DEPLOYED_QUIET,
    SPECTRUM_ALONE,
    KERNEL_FIRST,
)
SHIPPED = Watch(f"cheap/{POOLED_SHARE}", "level", -1)


def judged(values: Sequence[Values], setting: str) -> list[Verdict]:
    """The verdicts, on the odd seeds."""
    even, odd = _split(values)
    order = choose(even)

    def best(family: str, *, cheap: bool) -> Chosen | None:
        return next((one for one in order if (one.watch.family, one.watch.cheap) == (family, cheap)), None)

    effects: dict[Claim, dict[int, float]] = {claim: {} for claim in CLAIMS}
    for cheap, (in_time, quiet, earlier) in {
        False: (IN_TIME, QUIET, EARLIER),
        True: (CHEAP_IN_TIME, CHEAP_QUIET, CHEAP_EARLIER),
    }.items():
        kernel, rival = best("kernel", cheap=cheap), best("rival", cheap=cheap)
        if kernel is None or rival is None:
            continue
        for seed, runs in odd.items():
            of_kernel, of_rival = (_worth(one, runs) for one in (kernel, rival))
            if "in_time" in of_kernel:
                effects[in_time][seed] = of_kernel["in_time"]
                effects[earlier][seed] = of_kernel["lead"] - of_rival["lead"]
            if "false_alarms" in of_kernel:
                effects[quiet][seed] = of_kernel["false_alarms"]
    shipped = Chosen(SHIPPED, -THRESHOLD)
    for seed, runs in odd.items():
        worth = _worth(shipped, runs)
        if "in_time" in worth:
            effects[DEPLOYED][seed] = worth["in_time"]
        if "false_alarms" in worth:
            effects[DEPLOYED_QUIET][seed] = worth["false_alarms"]
        firsts = [first for run in runs if run.collapse and (first := run.kernel_first()) is not None]
        if firsts:
            effects[KERNEL_FIRST][seed] = fmean(firsts)
    clean = next((one for one in order if one.watch.signal.startswith("clean/")), None)
    if clean is not None:
        worths = {seed: _worth(clean, runs) for seed, runs in odd.items()}
        effects[SPECTRUM_ALONE] = {
            seed: worth["in_time"] for seed, worth in worths.items() if "in_time" in worth
        }
    return [judge(claim, setting, effects[claim]) for claim in CLAIMS]


# --- figures ---------------------------------------------------------------------------------------------

FIGURES = (
    ValueFigure(
        key="in-time",
        title="Which signal speaks in time",
        caption="Share of the collapsing runs of the odd seeds that a signal speaks before, its threshold "
        "from the quiet runs of the even seeds; the best on these first.",
        y=(
            Quantity("in_time", "spoke in time", percent=True),
            Quantity("lead", "lead (steps)"),
            Quantity("false_alarms", "false alarms", percent=True),
        ),
        x="watch",
        colour="family",
        panels="cost",
        views="y",
        where={"what": "watch"},
    ),
    ValueFigure(
        key="factors",
        title="What goes first",
        caption="The update share on the way to a collapse, in epochs, and its two factors: what the kernel "
        "alone leaves of it, and what the losses' derivatives leave of that.",
        y=tuple(
            Quantity(name, "share", name.replace("_", " "))
            for name in ("update_share", "kernel_share", "derivative_share")
        ),
        x="when",
        colour="y",
        panels="method",
        where={"what": "factors"},
    ),
    ValueFigure(
        key="distances",
        title="The kernels part",
        caption="Kernel distance between inputs, of class kernels.",
        y=tuple(Quantity(f"{pair}/class/distance", "kernel distance", pair, log=True) for pair in PAIRS),
        panels="y",
        views="eps",
        where={"what": "signals"},
    ),
    ValueFigure(
        key="spectrum",
        title="The spectrum",
        caption="Entropy rank of the class kernels, by the inputs.",
        y=tuple(Quantity(f"{inputs}/entropy_rank", "entropy rank", inputs) for inputs in INPUTS),
        panels="y",
        views="eps",
        where={"what": "signals"},
    ),
    ValueFigure(
        key="rivals",
        title="What others watch",
        caption="On the same examples.",
        y=tuple(Quantity(name, name.replace("_", " ")) for name in RIVALS),
        panels="y",
        views="eps",
        where={"what": "signals"},
    ),
)

STUDY = Study("overfitting", CLAIMS, runs, measure, judged, FIGURES, derive)
