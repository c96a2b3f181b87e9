"""What a kernel carries: networks frozen at an epoch of one method, trained as another trains.

Asked: arXiv 2312.02236 trains on with a kernel that has become lazy. If the kernel of PGD training is frozen
(the network linearised: f(x; θ) + J(x) δ, or J(x) δ alone), does training δ come where PGD training comes,
on crafted, on one-step, on clean examples? Does it still learn, and does it keep on clean examples what the
network, trained on them, forgets? Does the kernel of another method do? Beside it lies how far the methods'
kernels are apart, how they align with their classes, kernel regression with the exact kernel, and
adversarial examples that the kernel alone makes, transferred to the network.

The lines of values.jsonl, by ``what``: "run", the network at a moment (of those that turned to other
examples there, at their end); "kernel" of a moment; "frozen", the linearised network after training,
with the mean loss of its last batches; "regression", δ = J(X)ᵀα with (Θ(X, X) + ridge) α = Y in float64,
that of the untrained network too, its statistics those of clean inputs. Examples that the kernel makes are
PGD-10's on the regression, no step of it looks at the outputs of the network that they are for, the one that
training ends with; beside them, those of the other methods' networks and random signs.

Robust accuracy, on validation examples, is that under PGD-10, also as it climbs the network at that moment
and at the end, and, where a network withstands all, Square: the gradients of a linearised ReLU network do
not see J(x)δ jump where units switch. Even so it is an upper bound for linearised networks: with more
queries Square takes more from them, hardly any from the networks themselves. Trained on crafted examples
they may learn to hide behind the jumps, up to being right on those and wrong on clean ones, so that kernels
are compared by what clean examples make of them. Where a frozen network is held against the one that trained
on, it sees as many examples as that one did from there. The rate is the largest that is stable. Hardware
and time: a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangentlab import data, metrics, modes, randomness
from tangentlab.attacks import PGD, Attack, Passes, Square
from tangentlab.data import Split
from tangentlab.kernels import Linearized, NTKOperator, ntk, pullback
from tangentlab.probes import accuracy
from tangentlab.records import read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig
from tangentlab.runs.build import Examples, build_attack, build_data, build_model, resolve_device
from tangentlab.runs.evaluation import count_correct, kept_checkpoints
from tangentlab.runs.frozen import train_frozen
from tangentlab.studies.study import COLD, Study, Values, configured
from tangentlab.studies.transfer_claims import CLAIMS, judged
from tangentlab.training import load_weights, recalibrate

METHODS = ("standard", "fgsm_rs", "pgd", "trades")
EXAMPLES = ("clean", "one-step", "pgd")
# Shares of the training; the learning rate first falls in the middle, and the kernel settles.
MOMENTS = {"start": 0.0, "early": 1 / 15, "middle": 0.5, "settled": 0.6, "end": 1.0}
# What PGD training turns to in the middle, the network as it is: by what the frozen ones train on.
TURNED = {"clean": "standard", "one-step": "fgsm_rs"}
OFFSETS = ("kept", "zero")
# What is held against the network at a moment: it went on from there.
THEN = "the network then"
DRAWN = (THEN, *(f"{how}, then {kind}" for how, kind in product(("frozen", "not frozen"), TURNED)))

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
POINTS = 250  # validation examples that are judged
QUERIES = 1000  # of Square
PROBED = 40  # class-balanced training examples whose kernel is described, and sets the learning rate
FITTED = 300  # class-balanced training examples of the regression
RIDGE = 1e-2  # over the kernel's mean diagonal
CALIBRATED = 1000  # training examples whose statistics the untrained network gets
# On 3 and 4 the rate was looked at; on 3 to 5 the claims were written anew.
TUNING_SEEDS = (0, 1, 2, 3, 4, 5)


def runs(tier: int, seeds: Sequence[int]) -> dict[str, RunConfig]:
    """METHOD-SEED -> configuration; pgd-EXAMPLES-SEED those of TURNED."""
    base, words, methods = TIERS[tier]
    steps = f"--method.num_steps={PGD_STEPS}"
    named = {
        method: f"--method={method} {steps if method in ('pgd', 'trades') else ''}" for method in methods
    }
    epochs = configured(base, f"{_COMMON} {words}").training.epochs
    turn = f"--switch.rule=fixed --switch.epoch={MOMENTS['middle'] * epochs:g}"
    named |= {f"pgd-{kind}": f"{named['pgd']} {turn} --switch.to={to}" for kind, to in TURNED.items()}
    return {
        f"{name}-{seed}": configured(base, f"{_COMMON} {words} {own} --name={name}", seed=seed)
        for seed in seeds
        for name, own in named.items()
    }


def measure(folder: Path, config: RunConfig) -> Iterator[Values]:
    """The lines of one run; the other methods' runs of its seed lie beside it."""
    examples = build_data(config)
    device = resolve_device(config.device)
    model = build_model(config, examples, device)
    points = judged_points(examples)
    pgd = build_attack(config, num_steps=10)
    moments = moment_paths(folder, config)
    ended = build_model(config, examples, device)
    load_weights(moments["end"], ended)
    judge_by = Unhidden(pgd, Square(config.eps, QUERIES), (ended,))
    network = _accuracies(ended, points, judge_by, config.seed)
    if (turned := config.name.partition("-")[2]) in TURNED:
        then = {"moment": "middle", "epoch": config.switch.epoch, "drawn": f"not frozen, then {turned}"}
        yield {"what": "run", "turned_to": turned, **then, "n": len(points), **network}
        return
    for moment, path in moments.items():
        epoch = load_moment(path, model, examples, moment)
        place = {"moment": moment, "epoch": epoch}
        judge_by = Unhidden(pgd, Square(config.eps, QUERIES), (model, ended))
        if moment != "start":
            ends = moment == "end"
            there = network if ends else _accuracies(model, points, judge_by, config.seed)
            others = _others(ended, points, pgd, folder, config, examples) if ends else {}
            yield {"what": "run", **place, "drawn": THEN, "n": len(points), **there, **others}
        kernel = class_kernels(model, examples, config)
        yield {"what": "kernel", **place, **_described(kernel, model, folder, config, examples, moment)}
        for offset, name, whole in _trainings(config.method["name"], moment):
            steps = steps_for(config, examples, epoch, whole=whole)
            frozen, loss = freeze(model, kernel, examples, config, offset=offset, kind=name, steps=steps)
            accuracies = _accuracies(frozen, points, judge_by, config.seed)
            told = {"offset": offset, "examples": name, "steps": steps, "whole": whole, "loss": loss}
            if whole:
                told["drawn"] = f"frozen, then {name}"
            yield {"what": "frozen", **place, **told, **accuracies}
        yield {
            "what": "regression",
            **place,
            **_regression(model, kernel, examples, points, judge_by, ended, config),
            **{f"network_{name}": value for name, value in network.items()},
        }


