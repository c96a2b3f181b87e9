"""Catastrophic overfitting: which signal speaks before it, the kernel's or another, how often for nothing.

Asked: arXiv 2312.02236 explains the collapse of single-step training by the kernel's spectrum. FGSM and
FGSM-RS training over eps collapse or do not; PGD, N-FGSM and GradAlign training are the controls. At every
kept checkpoint all signals are taken, the kernel's and the rivals', whatever they cost, and the cheap ones
(tangentlab.studies.overfitting_signals).

Each is watched in several ways, and may speak or not; what a collapse is, and a quiet run, says
tangentlab.studies.overfitting_watches. Each seed is judged by the thresholds and the choice of the others;
those on which eps, rates and the shipped threshold were chosen, or that were seen before its signal was, by
none. The first epoch is not watched, but by the shipped alarm, which looks on by itself as every run trains,
as a user's would. An alarm is in time if it speaks before PGD accuracy (PGD-10, validation split) has lost
half of its best. The kernel's signals are its spectra and distances; what a step on FGSM inputs does on PGD
inputs, in which the losses' derivatives have their part, is told apart from them.

The lines of values.jsonl, by ``what``: "run", its accuracies and its alarm; "signals" of a checkpoint;
"again", the same on other examples, now and then: a signal's noise. What each signal is worth is derived from
them (study.json, "derived"). Hardware and time: a CPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from tangentlab import data
from tangentlab.probes.overfitting_alarm import THRESHOLD
from tangentlab.records import RunRecord, read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig
from tangentlab.runs.build import Examples, build_data, build_model, eps_factor, resolve_device
from tangentlab.runs.evaluation import kept_checkpoints
from tangentlab.studies.overfitting_claims import CLAIMS, LOOK_EVERY, judged
from tangentlab.studies.overfitting_signals import (
    BUDGET,
    EXAMPLES,
    INPUTS,
    PAIRS,
    PROBED,
    RIVALS,
    PooledSignals,
    cheap_signals,
    full_signals,
)
from tangentlab.studies.overfitting_watches import (
    CONTROLS,
    JUDGED,
    SEEN_SEEDS,
    SINGLE_STEP,
    THRESHOLDS,
    UPDATE_SHARES,
    Chosen,
    Seen,
    Watch,
    alarm_worth,
    cells_worth,
    detection,
    fate,
    folds,
    seen_runs,
    watch_noise,
    watch_worth,
)
from tangentlab.studies.study import COLD, Study, Values, configured
from tangentlab.training import load_weights


@dataclass(frozen=True)
class Tier:
    """What a tier trains.

    Args:
        config: a shipped configuration.
        words: overrides of it.
        eps: radii that every method trains at.
        every: epochs between checkpoints, and evaluations.
        pgd_steps: of PGD training, each of eps/2; None for the configuration's.
    """

    config: str
    words: str
    eps: tuple[float, ...]
    every: float = 0.25
    pgd_steps: int | None = None
    controls: tuple[str, ...] = CONTROLS
    collapsing: tuple[str, ...] = SINGLE_STEP


_COMMON = (
    "--probe.size=0 --threads=1 --evaluation.num_steps=10 --evaluation.test_num_steps=10 "
    # It only watches: what it saw is judged at the shipped threshold, whatever its own.
    f"--evaluation.test_size=200 --alarm.every={LOOK_EVERY} --alarm.threshold=0.5"
)
TIERS = {
    # FGSM training keeps what it learns at 0.2, decays at 0.24 and collapses at 0.28 on most seeds.
    0: Tier("digits", "", (0.2, 0.24, 0.28), every=0.5),
    1: Tier(
        "fashion-mnist",
        # At a rate of 0.02 collapses seldom last, at 0.1 networks die or hardly learn. At 0.05 FGSM training
        # collapses at eps 0.2 and not at 0.15; at 0.3 it never learns, FGSM-RS and N-FGSM do and collapse.
        f"{COLD} --training.epochs=10 --training.batch_size=64 --training.schedule=constant "
        "--training.learning_rate=0.05 --channels_last=true --data.validation_size=400",
        (0.15, 0.2, 0.3),
    ),
    2: Tier(
        "cifar10-narrow",
        # Augmented, at constant rates or without a ramp of eps, so narrow a network swings and decays; so it
        # collapses within an epoch.
        "--data.crop=0 --data.flip=false --data.validation_size=300 --channels_last=true "
        "--training.epochs=15 --training.batch_size=64 --training.schedule=constant "
        "--training.eps_schedule=linear",
        (20 / 255, 24 / 255),
        pgd_steps=3,
        controls=("pgd", "n_fgsm"),
    ),
}
AGAIN = 4  # looks between those on other examples
AFTERWARDS = 3  # epochs that are looked at after a collapse
# Epochs to a collapse, for figures: above so many.
WHEN = {"over 8 before": 8, "4 to 8": 4, "2 to 4": 2, "1 to 2": 1, "the last": 0}
AFTER = "after"
SHOWN = 15  # signals, in a figure

FATES = (*JUDGED, "neither", "unlearned")

# --- runs ------------------------------------------------------------------------------------------------


def runs(tier: int, seeds: Sequence[int]) -> dict[str, RunConfig]:
    """METHOD-EPS-SEED -> configuration."""
    chosen = TIERS[tier]
    found = {}
    for method, eps in product((*chosen.collapsing, *chosen.controls), chosen.eps):
        name = f"{method}-{eps:.3g}"
        words = f"{_COMMON} {chosen.words} --eps={eps} --method={method} --name={name}"
        words += f" --training.keep_every={chosen.every} --evaluation.every={chosen.every}"
        if method == "pgd" and chosen.pgd_steps is not None:
            words += f" --method.num_steps={chosen.pgd_steps} --method.step_size={eps / 2}"
        # As the demo: crafting leaves BatchNorm's buffers alone.
        words += " --method.buffer_updates=[loss]"
        for seed in seeds:
            found[f"{name}-{seed}"] = configured(chosen.config, words, seed=seed)
    return found


# --- measurements ----------------------------------------------------------------------------------------


def measure(folder: Path, config: RunConfig) -> Iterator[Values]:
    """A line of the run and, where it collapsed or stayed quiet, one of each kept checkpoint."""
    run = run_line(read_run(folder), config)
    yield run
    if run["fate"] not in JUDGED:
        return
    examples = build_data(config)
    first, second = probed(examples, config)
    pooled = PooledSignals(*first)
    for look, (model, here, at) in enumerate(looks(folder, config, examples, run)):
        for what, points in {"signals": first, **({} if look % AGAIN else {"again": second})}.items():
            seen: dict[str, float] = {}
            for name, take in (("cheap", cheap_signals), ("full", full_signals)):
                begun = time.perf_counter()
                seen |= take(model, *points, here)
                seen[f"{name}_seconds"] = time.perf_counter() - begun
            seen |= pooled.look(model, here) if what == "signals" else {}
            yield {"what": what, "eps": config.eps, **at, **rounded(seen)}


def probed(examples: Examples, config: RunConfig) -> list[tuple[Tensor, Tensor]]:
    """Two disjoint sets of class-balanced training examples."""
    device = resolve_device(config.device)
    size = max(PROBED, EXAMPLES)
    sets = data.class_balanced(examples.train.labels, 2 * size, seed=config.seed).split(size)
    return [(examples.train.x(i, device), examples.train.labels[i].to(device)) for i in sets]


def looks(
    folder: Path, config: RunConfig, examples: Examples, run: Values
) -> Iterator[tuple[nn.Module, RunConfig, dict[str, float]]]:
    """The network at each kept checkpoint until AFTERWARDS epochs after a collapse, the configuration with
    the eps that the step trains in, and its step and epoch."""
    model = build_model(config, examples, resolve_device(config.device))
    radius = eps_factor(config, round(run["steps_per_epoch"] * config.training.epochs))
    for step, path in kept_checkpoints(folder).items():
        epoch = load_weights(path, model)["extra"]["epoch"]
        if run["collapse"] is not None and epoch > run["collapse"] + AFTERWARDS:
            return
        yield model, replace(config, eps=config.eps * radius(step)), {"step": step, "epoch": epoch}


def rounded(seen: Mapping[str, float]) -> dict[str, float]:
    """To four digits, as the lines keep them."""
    return {name: float(f"{value:.4g}") for name, value in seen.items()}


def run_line(record: RunRecord, config: RunConfig) -> dict[str, Any]:
    """The run's line."""
    epochs, robust = record.series("robust_accuracy")
    looked, pooled = record.series("alarm/pooled")
    last = record.metrics[-1]
    run = {
        "what": "run",
        "eps": config.eps,
        "epochs": epochs,
        "robust_accuracy": robust,
        **{f"{name}_accuracy": record.series(f"{name}_accuracy")[1] for name in ("fgsm", "clean")},
        "steps_per_epoch": last["step"] / last["epoch"],
        "alarm_epochs": looked,
        "alarm_pooled": [float(f"{share:.4g}") for share in pooled],
        **{f"{name}_seconds": record.status[f"{name}_seconds"] for name in ("train", "probe")},
    }
    name, collapse = fate(run)
    return {**run, "fate": name, "collapse": collapse}


