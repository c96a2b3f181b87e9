"""Catastrophic overfitting: which signal speaks before it, the kernel's or another, how often for nothing.

Asked: arXiv 2312.02236 explains the collapse of single-step training by the kernel's spectrum. FGSM and
FGSM-RS training over eps collapse or do not; PGD, N-FGSM and GradAlign training are the controls. At every
second kept checkpoint, an epoch apart, all signals are taken, the kernel's and the rivals', and at every one
the cheap ones (tangentlab.studies.overfitting_signals).

Each is watched in several ways, and may speak or not (tangentlab.studies.overfitting_watches). Thresholds are
set and the best signals chosen on the even seeds; the verdicts are on the odd seeds alone. The first epoch is
not watched, and runs that never learned are left out. A collapse is that of
tangentlab.metrics.catastrophic_overfitting, by PGD-10 on the validation split: an alarm is in time if it
speaks before PGD accuracy has lost half of its best.

The lines of values.jsonl, by ``what``: "run", its collapse if any; "signals" of a checkpoint; "again", the
same on other examples, now and then: a signal's noise. What each signal is worth is derived from them
(study.json, "derived"). Hardware and time: a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

from tangentlab import data, metrics
from tangentlab.probes.overfitting_alarm import THRESHOLD
from tangentlab.records import read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig, load_config
from tangentlab.runs.build import build_data, build_model
from tangentlab.runs.evaluation import kept_checkpoints
from tangentlab.studies.claims import PAPER, Claim, Verdict, judge
from tangentlab.studies.overfitting_signals import (
    BUDGET,
    COSTS,
    INPUTS,
    PAIRS,
    POOLED_SHARE,
    PROBED,
    RIVALS,
    PooledSignals,
    cheap_signals,
    full_signals,
)
from tangentlab.studies.overfitting_watches import (
    SINGLE_STEP,
    Chosen,
    Watch,
    choose,
    even_and_odd,
    seen_runs,
    watch_noise,
    watch_worth,
)
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
    collapsing: tuple[str, ...] = SINGLE_STEP


_COMMON = (
    "--probe.size=0 --threads=1 --training.keep_every=0.5 --evaluation.every=0.5 --evaluation.num_steps=10 "
    "--evaluation.test_num_steps=10 --evaluation.test_size=200"
)
TIERS = {
    0: Tier("digits", "", (0.2, 0.28, 0.34)),
    1: Tier(
        "fashion-mnist",
        # At a rate of 0.1 networks die or hardly learn; from eps 0.25 on they collapse in the first epoch.
        "--training.epochs=10 --training.batch_size=64 --training.schedule=constant "
        "--training.learning_rate=0.02 --channels_last=true",
        (0.15, 0.2, 0.22),
    ),
    2: Tier("cifar10-narrow", "--training.epochs=15", (16 / 255,), ("pgd",), ("fgsm",)),
}
FULL = 2  # looks between those that are not only cheap
AGAIN = 8  # looks between those on other examples
AFTERWARDS = 3  # epochs that are looked at after a collapse
# Epochs to a collapse, for figures: above so many.
WHEN = {"over 8 before": 8, "4 to 8": 4, "2 to 4": 2, "1 to 2": 1, "the last": 0}
AFTER = "after"

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
    pooled = PooledSignals(*first, config)
    for look, (number, path) in enumerate(kept_checkpoints(folder).items()):
        at = load_weights(path, model)["extra"]["epoch"]
        if collapse is not None and at > collapse.epoch + AFTERWARDS:
            break
        for what, points in {"signals": first, **({} if look % AGAIN else {"again": second})}.items():
            seen = cheap_signals(model, *points, config)
            seen |= pooled.look(model, number) if what == "signals" else {}
            seen |= {} if look % FULL else full_signals(model, *points, config)
            rounded = {name: float(f"{value:.4g}") for name, value in seen.items()}
            yield {"what": what, "eps": config.eps, "step": number, "epoch": at, **rounded}


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
    even, odd = even_and_odd(values)
    for one in choose(even):
        for seed, runs in odd.items():
            noise = watch_noise(one.watch, runs) if one.watch.form == "level" else {}
            yield {
                "what": "watch",
                "signal": one.watch.signal,
                "watch": str(one.watch),
                "family": one.watch.family,
                "seed": seed,
                "chosen_in_time": one.in_time,
                "threshold": one.threshold,
                "cost": "cheap" if one.watch.cheap else "any",
                **watch_worth(one, runs),
                **noise,
            }


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
    even, odd = even_and_odd(values)
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
            of_kernel, of_rival = (watch_worth(one, runs) for one in (kernel, rival))
            if "in_time" in of_kernel:
                effects[in_time][seed] = of_kernel["in_time"]
                effects[earlier][seed] = of_kernel["lead"] - of_rival["lead"]
            if "false_alarms" in of_kernel:
                effects[quiet][seed] = of_kernel["false_alarms"]
    shipped = Chosen(SHIPPED, -THRESHOLD)
    for seed, runs in odd.items():
        worth = watch_worth(shipped, runs)
        if "in_time" in worth:
            effects[DEPLOYED][seed] = worth["in_time"]
        if "false_alarms" in worth:
            effects[DEPLOYED_QUIET][seed] = worth["false_alarms"]
        firsts = [first for run in runs if run.collapse and (first := run.kernel_first()) is not None]
        if firsts:
            effects[KERNEL_FIRST][seed] = fmean(firsts)
    clean = next((one for one in order if one.watch.signal.startswith("clean/")), None)
    if clean is not None:
        worths = {seed: watch_worth(clean, runs) for seed, runs in odd.items()}
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