def _trainings(method: str, moment: str) -> Iterator[tuple[str, str, bool]]:
    """(offset, examples, whether for as long as the network went on) of the linearised networks; of the
    untrained kernel there is regression."""
    if moment in ("early", "middle", "end"):
        yield from product(("kept",) if moment == "early" else OFFSETS, EXAMPLES, (False,))
    if method == "pgd" and moment in ("early", "middle", "settled"):
        yield from product(("kept",), TURNED, (True,))


def moment_paths(folder: Path, config: RunConfig) -> dict[str, Path]:
    """The kept checkpoints nearest to MOMENTS."""
    kept = kept_checkpoints(folder)
    last = max(kept)
    return {
        moment: kept[min(kept, key=lambda step: abs(step - share * last))]
        for moment, share in MOMENTS.items()
    }


def judged_points(examples: Examples) -> Split:
    """Validation examples, at most POINTS."""
    return examples.validation.select(torch.arange(min(POINTS, len(examples.validation))))


def steps_for(config: RunConfig, examples: Examples, epoch: float, *, whole: bool) -> int:
    """Of a linearised network; ``whole``: as many examples as the network went on to see from that epoch."""
    return math.ceil((config.training.epochs - epoch) * len(examples.train) / BATCH) if whole else STEPS


def load_moment(path: Path, model: nn.Module, examples: Examples, moment: str) -> float:
    """Put the moment's network into ``model``; returns its epoch. The untrained one gets statistics: else it
    normalizes by 0 and 1, which no step of training sees."""
    epoch: float = load_weights(path, model)["extra"]["epoch"]
    if moment == "start":
        device = next(model.parameters()).device
        recalibrate(model, [examples.train.x(slice(0, CALIBRATED), device)])
    return epoch


