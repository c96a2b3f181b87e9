"""What a kernel carries: networks frozen at an epoch of one method, trained on another's examples.

Asked: arXiv 2312.02236 trains on with a kernel that has become lazy. If the kernel of PGD training is frozen
(the network linearised: f(x; θ) + J(x) δ, or J(x) δ alone), does training δ come where PGD training comes, on
crafted, on one-step, on clean examples? From which epoch on? Does the kernel of another method do? Beside it
lies how far the methods' kernels are apart, how they align with their classes, kernel regression with the
exact kernel, and adversarial examples that the kernel alone makes, transferred to the network.

The lines of values.jsonl, by ``what``: "run", the network that a method ended with; "kernel" of a kept epoch;
"frozen", the linearised network after training; "regression", δ = J(X)ᵀα with (Θ(X, X) + ridge) α = Y by
conjugate gradients on products with the exact kernel, that of the untrained network too. Examples that the
kernel makes are PGD-10's on the regression, no step of it looks at the outputs of the network that they are
for, the one that training ends with.

Robust accuracy, on validation examples, is that under PGD-10 and, where a network withstands it, Square: the
gradients of a linearised ReLU network do not see J(x)δ jump where units switch. Square alone takes from them
what PGD does not; beside it stands what PGD alone says. Trained on its own PGD examples such a network may
learn to hide behind the jumps, up to being right on those and wrong on clean ones, so the claims take
one-step examples. Where a frozen network is held against the one that trained on, it sees as many examples as
that one did from there. Hardware and time: a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangentlab import data, metrics, randomness
from tangentlab.attacks import PGD, Attack, Passes, Square
from tangentlab.data import Split
from tangentlab.kernels import Linearized, NTKOperator, Regression, kernel_regression, ntk, pullback
from tangentlab.probes import accuracy
from tangentlab.records import read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig, load_config
from tangentlab.runs.build import Examples, build_attack, build_data, build_model, resolve_device
from tangentlab.runs.evaluation import count_correct, kept_checkpoints
from tangentlab.runs.frozen import train_frozen
from tangentlab.studies.claims import PAPER, Claim, Verdict, judge_seeds
from tangentlab.studies.study import COLD, Study, Values
from tangentlab.training import load_weights

METHODS = ("standard", "fgsm_rs", "pgd", "trades")
EXAMPLES = ("clean", "one-step", "pgd")
MOMENTS = {"start": 0.0, "early": 1 / 15, "middle": 0.5, "end": 1.0}  # shares of the training
OFFSETS = ("kept", "zero")

# tier -> configuration, overrides, methods.
_COMMON = (
    "--training.schedule=piecewise --probe.size=0 --threads=1 --evaluation.every=1 --evaluation.num_steps=5 "
    "--evaluation.test_num_steps=10 --evaluation.test_size=200"
)
TIERS: Mapping[int, tuple[str, str, tuple[str, ...]]] = {
    0: (
        "digits",
        "--eps=0.2 --model.widths=[8,16] --model.strides=[1,2] --training.epochs=15 --training.batch_size=50 "
        "--data.train_size=600 --data.validation_size=300 --training.keep_every=0.5",
        METHODS,
    ),
    1: (
        "fashion-mnist",
        f"{COLD} --model.widths=[8,16,32] --channels_last=true --training.epochs=15 "
        "--training.keep_every=0.5",
        METHODS,
    ),
    2: ("cifar10-narrow", "--training.epochs=15 --training.keep_every=0.5", ("standard", "pgd")),
}
PGD_STEPS = 5  # of PGD and TRADES in training, on networks and on linearised ones
STEPS, BATCH = 300, 64  # of training a linearised network
POINTS = 500  # validation examples that are judged
QUERIES = 200  # of Square
PROBED = 40  # class-balanced training examples whose kernel is described, and sets the learning rate
FITTED = 300  # class-balanced training examples of the regression
RIDGE = 1e-2  # over the kernel's mean diagonal
PRODUCTS = 300  # of conjugate gradients

LOO = "Loo et al. 2022, arXiv 2210.12030"
SUFFICES = Claim(
    "transfer/suffices",
    "From the middle of PGD training on its frozen kernel suffices: trained on one-step examples it ends "
    "less than 2 points less robust than the network.",
    "robust accuracy of the network at the end minus that of the frozen one, offset kept, points",
    2.0,
    above=False,
    source=PAPER,
)
EARLY = Claim(
    "transfer/early",
    "Frozen after the first fifteenth of PGD training the kernel does not suffice: trained likewise it ends "
    "more than 5 points less robust than the network.",
    "robust accuracy of the network at the end minus that of the frozen one, offset kept, points",
    5.0,
    source=PAPER,
)
CLEAN = Claim(
    "transfer/clean",
    "With PGD training's kernel frozen in the middle, clean examples do as well as one-step ones: they lose "
    "less than 1 point of robust accuracy.",
    "robust accuracy trained on one-step minus on clean examples, offset kept, points",
    1.0,
    above=False,
    source=PAPER,
)
KERNEL_OR_EXAMPLES = Claim(
    "transfer/kernel-or-examples",
    "The kernel makes more of the robustness than the examples: PGD training's last kernel trained on clean "
    "examples is more robust than standard training's on one-step ones, by more than 0 points.",
    "robust accuracy, offset zero, points",
    0.0,
    source=LOO,
)
ONE_STEP = Claim(
    "transfer/one-step",
    "The last kernel of FGSM-RS training is as good as that of PGD training: on one-step examples it ends "
    "less than 2 points less robust.",
    "robust accuracy of PGD training's kernel minus FGSM-RS's, offset zero, points",
    2.0,
    above=False,
)
REGRESSION = Claim(
    "transfer/regression",
    "Regression on clean examples with the last kernel of PGD training is more robust than with standard "
    "training's, by more than 10 points.",
    "robust accuracy of kernel regression, PGD − standard, points",
    10.0,
    source=LOO,
)
_FALLS = "fall of the network's accuracy on examples made by the regression over that on its own PGD examples"
TRAINING_FREE = Claim(
    "transfer/training-free",
    "Adversarial examples that the kernel of the untrained network makes take more than half of what PGD "
    "examples take from the accuracy of the network that standard training ends with.",
    _FALLS,
    0.5,
    source=PAPER,
)
LAST_KERNEL = Claim(
    "transfer/last-kernel",
    "Adversarial examples that the last kernel of PGD training makes alone take more than half of what PGD "
    "examples take from that network's accuracy.",
    _FALLS,
    0.5,
)


def runs(tier: int, seeds: Sequence[int]) -> dict[str, RunConfig]:
    """METHOD-SEED -> configuration."""
    base, words, methods = TIERS[tier]
    found = {}
    for method in methods:
        own = f"--method.num_steps={PGD_STEPS}" if method in ("pgd", "trades") else ""
        overrides = f"{_COMMON} {words} --method={method} {own} --name={method}"
        for seed in seeds:
            found[f"{method}-{seed}"] = load_config(base, [*overrides.split(), f"--seed={seed}"])
    return found


def measure(folder: Path, config: RunConfig) -> Iterator[Values]:
    """The lines of one run; the other methods' runs of its seed lie beside it."""
    examples = build_data(config)
    model = build_model(config, examples, resolve_device(config.device))
    points = examples.validation.select(torch.arange(min(POINTS, len(examples.validation))))
    judge_by = Unhidden(build_attack(config, num_steps=10), Square(config.eps, QUERIES))
    moments = _moments(folder, config)
    ended = build_model(config, examples, resolve_device(config.device))
    last = load_weights(moments["end"], ended)["extra"]["epoch"]
    network = _accuracies(ended, points, judge_by, config.seed)
    yield {"what": "run", "moment": "end", "epoch": last, **network, "n": len(points)}
    for moment, path in moments.items():
        epoch = load_weights(path, model)["extra"]["epoch"]
        place = {"moment": moment, "epoch": epoch}
        kernel = _class_kernels(model, examples, config)
        yield {"what": "kernel", **place, **_described(kernel, folder, config, examples, moment)}
        peak = PROBED / float(torch.linalg.eigvalsh(kernel.double()).amax(dim=1).mean())
        crafting = _crafting(config)
        left = (config.training.epochs - epoch) * len(examples.train)
        for offset, name, steps in _trainings(config.method["name"], moment, math.ceil(left / BATCH)):
            frozen = _linearized(model, zero_offset=offset == "zero")
            train_frozen(
                frozen,
                examples.train,
                attack=crafting[name],
                steps=steps,
                batch_size=BATCH,
                peak=peak,
                seed=config.seed,
            )
            accuracies = _accuracies(frozen, points, judge_by, config.seed)
            yield {
                "what": "frozen",
                **place,
                "offset": offset,
                "examples": name,
                "steps": steps,
                **accuracies,
            }
        yield {
            "what": "regression",
            **place,
            **_regression(model, kernel, examples, points, judge_by, ended, config),
            **{f"network_{name}": value for name, value in network.items()},
        }


