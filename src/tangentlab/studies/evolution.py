"""How the kernel evolves: standard training and four kinds of adversarial training, three learning rates.

Asked: do the known results hold here (Loo et al. 2022, arXiv 2210.12030; Tsilivis & Kempe 2022, arXiv
2210.05577), are there the three stages of arXiv 2312.02236, what triggers the third, where do sub-kernels
specialise, how do the kernels on clean and on PGD inputs part, and which metrics merely repeat another. On
"images", on "few" of them (with equally many steps, for robust overfitting), and on a "table".

The constant learning rate is the control: decay alone makes a kernel look lazy, which is why stages are
those of the angle per unit of summed learning rate. But steps that jitter about a point turn the kernel in
proportion to the rate's root, so that this speed rises with every drop though nothing is learned. Hence two
more controls: standard training, and the angle between the mean kernels of the second and of the last quarter
of training, in which jitter averages out. Overfitting has its own control: as many steps with more images.

The lines of values.jsonl, by ``what``: "snapshot", the kernel's metrics at each moment on clean inputs, on
PGD inputs and between the two; "stages" of a run, with their uncertainty; "run"; "layer", of the kernels of
one layer's parameters; "carried", clean training on the kernel that the run ended with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tangentlab import metrics
from tangentlab.kernels import Linearized
from tangentlab.probes import KernelProbe
from tangentlab.records import RunRecord, read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig
from tangentlab.runs.build import (
    Examples,
    build_attack,
    build_data,
    build_model,
    build_probe,
    resolve_device,
)
from tangentlab.runs.evaluation import checkpoint_path, count_correct, kept_checkpoints
from tangentlab.runs.frozen import train_frozen
from tangentlab.studies.evolution_claims import (
    BETWEEN,
    CLAIMS,
    DECAYING,
    METHODS,
    METRICS,
    SPEEDS,
    repetitions,
    verdicts,
)
from tangentlab.studies.study import COLD, Study, Values, configured
from tangentlab.training import load_weights

CONTROLS = ("standard", "fgsm_rs", "pgd")  # trained with a constant rate too
INPUTS = ("clean", "pgd")
TOP = 10  # eigen-directions; as many as the probe sums up to the top mass

# --- runs ------------------------------------------------------------------------------------------------

Place = Literal["images", "few", "table"]

# tier -> shipped configuration, and what differs for many and for few images: as many steps, evaluations and
# snapshots. The middle and the end are kept for the kernels of layers.
BASES = {0: "digits", 1: "fashion-mnist", 2: "cifar10-narrow"}
WORDS: Mapping[int, Mapping[Place, str]] = {
    0: {
        "images": "--eps=0.2 --model.widths=[8,16] --model.strides=[1,2] --data.validation_size=200 "
        "--training.batch_size=50 --evaluation.test_num_steps=10 --evaluation.test_size=200 --probe.size=20 "
        "--probe.num_steps=5 --data.train_size=600 --training.epochs=12 --training.keep_every=6 "
        "--evaluation.every=1",
        "few": "--data.train_size=150 --training.epochs=48 --training.keep_every=24 --evaluation.every=4 "
        "--probe.every=4",
    },
    1: {
        "images": f"{COLD} --model.widths=[8,16,32] --channels_last=true --data.validation_size=500 "
        "--evaluation.test_num_steps=20 --evaluation.test_size=500 --probe.size=40 --training.keep_every=7.5",
        "few": "--data.train_size=1000 --training.epochs=167 --training.keep_every=83.5 "
        "--evaluation.every=11.14 --probe.every=5.57",
    },
    2: {
        "images": "--channels_last=true --data.validation_size=300 --evaluation.test_num_steps=20 "
        "--evaluation.test_size=500 --probe.size=30 --training.keep_every=7.5",
        "few": "--data.train_size=1000 --training.epochs=167 --training.keep_every=83.5 "
        "--evaluation.every=11.14 --probe.every=11.14",
    },
}
TABLE_WORDS = (
    "--data.name=breast-cancer --data.validation_size=100 --eps=0.1 --model=mlp --model.widths=[64,64] "
    "--training.epochs=40 --training.learning_rate=0.05 --evaluation.every=2 --evaluation.test_num_steps=20 "
    "--probe.size=40 --probe.every=2"
)
# How PGD and TRADES craft in training.
CRAFTING = {
    0: ("--method.num_steps=3",),
    1: ("--method.num_steps=3",),
    2: ("--method.num_steps=3", "--method.step_size=4/255"),
}


def configurations(tier: int, seeds: Sequence[int]) -> dict[str, RunConfig]:
    """Run key -> configuration; on CIFAR-10 what claims ask for, with the main evidence the table too."""
    if tier == 2:
        grid = [*product(("standard", "pgd"), ("piecewise", "constant")), ("trades", "piecewise")]
    else:
        grid = [*product(METHODS, DECAYING), *product(CONTROLS, ("constant",))]
    many, few = WORDS[tier]["images"], WORDS[tier]["few"]
    runs: list[tuple[Place, str, str, tuple[str, str]]] = []
    runs += [("images", BASES[tier], many, kind) for kind in grid]
    runs += [
        ("few", BASES[tier], f"{many} {few}", ("pgd", schedule))
        for schedule in ("piecewise", "constant")
        if tier < 2 or schedule == "piecewise"
    ]
    if tier == 1:
        runs += [("table", "digits", TABLE_WORDS, kind) for kind in grid]
    found = {}
    for seed, (place, base, words, (method, schedule)) in product(seeds, runs):
        own = [f"--method={method}", f"--training.schedule={schedule}"]
        own += CRAFTING[tier] if method in ("pgd", "trades") else ()
        own += ["--probe.early=true", "--threads=1", f"--name={place}-{method}-{schedule}"]
        config = configured(base, " ".join([words, *own]), seed=seed)
        found[_key(place, method, schedule, seed)] = config
    return found


def _key(place: str, method: str, schedule: str, seed: int) -> str:
    return f"{place}-{method}-{schedule}-{seed}"


# --- measurements ----------------------------------------------------------------------------------------


def measure(folder: Path, config: RunConfig) -> Iterator[Values]:
    """The lines of one run; the other methods' runs of its seed and schedule lie beside it."""
    record = read_run(folder)
    place = config.name.partition("-")[0]
    told = {"data": place, "schedule": config.training.schedule}
    lines = [
        *_snapshots(record),
        *_stages(record, config),
        _run(record, config) | _distances(record, config, place),
    ]
    if config.training.schedule == "piecewise" and place == "images":
        examples = build_data(config)
        model = build_model(config, examples, resolve_device(config.device))
        lines += _layers(folder, config, examples, model)
        if config.method["name"] in ("standard", "pgd"):
            lines.append(_carried(record, config, examples, model))
    for line in lines:
        yield told | {key: _rounded(value) for key, value in line.items() if value is not None}