def derive(values: Sequence[Values]) -> Iterator[Values]:
    """By ``what``: "fate" of each run; "factors" of the update share about a collapse; "watch", what a signal
    is worth on a seed; "alarm", what the shipped one is at other thresholds; "area" under a signal's ROC and,
    of the best of each kind, "roc"."""
    runs = seen_runs(values)
    yield from _fates(values)
    factors = [line for run in runs for line in _factors(run)]
    yield from sorted(factors, key=lambda line: (*WHEN, AFTER).index(line["when"]))
    watches, worths = [], []
    for seed, own, order in folds(values):
        best: dict[str, Chosen] = {}
        for one in order:
            best.setdefault(one.watch.signal, one)
        watches += [one.watch for one in best.values()]
        worths += [_worth(one, seed, own) for one in best.values()]
        for threshold in THRESHOLDS:
            worth = alarm_worth(threshold, own)
            yield {"what": "alarm", "seed": seed, "threshold": threshold, **worth}
        others = [run for run in runs if run.seed != seed]
        cells = {"signal": "method and eps", "watch": "method and eps", "family": "no signal", "cost": "any"}
        worths.append(
            {"what": "watch", **cells, "seed": seed, "passes": 0, "shown": True, **cells_worth(own, others)}
        )
    yield from _ranked(worths)
    yield from _detections(watches, runs)