def _trainings(method: str, moment: str, whole: int) -> Iterator[tuple[str, str, int]]:
    """(offset, examples, steps) of the linearised networks; of the untrained kernel there is regression.

    Args:
        whole: steps that the network trained on for.
    """
    if moment != "start":
        yield from product(OFFSETS, EXAMPLES, (STEPS,))
    if method == "pgd" and moment in ("early", "middle"):
        yield from product(("kept",), ("clean", "one-step"), (whole,))


def _moments(folder: Path, config: RunConfig) -> dict[str, Path]:
    """The kept checkpoints nearest to MOMENTS."""
    kept = kept_checkpoints(folder)
    last = max(kept)
    return {
        moment: kept[min(kept, key=lambda step: abs(step - share * last))]
        for moment, share in MOMENTS.items()
    }


def _crafting(config: RunConfig) -> dict[str, Attack | None]:
    one_step = PGD(config.eps, min(1.0, 1.25 * config.eps), 1)
    return {"clean": None, "one-step": one_step, "pgd": build_attack(config, num_steps=PGD_STEPS)}


def _linearized(model: nn.Module, *, zero_offset: bool) -> Linearized:
    """Of the model as it stands, whose parameters stay trainable for the next one."""
    model.requires_grad_(True)
    return Linearized(model, zero_offset=zero_offset)