def _snapshots(record: RunRecord) -> Iterator[dict[str, Any]]:
    steps = set(record.kernel_steps())
    for line in record.metrics:
        if "kernel/clean/class/entropy_rank" not in line or line["step"] not in steps:
            continue
        moment = {"what": "snapshot", "step": line["step"], "epoch": line["epoch"]}
        for inputs in INPUTS:
            named = {metric: line.get(f"kernel/{inputs}/class/{metric}") for metric in METRICS}
            yield {**moment, "inputs": inputs, **named}
        clean, pgd = (record.kernels(line["step"])[f"{inputs}/class"] for inputs in INPUTS)
        yield {
            **moment,
            "inputs": BETWEEN,
            "distance": line[f"kernel/{BETWEEN}/class/distance"],
            "in_top": float(metrics.difference_in_top(clean, pgd, TOP).mean()),
        }


def _stages(record: RunRecord, config: RunConfig) -> Iterator[dict[str, Any]]:
    for inputs, speed in product(INPUTS, SPEEDS):
        times, speeds = record.series(f"kernel/{inputs}/class/{speed}")
        found = metrics.find_stages(times, speeds)
        shares = [time / config.training.epochs for time in times]
        middle = [v for share, v in zip(shares, speeds, strict=True) if 0.25 < share <= 0.5]
        line: dict[str, Any] = {"what": "stages", "inputs": inputs, "speed": speed}
        # A learning stage shorter than three snapshots cannot be told from the curve.
        line["first_ratio"] = speeds[0] / median(middle)
        for name in ("learning_end", "third_start", "third_end", "level_ratio"):
            line[name] = getattr(found, name)
        for name in ("learning_end", "third_start"):
            low, high = getattr(found, f"{name}_interval") or (None, None)
            line |= {f"{name}_low": low, f"{name}_high": high}
        for name in ("learning_probability", "lazy_probability", "third_probability"):
            line[name] = getattr(found, name)
        if config.training.schedule == "piecewise" and found.third_start is not None:
            # In shares of the training.
            line["third_after_drop"] = (
                found.third_start / config.training.epochs - config.training.milestones[0]
            )
        yield line