def _ranked(worths: Sequence[Values]) -> Iterator[Values]:
    """The lines of what signals are worth, the best first, and which of them a figure shows."""

    def mean(name: str, lines: Sequence[Values]) -> float:
        return fmean(numbers) if (numbers := [line[name] for line in lines if name in line]) else 0.0

    of_signal: dict[tuple[str, str], list[Values]] = {}
    for line in worths:
        of_signal.setdefault((line["cost"], line["signal"]), []).append(line)
    ranked = sorted(
        of_signal.values(),
        key=lambda lines: (-mean("in_time", lines), mean("false_alarms", lines), -mean("lead", lines)),
    )
    places: Counter[str] = Counter()
    for lines in ranked:
        cost = lines[0]["cost"]
        places[cost] += 1
        yield from ({"shown": places[cost] <= SHOWN, **line} for line in lines)


def _fates(values: Sequence[Values]) -> Iterator[Values]:
    """Of every run, whether its own alarm was ever raised too."""
    for line in values:
        if line["what"] == "run":
            told = {key: line[key] for key in ("seed", "method", "eps")}
            told["raised"] = float(any(share < THRESHOLD for share in line["alarm_pooled"]))
            yield {"what": "fate", **told, **{name: float(fate(line)[0] == name) for name in FATES}}


def _factors(run: Seen) -> Iterator[Values]:
    for epoch, shares in run.shares():
        if run.collapse is not None:
            when = next((name for name, least in WHEN.items() if run.collapse - epoch > least), AFTER)
            yield {"what": "factors", "seed": run.seed, "method": run.method, "when": when, **shares}


def _worth(one: Chosen, seed: int, runs: Sequence[Seen]) -> Values:
    """Of a watch that the other seeds choose; of a level what it rises by over its noise between sets too."""
    own = {"chosen_in_time": one.in_time, "threshold": one.threshold, **watch_worth(one, runs)}
    own |= watch_noise(one.watch, runs)
    if one.watch.cheap:
        own["passes"] = BUDGET
    return {"what": "watch", **_of_watch(one.watch), "seed": seed, **own}