@dataclass(frozen=True)
class Unhidden:
    """PGD, and Square where the network withstands it."""

    pgd: Attack
    square: Square

    @property
    def eps(self) -> float:
        return self.square.eps

    @property
    def passes(self) -> Passes:
        return self.pgd.passes.plus(self.square.passes)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        crafted = self.pgd(model, x, y, generator=generator).clone()
        with torch.no_grad():
            left = model(crafted).argmax(dim=1) == y
        if left.any():
            crafted[left] = self.square(model, x[left], y[left], generator=generator)
        return crafted


def _accuracies(model: nn.Module, points: Split, attack: Unhidden, seed: int) -> dict[str, float]:
    device = next(model.parameters()).device
    attacks: dict[str, Attack | None] = {
        "clean_accuracy": None,
        "pgd_accuracy": attack.pgd,
        "robust_accuracy": attack,
    }
    return {
        name: count_correct(model, points, one, seed=seed, device=device) / len(points)
        for name, one in attacks.items()
    }


def _class_kernels(model: nn.Module, examples: Examples, config: RunConfig) -> Tensor:
    """[C, n, n] on class-balanced training examples."""
    index = data.class_balanced(examples.train.labels, PROBED, seed=config.seed)
    model.requires_grad_(True)
    return ntk(model, examples.train.x(index), kind="class").cpu()