def _run(record: RunRecord, config: RunConfig) -> dict[str, Any]:
    epochs, robust = record.series("robust_accuracy")
    best = max(range(1, len(robust)), key=robust.__getitem__)
    collapse = metrics.catastrophic_overfitting(epochs, record.series("fgsm_accuracy")[1], robust)
    tested = {
        f"test_{'clean' if line['attack'] == 'none' else 'robust'}_{line['checkpoint']}": line["accuracy"]
        for line in record.evaluations
        if line["attack"] in ("none", "pgd")
    }
    return {
        "what": "run",
        "best_epoch": epochs[best],
        "best_robust": robust[best],
        "robust_overfitting": robust[best] - robust[-1],
        "collapse_epoch": None if collapse is None else collapse.epoch,
        **tested,
        **{
            name: record.series(f"kernel/clean/class/{name}")[1][-1]
            for name in ("top_mass", "specialization")
        },
        **_path(record),
    }


def _path(record: RunRecord) -> dict[str, float]:
    """Of the kernel on clean inputs: when it settled, had turned half of its way and grown half of it, as
    shares of the training; and the angle from the second quarter's mean to the last one's."""
    steps = record.kernel_steps()
    kernels = torch.stack([record.kernels(step)["clean/class"].double() for step in steps])
    to_last = metrics.kernel_angle(kernels, kernels[-1]).mean(dim=1)
    turned = metrics.kernel_angle(kernels, kernels[0]).mean(dim=1)
    grown = (kernels - kernels[0]).flatten(1).norm(dim=1)

    shares = torch.tensor(steps) / steps[-1]
    units = kernels / kernels.flatten(2).norm(dim=2)[..., None, None]
    middle, late = (units[(low < shares) & (shares <= low + 0.25)].mean(dim=0) for low in (0.25, 0.75))

    def half(values: Tensor) -> float:
        return float(shares[(values >= values[-1] / 2).nonzero()[0]])

    return {
        "settled": float(shares[(to_last > to_last[0] / 2).nonzero()[-1] + 1]),
        "turned": half(turned),
        "grown": half(grown),
        "moved": float(metrics.kernel_angle(middle, late).mean()),
    }


def _distances(record: RunRecord, config: RunConfig, place: str) -> dict[str, float]:
    """Kernel distance to where the other methods' runs ended."""
    found = {}
    for method in METHODS:
        folder = record.folder.parent / _key(place, method, config.training.schedule, config.seed)
        if method != config.method["name"] and folder.exists():
            other = _last_kernel(read_run(folder))
            found[f"to_{method}"] = float(metrics.kernel_distance(_last_kernel(record), other).mean())
    return found


def _last_kernel(record: RunRecord) -> Tensor:
    return record.kernels(record.kernel_steps()[-1])["clean/class"]


def _layers(
    folder: Path, config: RunConfig, examples: Examples, model: nn.Module
) -> Iterator[dict[str, Any]]:
    whole = build_probe(config, examples)
    assert whole is not None
    inputs = {name: whole.inputs[name] for name in INPUTS}
    for step, path in kept_checkpoints(folder).items():
        epoch = load_weights(path, model)["extra"]["epoch"]
        for layer, parameters in layers(model).items():
            model.requires_grad_(False)
            for parameter in parameters:
                parameter.requires_grad_(True)
            probe = KernelProbe(whole.x, whole.y, inputs=inputs, kinds="class", seed=config.seed)
            values = probe.measure(model, step).values
            line = {"what": "layer", "layer": layer, "step": step, "epoch": epoch}
            line["convolution"] = parameters[0].dim() == 4
            line["distance"] = values[f"kernel/{BETWEEN}/class/distance"]
            for name in ("specialization", "target_alignment", "entropy_rank"):
                line |= {f"{name}_{kind}": values[f"kernel/{kind}/class/{name}"] for kind in INPUTS}
            yield line
    model.requires_grad_(True)