def _detections(watches: Sequence[Watch], runs: Sequence[Seen]) -> Iterator[Values]:
    """Over all runs, of each signal by the watch that most seeds choose."""
    chosen: dict[str, Counter[Watch]] = {}
    for watch in watches:
        chosen.setdefault(watch.signal, Counter())[watch] += 1
    found = []
    for counts in chosen.values():
        watch = counts.most_common(1)[0][0]
        if (seen := detection(watch, runs)) is not None:
            found.append((*seen, {**_of_watch(watch), "seed": "all"}))
    drawn = set()
    places: Counter[str] = Counter()
    for area, points, told in sorted(found, key=lambda one: -one[0]):
        places[told["cost"]] += 1
        yield {"what": "area", **told, "area": area, "shown": places[told["cost"]] <= SHOWN}
        kind = (told["family"], told["cost"])
        if kind not in drawn:
            drawn.add(kind)
            for false_alarms, detected in {0.0: 0.0, **dict(points)}.items():
                yield {"what": "roc", **told, "false_alarms": false_alarms, "detected": detected}


def _of_watch(watch: Watch) -> dict[str, str]:
    return {
        "signal": watch.signal,
        "watch": str(watch),
        "family": watch.family,
        "cost": "cheap" if watch.cheap else "any",
    }


# --- figures ---------------------------------------------------------------------------------------------

FIGURES = (
    ValueFigure(
        key="in-time",
        title="Which signal speaks in time",
        caption="Share of a seed's collapsing runs that a signal speaks before, watched in the way and with "
        f"the threshold that the other seeds choose; the {SHOWN} best at any cost and of the cheap ones. In "
        "time: before the first fall of half an epoch; also before the first fall of all, and before the one "
        "that lasted.",
        y=(
            Quantity("in_time", "spoke in time", percent=True),
            Quantity("false_alarms", "false alarms", percent=True),
            Quantity("lead", "lead (steps)"),
            Quantity("in_time_of_the_first_fall", "before the first fall", percent=True),
            Quantity("in_time_of_the_lasting_fall", "before the lasting fall", percent=True),
        ),
        x="signal",
        colour="family",
        panels="y",
        views="cost",
        where={"what": "watch", "shown": True},
    ),
    ValueFigure(
        key="area",
        title="Telling runs that collapse from quiet ones",
        caption="Area under the ROC of a run's highest score until the collapse, over all judged runs; the "
        f"{SHOWN} largest at any cost and of the cheap ones.",
        y=(Quantity("area", "area under the ROC"),),
        x="signal",
        colour="family",
        views="cost",
        where={"what": "area", "shown": True},
    ),
    ValueFigure(
        key="roc",
        title="Detections against false alarms",
        caption="ROC of the best kernel signal and the best rival, at any cost and cheap, over all runs.",
        y=(Quantity("detected", "collapsing runs that lie above", percent=True),),
        x=Quantity("false_alarms", "quiet runs that lie above", percent=True),
        colour="watch",
        where={"what": "roc"},
    ),
    ValueFigure(
        key="threshold",
        title="The shipped alarm by its threshold",
        caption=f"Share of a seed's runs, had the alarm that every run trains under been raised below that "
        f"share; it is at {THRESHOLD}.",
        y=(
            Quantity("in_time", "share of the runs", "spoke in time", percent=True),
            Quantity("false_alarms", "share of the runs", "false alarms", percent=True),
        ),
        x=Quantity("threshold", "threshold"),
        colour="y",
        where={"what": "alarm"},
    ),
    ValueFigure(
        key="fates",
        title="What became of the runs",
        caption="Of each method's runs; neither: half of the best robust accuracy was lost for a while, or "
        "FGSM accuracy fell too, or more than a third was lost at the end. And where the run's own alarm was "
        "ever raised.",
        y=tuple(Quantity(name, "share of the runs", name, percent=True) for name in (*FATES, "raised")),
        x="method",
        colour="y",
        panels="eps",
        where={"what": "fate"},
    ),
    ValueFigure(
        key="factors",
        title="The kernel's part and the derivatives'",
        caption="The update share on the way to a collapse, in epochs: as it is, were only the kernel "
        "another on FGSM inputs, and were only the losses' derivatives.",
        y=tuple(Quantity(name, "share", name.replace("_", " ")) for name in UPDATE_SHARES),
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
        y=tuple(Quantity(f"{inputs}/class/entropy_rank", "entropy rank", inputs) for inputs in INPUTS),
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

STUDY = Study("overfitting", CLAIMS, runs, measure, judged, FIGURES, derive, SEEN_SEEDS)
