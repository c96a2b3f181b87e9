"""Catastrophic overfitting: which signal speaks before it, the kernel's or another, how often for nothing.

Asked: arXiv 2312.02236 explains the collapse of single-step training by the kernel's spectrum. FGSM and
FGSM-RS training over eps collapse or do not; PGD, N-FGSM and GradAlign training are the controls. At every
kept checkpoint the kernel's signals are taken (spectrum and distances of the class kernels on clean, FGSM and
PGD inputs) and the rivals' (tangentlab.probes.linearity_signals), on the same examples.

A signal is watched as it is ("level") or against the median of its last looks ("change"), upwards or
downwards. It speaks where it comes to exceed its threshold: a run that lies above from the start is not
warned of. The threshold of an eps is the least that 5 % of the quiet runs of the even seeds at that eps
exceed; which signal is best is decided on the collapsing runs of the even seeds; the verdicts are on
the odd seeds alone. The first epoch is not watched, and runs that never learned are left out. A collapse is
that of tangentlab.metrics.catastrophic_overfitting, by PGD-10 on the validation split: an alarm is in time if
it speaks before PGD accuracy has lost half of its best.

The lines of values.jsonl, by ``what``: "run", its collapse if any; "signals" of a checkpoint. What each
signal is worth is derived from them (study.json, "derived"). Hardware and time: a CPU.
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

from tangentlab import data, metrics
from tangentlab.attacks import FGSM
from tangentlab.errors import KernelError
from tangentlab.probes import KernelProbe, linearity_signals
from tangentlab.records import read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig, load_config
from tangentlab.runs.build import build_attack, build_data, build_model
from tangentlab.runs.evaluation import kept_checkpoints
from tangentlab.studies.claims import PAPER, Claim, Verdict, judge
from tangentlab.studies.study import Study, Values
from tangentlab.training import load_weights


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
    collapsing: tuple[str, ...] = ("fgsm", "fgsm_rs")


_COMMON = (
    "--probe.size=0 --threads=1 --training.keep_every=0.5 --evaluation.every=0.5 --evaluation.num_steps=10 "
    "--evaluation.test_num_steps=10 --evaluation.test_size=200"
)
TIERS = {
    0: Tier("digits", "", (0.2, 0.24, 0.28, 0.34)),
    1: Tier(
        "fashion-mnist",
        "--training.epochs=10 --training.batch_size=64 --training.learning_rate=0.2 "
        "--training.schedule=constant --channels_last=true",
        (0.15, 0.2, 0.3),
    ),
    2: Tier("cifar10-narrow", "--training.epochs=15", (16 / 255,), ("pgd",), ("fgsm",)),
}
PROBED = 64  # class-balanced training examples
WATCHED_FROM = 1.0  # epochs
BEFORE = 8  # looks whose median a change is told from; four at least
FALSE_ALARMS = 0.05
LEARNED = 0.15  # robust accuracy, of ten classes

INPUTS = ("clean", "fgsm", "pgd")
PAIRS = ("clean~fgsm", "clean~pgd", "fgsm~pgd")
SPECTRUM = ("entropy_rank", "participation_ratio", "intrinsic_dimension", "top_mass", "top_eigenvalue")
RIVALS = (
    "fgsm_pgd_gap",
    "gradient_cosine",
    "linearity_error",
    "gradient_norm",
    "input_entropy_rank",
    "input_top_mass",
)
KERNEL = (
    *(f"{inputs}/{name}" for inputs, name in product(INPUTS, SPECTRUM)),
    *(f"{pair}/{kind}/distance" for pair, kind in product(PAIRS, ("class", "trace"))),
)
SIGNED = ("fgsm_pgd_gap", "gradient_cosine")  # may be zero or less: their change is a difference, not a ratio

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
    index = data.class_balanced(examples.train.labels, PROBED, seed=config.seed)
    x, y = examples.train.x(index), examples.train.labels[index]
    attacks = {"clean": None, "fgsm": FGSM(config.eps), "pgd": build_attack(config, num_steps=10)}
    probe = KernelProbe(x, y, inputs=attacks, seed=config.seed)
    for number, path in kept_checkpoints(folder).items():
        at = load_weights(path, model)["extra"]["epoch"]
        seen = linearity_signals(model, x, y, eps=config.eps, seed=config.seed)
        with suppress(KernelError):  # a network that has died has no kernel: its other signals remain
            seen |= _of_kernels(probe.measure(model, number).values)
        rounded = {name: float(f"{value:.4g}") for name, value in seen.items()}
        yield {"what": "signals", "eps": config.eps, "step": number, "epoch": at, **rounded}


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
        return "rival" if self.signal in RIVALS else "kernel"

    def __str__(self) -> str:
        return f"{self.signal}, {self.form} {'up' if self.sign > 0 else 'down'}"


WATCHES = [
    Watch(signal, form, sign)
    for signal, form, sign in product((*KERNEL, *RIVALS), ("level", "change"), (1, -1))
]


@dataclass(frozen=True)
class Seen:
    """A run: what was seen of it, and when it collapsed, in epochs."""

    seed: int
    eps: float
    steps_per_epoch: float
    collapse: float | None
    epochs: Sequence[float]
    signals: Sequence[Values]

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
            if watch.form == "change":
                score = _change(taken, signed=watch.signal in SIGNED)
            if score is not None and epoch >= WATCHED_FROM:
                times.append(epoch)
                values.append(watch.sign * score)
        return times, values

    def alarm(self, chosen: Chosen) -> float | None:
        """The epoch of the first alarm."""
        times, values = self.scores(chosen.watch)
        threshold = chosen.thresholds.get(self.eps, math.inf)
        below = next((place for place, value in enumerate(values) if value <= threshold), len(values))
        return metrics.first_alarm(times[below:], values[below:], threshold) if times[below:] else None

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
                run["eps"],
                run["steps_per_epoch"],
                run.get("collapse"),
                [line["epoch"] for line in signals],
                signals,
            )
        )
    return found


@dataclass(frozen=True)
class Chosen:
    """A watch with its thresholds by eps, and what it was worth on the runs that set them: share of collapses
    that it spoke before, and its mean lead in steps."""

    watch: Watch
    thresholds: Mapping[float, float]
    in_time: float = 0.0
    lead: float = 0.0


def choose(runs: Sequence[Seen]) -> list[Chosen]:
    """Every watch with its thresholds, the best first; empty where no run is quiet or none collapses."""
    collapsing = [run for run in runs if run.collapse is not None]
    found = []
    for watch in WATCHES:
        quiet: dict[float, list[list[float]]] = {}
        for run in runs:
            if run.collapse is None and (scores := run.scores(watch)[1]):
                quiet.setdefault(run.eps, []).append(scores)
        thresholds = {
            eps: metrics.alarm_threshold(scores, false_alarms=FALSE_ALARMS) for eps, scores in quiet.items()
        }
        if not thresholds or not collapsing:
            continue
        set_by = Chosen(watch, thresholds)
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
    """For each watch and odd seed: share of collapses it spoke before, lead, false alarms."""
    even, odd = _split(values)
    for one in choose(even):
        for seed, runs in odd.items():
            worth = _worth(one, runs)
            yield {
                "what": "watch",
                "signal": one.watch.signal,
                "watch": str(one.watch),
                "family": one.watch.family,
                "seed": seed,
                "chosen_in_time": one.in_time,
                **worth,
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
SPECTRUM_ALONE = Claim(
    "overfitting/spectrum",
    "The spectrum of the kernel on clean inputs is enough: its best signal speaks in time in more than half "
    "of the runs that collapse.",
    "share of a seed's collapsing runs",
    0.5,
    source=f"{PAPER}, as we read it",
)
CLAIMS = (IN_TIME, QUIET, EARLIER, SPECTRUM_ALONE)


def judged(values: Sequence[Values], setting: str) -> list[Verdict]:
    """The verdicts, on the odd seeds."""
    even, odd = _split(values)
    order = choose(even)
    kernel = next((one for one in order if one.watch.family == "kernel"), None)
    rival = next((one for one in order if one.watch.family == "rival"), None)
    clean = next((one for one in order if one.watch.signal.startswith("clean/")), None)
    effects: dict[Claim, dict[int, float]] = {claim: {} for claim in CLAIMS}
    for seed, runs in odd.items():
        if kernel is None or rival is None or clean is None:
            break
        of_kernel, of_rival, of_clean = (_worth(one, runs) for one in (kernel, rival, clean))
        if "in_time" in of_kernel:
            effects[IN_TIME][seed] = of_kernel["in_time"]
            effects[EARLIER][seed] = of_kernel["lead"] - of_rival["lead"]
            effects[SPECTRUM_ALONE][seed] = of_clean["in_time"]
        if "false_alarms" in of_kernel:
            effects[QUIET][seed] = of_kernel["false_alarms"]
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
        views="y",
        where={"what": "watch"},
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