def _described(
    kernel: Tensor, folder: Path, config: RunConfig, examples: Examples, moment: str
) -> dict[str, float]:
    """How it aligns, and how far the other methods' kernels are at that moment."""
    labels = examples.train.labels[data.class_balanced(examples.train.labels, PROBED, seed=config.seed)]
    found = {
        "specialization": float(metrics.specialization_score(metrics.kernel_specialization(kernel, labels))),
        "target_alignment": float(metrics.kernel_target_alignment(kernel, labels).mean()),
        "entropy_rank": float(metrics.entropy_rank(kernel).mean()),
    }
    other = build_model(config, examples, resolve_device(config.device))
    for method in METHODS:
        beside = folder.parent / f"{method}-{config.seed}"
        if method != config.method["name"] and beside.exists() and read_run(beside).state == "finished":
            load_weights(_moments(beside, config)[moment], other)
            theirs = _class_kernels(other, examples, config)
            found[f"to_{method}"] = float(metrics.kernel_distance(kernel, theirs).mean())
    return found


def fit(model: nn.Module, x: Tensor, y: Tensor, *, ridge: float) -> tuple[Linearized, Regression]:
    """x' ↦ Θ(x', x)α as a network: J(x')δ with δ = J(x)ᵀα, (Θ(x, x) + ridge)α = y [n, C]."""
    found = kernel_regression(NTKOperator(model, x), y, ridge=ridge, tolerance=1e-3, max_products=PRODUCTS)
    along = pullback(model, x, found.coefficients, batchnorm="running")
    fitted = Linearized(model, zero_offset=True)
    with torch.no_grad():
        for delta, value in zip(fitted.delta, along.values(), strict=True):
            delta.copy_(value)
    return fitted, found


def _regression(
    model: nn.Module,
    kernel: Tensor,
    examples: Examples,
    points: Split,
    attack: Unhidden,
    ended: nn.Module,
    config: RunConfig,
) -> dict[str, Any]:
    """Regression of centred one-hot targets, and what its adversarial examples do to the ended network."""
    index = data.class_balanced(examples.train.labels, FITTED, seed=config.seed, name="transfer/fitted")
    classes = examples.dataset.num_classes
    targets = F.one_hot(examples.train.labels[index], classes) - 1 / classes
    model.requires_grad_(True)
    ridge = RIDGE * float(kernel.diagonal(dim1=-2, dim2=-1).mean())
    device = next(model.parameters()).device
    fitted, found = fit(model, examples.train.x(index, device), targets.to(device), ridge=ridge)
    noise = randomness.generator(config.seed, "transfer/crafting")
    transferred = accuracy(
        ended, points.x(device=device), points.labels.to(device), attack.pgd, generator=noise, against=fitted
    )
    return {
        **_accuracies(fitted, points, attack, config.seed),
        "transferred_accuracy": transferred,
        "residual": found.residual,
        "products": found.products,
    }


# --- verdicts --------------------------------------------------------------------------------------------


class Measured:
    """One seed's numbers; asking for one that was not measured raises KeyError."""

    def __init__(self, lines: Sequence[Values]) -> None:
        keys = ("what", "method", "moment", "offset", "examples")
        self._lines = {(*map(line.get, keys), line.get("steps", STEPS) != STEPS): line for line in lines}

    def network(self, method: str) -> float:
        """Robust accuracy at the end, points."""
        return 100 * float(self._lines["run", method, "end", None, None, False]["robust_accuracy"])

    def frozen(self, method: str, moment: str, offset: str, examples: str, *, whole: bool = False) -> float:
        """Robust accuracy of the linearised network, points; ``whole``: trained as long as the network."""
        return 100 * float(self._lines["frozen", method, moment, offset, examples, whole]["robust_accuracy"])

    def regression(self, method: str, name: str, moment: str = "end") -> float:
        """That number of the regression with the kernel of that moment."""
        return float(self._lines["regression", method, moment, None, None, False][name])


def _whole(found: Measured, moment: str, examples: str) -> float:
    return found.frozen("pgd", moment, "kept", examples, whole=True)


def _takes(found: Measured, method: str, moment: str) -> float:
    clean, robust, transferred = (
        found.regression(method, name, moment)
        for name in ("network_clean_accuracy", "network_pgd_accuracy", "transferred_accuracy")
    )
    if clean <= robust:
        raise KeyError("nothing is taken")
    return (clean - transferred) / (clean - robust)