def layers(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Convolutions and linear layers in order, by name; what normalizes, together."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            found.setdefault(name if own[0].dim() > 1 else "normalization", []).extend(own)
    return found


# Clean training on the last kernel: of so many images a step, judged on so many of the validation split.
CARRIED_STEPS, CARRIED_BATCH, CARRIED_POINTS = 300, 64, 300


def _carried(record: RunRecord, config: RunConfig, examples: Examples, model: nn.Module) -> dict[str, Any]:
    load_weights(checkpoint_path(record.folder, "last"), model)
    network = Linearized(model, zero_offset=True)
    eigenvalues = record.series("kernel/clean/class/top_eigenvalues")[1][-1]
    train_frozen(
        network,
        examples.train,
        steps=CARRIED_STEPS,
        batch_size=CARRIED_BATCH,
        peak=config.probe.size / eigenvalues[0],
        seed=config.seed,
    )
    points = examples.validation.select(torch.arange(min(CARRIED_POINTS, len(examples.validation))))
    attacks = {"clean": None, "robust": build_attack(config, num_steps=10)}
    device = next(network.parameters()).device
    found = {
        name: count_correct(network, points, attack, seed=config.seed, device=device) / len(points)
        for name, attack in attacks.items()
    }
    return {"what": "carried", "n": len(points), **found}


def _rounded(value: Any) -> Any:
    """Five digits: more than seeds agree on, at half of the bytes."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --- figures ---------------------------------------------------------------------------------------------

_OF_A_KERNEL = (
    Quantity("distance_from_first", "kernel distance from the first"),
    Quantity("angle_velocity", "angle per step, rad", log=True),
    Quantity("angle_per_learning_rate", "angle per summed learning rate, rad", log=True),
    Quantity("entropy_rank", "entropy rank"),
    Quantity("top_mass", "top mass", percent=True),
    Quantity("target_alignment", "target alignment"),
    Quantity("specialization", "specialization"),
)
_OF_A_LAYER = (
    Quantity("distance", "kernel distance between clean and PGD inputs", log=True),
    Quantity("specialization_clean", "specialization"),
    Quantity("target_alignment_clean", "target alignment"),
    Quantity("entropy_rank_clean", "entropy rank"),
)


def _kernels(key: str, title: str, where: Mapping[str, Any]) -> ValueFigure:
    return ValueFigure(
        key=key,
        title=title,
        caption="Class kernels of the probe set; a panel a schedule of the learning rate.",
        y=_OF_A_KERNEL,
        panels="schedule",
        views="y",
        where={"what": "snapshot", **where},
    )


FIGURES = (
    _kernels("clean", "The kernel on clean inputs", {"data": "images", "inputs": "clean"}),
    _kernels("pgd", "The kernel on PGD inputs", {"data": "images", "inputs": "pgd"}),
    ValueFigure(
        key="between",
        title="How the kernels on clean and on PGD inputs part",
        caption=f"Their distance, and the share of their squared difference in the clean kernel's {TOP} top "
        "eigen-directions.",
        y=(
            Quantity("distance", "kernel distance"),
            Quantity("in_top", "share of the difference in the top", percent=True),
        ),
        panels="schedule",
        views="y",
        where={"what": "snapshot", "data": "images", "inputs": BETWEEN},
    ),
    ValueFigure(
        key="layers",
        title="Layer by layer",
        caption="Kernels of one layer's parameters, all but the distance on clean inputs; stepwise rate, "
        "before, in the middle and at the end of training.",
        y=_OF_A_LAYER,
        x="layer",
        panels="epoch",
        views="y",
        where={"what": "layer"},
    ),
    ValueFigure(
        key="stages",
        title="Are there the stages?",
        caption="Posterior probability of each stage in a run's curve of the angle per summed learning rate, "
        "clean inputs.",
        y=(
            Quantity("learning_probability", "probability", "a learning stage", percent=True),
            Quantity("lazy_probability", "probability", "a lazy stage", percent=True),
            Quantity("third_probability", "probability", "a third stage", percent=True),
        ),
        x="method",
        colour="schedule",
        panels="y",
        where={"what": "stages", "data": "images", "inputs": "clean", "speed": SPEEDS[1]},
    ),
    ValueFigure(
        key="overfitting",
        title="Few images and many, in as many steps",
        caption="PGD training: how far robust validation accuracy fell from its best, and the angle between "
        "the mean kernels of the second and the last quarter.",
        y=(
            Quantity("robust_overfitting", "best − last robust accuracy", percent=True),
            Quantity("moved", "angle, rad"),
        ),
        x="data",
        colour="schedule",
        panels="y",
        where={
            "what": "run",
            "method": "pgd",
            "data": ("images", "few"),
            "schedule": ("piecewise", "constant"),
        },
    ),
    ValueFigure(
        key="carried",
        title="What the kernel carries",
        caption="Clean training of the zero-offset network linearised at the end of a run, stepwise rate.",
        y=(
            Quantity("clean", "accuracy", "clean accuracy", percent=True),
            Quantity("robust", "accuracy", "PGD-10 accuracy", percent=True),
        ),
        x="method",
        panels="y",
        where={"what": "carried"},
    ),
    _kernels("table", "A table instead of images", {"data": "table", "inputs": "clean"}),
    ValueFigure(
        key="repetition",
        title="Which metrics repeat another",
        caption="|Spearman correlation| of every two metrics of the class kernels on clean inputs, over the "
        "snapshots of all runs on images, and over their last ones.",
        y=(
            Quantity("along", "|rank correlation|", "all snapshots"),
            Quantity("ended", "|rank correlation|", "last snapshots"),
        ),
        x="pair",
        colour="y",
        where={"what": "repetition"},
    ),
)

STUDY = Study("evolution", CLAIMS, configurations, measure, verdicts, FIGURES, repetitions)