def freeze(
    model: nn.Module,
    kernel: Tensor,
    examples: Examples,
    config: RunConfig,
    *,
    offset: str,
    kind: str,
    steps: int,
) -> tuple[Linearized, float]:
    """The model linearised as it stands, trained at the kernel's largest stable rate; and its last loss.

    Args:
        kernel: as :func:`class_kernels` has it.
        offset: of OFFSETS.
        kind: of EXAMPLES.
    """
    attacks = {
        "clean": None,
        "one-step": PGD(config.eps, min(1.0, 1.25 * config.eps), 1),
        "pgd": build_attack(config, num_steps=PGD_STEPS),
    }
    model.requires_grad_(True)  # the one before froze them
    frozen = Linearized(model, zero_offset=offset == "zero")
    loss = train_frozen(
        frozen,
        examples.train,
        attack=attacks[kind],
        steps=steps,
        batch_size=BATCH,
        peak=PROBED / float(torch.linalg.eigvalsh(kernel.double()).amax(dim=1).mean()),
        seed=config.seed,
    )
    return frozen, loss


@dataclass(frozen=True)
class Unhidden:
    """PGD, then PGD that climbs other networks instead, then Square, each where the network withstood."""

    pgd: Attack
    square: Square
    sources: tuple[nn.Module, ...] = ()

    @property
    def eps(self) -> float:
        return self.square.eps

    @property
    def passes(self) -> Passes:
        found = self.square.passes
        for _ in range(1 + len(self.sources)):
            found = found.plus(self.pgd.passes)
        return found

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        crafted = self.pgd(model, x, y, generator=generator).clone()
        for attack, source in (*((self.pgd, one) for one in self.sources), (self.square, model)):
            with torch.no_grad():
                left = model(crafted).argmax(dim=1) == y
            if left.any():
                with modes.evaluation(source):
                    crafted[left] = attack(source, x[left], y[left], generator=generator)
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


def _others(
    ended: nn.Module, points: Split, pgd: Attack, folder: Path, config: RunConfig, examples: Examples
) -> dict[str, float]:
    """Accuracy on the PGD examples of the other methods' networks, and after random signs of size eps."""
    device = next(ended.parameters()).device
    x, y = points.x(device=device), points.labels.to(device)
    found = {}
    for method, beside in _beside(folder, config):
        other = build_model(config, examples, device)
        load_weights(moment_paths(beside, config)["end"], other)
        noise = randomness.generator(config.seed, "transfer/crafting")
        found[f"from_{method}_accuracy"] = accuracy(ended, x, y, pgd, generator=noise, against=other)
    noise = randomness.generator(config.seed, "transfer/signs")
    signs = torch.randint(0, 2, x.shape, generator=noise).to(device) * 2 - 1
    return {**found, "signs_accuracy": accuracy(ended, (x + config.eps * signs).clamp(0, 1), y)}


def _beside(folder: Path, config: RunConfig) -> Iterator[tuple[str, Path]]:
    """The other methods' finished runs of the seed."""
    for method in METHODS:
        beside = folder.parent / f"{method}-{config.seed}"
        if method != config.method["name"] and beside.exists() and read_run(beside).state == "finished":
            yield method, beside


def _probed(examples: Examples, config: RunConfig) -> Split:
    return examples.train.select(data.class_balanced(examples.train.labels, PROBED, seed=config.seed))


def class_kernels(model: nn.Module, examples: Examples, config: RunConfig, x: Tensor | None = None) -> Tensor:
    """[C, n, n] on class-balanced training examples, or what was made of them."""
    model.requires_grad_(True)
    return ntk(model, _probed(examples, config).x() if x is None else x, kind="class").cpu()