EFFECTS: dict[Claim, Callable[[Measured], float]] = {
    SUFFICES: lambda found: found.network("pgd") - _whole(found, "middle", "one-step"),
    EARLY: lambda found: found.network("pgd") - _whole(found, "early", "one-step"),
    CLEAN: lambda found: _whole(found, "middle", "one-step") - _whole(found, "middle", "clean"),
    KERNEL_OR_EXAMPLES: lambda found: (
        found.frozen("pgd", "end", "zero", "clean") - found.frozen("standard", "end", "zero", "one-step")
    ),
    ONE_STEP: lambda found: (
        found.frozen("pgd", "end", "zero", "one-step") - found.frozen("fgsm_rs", "end", "zero", "one-step")
    ),
    REGRESSION: lambda found: (
        100 * (found.regression("pgd", "robust_accuracy") - found.regression("standard", "robust_accuracy"))
    ),
    TRAINING_FREE: lambda found: _takes(found, "standard", "start"),
    LAST_KERNEL: lambda found: _takes(found, "pgd", "end"),
}


def judged(values: Sequence[Values], setting: str) -> list[Verdict]:
    """A verdict for each claim; a seed counts where the runs that its claim needs are there."""
    return judge_seeds(values, setting, EFFECTS, Measured)


# --- figures ---------------------------------------------------------------------------------------------

_ACCURACIES = (
    Quantity("robust_accuracy", "robust accuracy (PGD-10 and Square)", percent=True),
    Quantity("pgd_accuracy", "accuracy under PGD-10 alone", percent=True),
    Quantity("clean_accuracy", "clean accuracy", percent=True),
)
FIGURES = (
    *(
        ValueFigure(
            key=f"frozen-{offset}",
            title=f"The frozen kernel, trained: offset {offset}",
            caption="Linearised networks by the method and the moment that their kernel is of, trained on "
            "clean, one-step or PGD examples.",
            y=_ACCURACIES,
            x="method",
            colour="examples",
            panels="moment",
            views="y",
            where={"what": "frozen", "offset": offset, "steps": STEPS},
        )
        for offset in OFFSETS
    ),
    ValueFigure(
        key="long",
        title="Held against the network",
        caption="The kernel of PGD training frozen early and in the middle, offset kept, by the steps that "
        "it was trained for.",
        y=_ACCURACIES,
        x="steps",
        colour="examples",
        panels="moment",
        views="y",
        where={
            "what": "frozen",
            "method": "pgd",
            "offset": "kept",
            "moment": ("early", "middle"),
            "examples": ("clean", "one-step"),
        },
    ),
    ValueFigure(
        key="regression",
        title="Kernel regression, and examples that it makes alone",
        caption="Accuracy of the regression on clean and on its own PGD-10 examples, and of the network that "
        "training ends with on clean examples, on its own PGD-10 examples and on the regression's.",
        y=(
            Quantity("clean_accuracy", "accuracy", "regression, clean", percent=True),
            Quantity("pgd_accuracy", "accuracy", "regression, its own examples", percent=True),
            Quantity("network_clean_accuracy", "accuracy", "network, clean", percent=True),
            Quantity("transferred_accuracy", "accuracy", "network, the regression's examples", percent=True),
            Quantity("network_pgd_accuracy", "accuracy", "network, its own examples", percent=True),
        ),
        x="method",
        colour="y",
        panels="moment",
        where={"what": "regression"},
    ),
    ValueFigure(
        key="kernels",
        title="How the methods' kernels differ",
        caption="Class kernels on clean training examples at the same moment of training.",
        y=(
            *(Quantity(f"to_{method}", f"kernel distance to {method}'s") for method in METHODS),
            Quantity("specialization", "specialization"),
            Quantity("target_alignment", "target alignment"),
        ),
        x="moment",
        panels="y",
        where={"what": "kernel"},
    ),
)

STUDY = Study("transfer", tuple(EFFECTS), runs, measure, judged, FIGURES)