def _described(
    kernel: Tensor, model: nn.Module, folder: Path, config: RunConfig, examples: Examples, moment: str
) -> dict[str, float]:
    """How it aligns, and how far the other methods' kernels are at that moment: on clean inputs, and on PGD
    examples of this network."""
    probed = _probed(examples, config)
    x, labels = probed.x(), probed.labels
    found = {
        "specialization": float(metrics.specialization_score(metrics.kernel_specialization(kernel, labels))),
        "target_alignment": float(metrics.kernel_target_alignment(kernel, labels).mean()),
        "entropy_rank": float(metrics.entropy_rank(kernel).mean()),
    }
    noise = randomness.generator(config.seed, "transfer/probed")
    with modes.evaluation(model):
        crafted = build_attack(config, num_steps=10)(model, x, labels, generator=noise)
    attacked = class_kernels(model, examples, config, crafted)
    other = build_model(config, examples, resolve_device(config.device))
    for method, beside in _beside(folder, config):
        load_moment(moment_paths(beside, config)[moment], other, examples, moment)
        theirs, theirs_attacked = (class_kernels(other, examples, config, inputs) for inputs in (x, crafted))
        found[f"to_{method}"] = float(metrics.kernel_distance(kernel, theirs).mean())
        found[f"pgd_to_{method}"] = float(metrics.kernel_distance(attacked, theirs_attacked).mean())
    return found


def fit(model: nn.Module, x: Tensor, y: Tensor, *, ridge: float) -> Linearized:
    """x' ↦ Θ(x', x)α as a network: J(x')δ with δ = J(x)ᵀα, (Θ(x, x) + ridge)α = y [n, C]."""
    theta = NTKOperator(model, x).to_dense().double()
    theta.diagonal().add_(ridge)
    coefficients = torch.linalg.solve(theta, y.double().flatten()).reshape(y.shape).to(x.dtype)
    along = pullback(model, x, coefficients, batchnorm="running")
    fitted = Linearized(model, zero_offset=True)
    with torch.no_grad():
        for delta, value in zip(fitted.delta, along.values(), strict=True):
            delta.copy_(value)
    return fitted


def _regression(
    model: nn.Module,
    kernel: Tensor,
    examples: Examples,
    points: Split,
    attack: Unhidden,
    ended: nn.Module,
    config: RunConfig,
) -> dict[str, float]:
    """Regression of centred one-hot targets, and what its adversarial examples do to the ended network."""
    index = data.class_balanced(examples.train.labels, FITTED, seed=config.seed, name="transfer/fitted")
    classes = examples.dataset.num_classes
    targets = F.one_hot(examples.train.labels[index], classes) - 1 / classes
    model.requires_grad_(True)
    ridge = RIDGE * float(kernel.diagonal(dim1=-2, dim2=-1).mean())
    device = next(model.parameters()).device
    fitted = fit(model, examples.train.x(index, device), targets.to(device), ridge=ridge)
    noise = randomness.generator(config.seed, "transfer/crafting")
    transferred = accuracy(
        ended, points.x(device=device), points.labels.to(device), attack.pgd, generator=noise, against=fitted
    )
    return {
        **_accuracies(fitted, points, attack, config.seed),
        "transferred_accuracy": transferred,
    }


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
            where={"what": "frozen", "offset": offset, "whole": False},
        )
        for offset in OFFSETS
    ),
    ValueFigure(
        key="long",
        title="Held against the network",
        caption="PGD training's network at a moment, and what becomes of it: its kernel frozen there, offset "
        "kept, and trained on clean or one-step examples for as long as the network went on; and the network "
        "itself, not frozen, trained on on these.",
        y=_ACCURACIES,
        x="moment",
        colour="drawn",
        views="y",
        where={"method": "pgd", "drawn": DRAWN},
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
        caption="Class kernels at the same moment of training, on clean training examples and on their "
        "PGD-10 examples.",
        y=(
            *(Quantity(f"to_{method}", f"kernel distance to {method}'s") for method in METHODS),
            *(Quantity(f"pgd_to_{method}", f"distance to {method}'s, PGD inputs") for method in METHODS),
            Quantity("specialization", "specialization"),
            Quantity("target_alignment", "target alignment"),
        ),
        x="moment",
        panels="y",
        where={"what": "kernel"},
    ),
)

STUDY = Study("transfer", CLAIMS, runs, measure, judged, FIGURES, tuning_seeds=TUNING_SEEDS)
