"""How far the kernel that training follows is from the one that is computed, and what either predicts.

Question: along standard, FGSM, N-FGSM, PGD and TRADES training, how far are the running, the batch and the
mixed kernel apart, why, and does the kernel predict what a step, or twenty, do to the network? docs/theory.md
has the theory. From checkpoints before training, after the first epoch, before each fall of a stepwise
learning rate and at the end the run's own training goes on for some steps, and what it did is compared with
what was predicted, in float64. PGD training at a constant rate is the control: a smaller step is predicted
better, whether the kernel is lazy or not.

Values of a line (a checkpoint): ``gap/INPUTS/KERNEL/...`` on the first rows of a batch of training examples,
clean or crafted by PGD-10, relative to ‖Θ_KERNEL‖; ``change/STEPS/MODE/INPUTS/PREDICTION/...`` on validation
examples, the network in evaluation mode or on the statistics of these examples as one batch; ``scale/...``
the mixed kernel's parts against the batch size, at the last checkpoint of the arms in SCALED;
``velocity``, how fast the run's own kernel turns there: stages of a single run could seldom be established.

Predictions: ``tangent`` J Δθ + (∂f/∂s) Δs with the changes as they were; ``no_drift`` without the buffers;
``settled`` with the buffers' drift taken in full, f(θ, s₊) − f(θ, s) + J(θ, s₊) Δθ; ``frozen`` likewise, with
the Δθ that the kernel of the checkpoint gives for the losses' derivatives as they were; ``running`` likewise,
with J_running in the place of J_batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab import data, metrics, modes, randomness
from tangentlab.kernels import kernel_gap, pullback, sgd_change, tangent_change
from tangentlab.probes import OutputChange, adversarial_change, drift_only, output_change
from tangentlab.records import read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig
from tangentlab.runs.again import LossTerm, Repeated, train_again
from tangentlab.runs.build import Examples, build_attack, build_data, build_model, resolve_device
from tangentlab.runs.evaluation import kept_checkpoints
from tangentlab.studies.gap_claims import BATCH_SIZES, CLAIMS, CONTROL, METHODS, SCALED, STEPS, judged
from tangentlab.studies.study import COLD, Study, configured
from tangentlab.training import load_weights

# Arm -> method and schedule.
ARMS = {method: (method, "piecewise") for method in METHODS} | {CONTROL: ("pgd", "constant")}
ROWS = 10  # class-balanced examples that have kernels, in a batch of the training's size
POINTS = 50  # validation examples on which changes are predicted
SCALED_ROWS = 5

# Configuration, epochs, how PGD and TRADES craft, and what else differs.
_TIERS: Mapping[int, tuple[str, int, tuple[str, ...], tuple[str, ...]]] = {
    0: ("digits", 11, ("--method.num_steps=10",), ()),
    1: ("fashion-mnist", 15, ("--method.num_steps=10",), (COLD,)),
    2: (
        "cifar10-narrow",
        15,
        ("--method.num_steps=3", "--method.step_size=4/255"),
        ("--channels_last=true",),
    ),
}
_SETTINGS = [
    "--training.batch_size=64",
    "--training.keep_every=1",
    "--probe.every=0.25",
    "--probe.size=40",
    "--evaluation.every=5",
    "--evaluation.num_steps=10",
    "--evaluation.test_num_steps=10",
    "--evaluation.test_size=500",
    "--threads=1",
]


def runs(tier: int, seeds: Sequence[int]) -> Mapping[str, RunConfig]:
    """Each arm with each seed."""
    base, epochs, crafting, words = _TIERS[tier]

    def config(arm: str, seed: int) -> RunConfig:
        method, schedule = ARMS[arm]
        own = [f"--name={arm}", f"--method={method}", f"--training.schedule={schedule}"]
        if method in ("pgd", "trades"):
            own += crafting
        every = [*own, f"--training.epochs={epochs}", *_SETTINGS, *words]
        return configured(base, " ".join(every), seed=seed)

    return {f"{arm}-{seed}": config(arm, seed) for arm in ARMS for seed in seeds}


def measure(folder: Path, config: RunConfig) -> Iterator[Mapping[str, Any]]:
    """A line for every checkpoint that is looked at."""
    examples = build_data(config)
    model = build_model(config, examples, resolve_device(config.device))
    velocity = _velocities(folder)
    (arm,) = (a for a, kind in ARMS.items() if kind == (config.method["name"], config.training.schedule))
    looked_at = _looked_at(config)
    for step, path in kept_checkpoints(folder).items():
        epoch = load_weights(path, model)["extra"]["epoch"]
        if epoch not in looked_at:
            continue
        line = {"arm": arm, "step": step, "epoch": epoch, **velocity(epoch)}
        line |= _gaps(model, config, examples)
        if epoch == looked_at[-1] and arm in SCALED:
            line |= _scaled(model, config, examples)
        yield line | _changes(model, config, examples, step)


_ERROR_LABEL = "relative error"
_PREDICTIONS = ("no_drift", "tangent", "settled", "frozen", "running")
FIGURES = (
    ValueFigure(
        key="error",
        title="How far the computed kernel is from the one that training follows",
        caption="‖Θ − Θ_running‖/‖Θ‖ with Θ the batch or the mixed kernel, on the same rows of a batch of "
        "training examples, clean or crafted by PGD-10.",
        y=tuple(
            Quantity(
                f"gap/{inputs}/{kernel}/relative_error", _ERROR_LABEL, f"{kernel}, {inputs} inputs", log=True
            )
            for kernel in ("batch", "mixed")
            for inputs in ("clean", "pgd")
        ),
        colour="arm",
        panels="y",
    ),
    ValueFigure(
        key="parts",
        title="What makes the mixed kernel's gap",
        caption="The part from the values of the statistics and the part from the derivative through them, "
        "relative to the mixed kernel, on PGD inputs.",
        y=tuple(
            Quantity(f"gap/pgd/mixed/{part}", "relative size", part, log=True)
            for part in ("values", "derivative")
        ),
        colour="y",
        panels="arm",
    ),
    ValueFigure(
        key="batch-size",
        title="Only the part from the values vanishes in large batches",
        caption="Both parts on the same clean rows in batches of two sizes, at the last checkpoint.",
        y=tuple(
            Quantity(f"scale/{size}/{part}", "relative size", f"{part}, batches of {size}", log=True)
            for part in ("values", "derivative")
            for size in BATCH_SIZES
        ),
        x="arm",
        colour="y",
    ),
    ValueFigure(
        key="step",
        title="One step of training, predicted",
        caption="Relative error of the predicted change of the outputs on clean validation examples in "
        "evaluation mode: J Δθ alone (no_drift), with the buffers' drift to first order (tangent) or in full "
        "(settled), and with the Δθ that the kernel of the checkpoint gives, with statistics of the batch "
        "(frozen) or running ones (running).",
        y=tuple(
            Quantity(f"change/1/evaluation/clean/{name}/relative_error", _ERROR_LABEL, name, log=True)
            for name in _PREDICTIONS
        ),
        colour="y",
        panels="arm",
    ),
    ValueFigure(
        key="steps",
        title="How long the kernel predicts training",
        caption="Cosine between the change of the outputs on PGD inputs, normalized as one batch, and what "
        "the frozen kernel says of it.",
        y=tuple(
            Quantity(
                f"change/{steps}/batch/pgd/frozen/cosine",
                "cosine",
                "1 step" if steps == 1 else f"{steps} steps",
            )
            for steps in STEPS
        ),
        colour="arm",
        panels="y",
    ),
    ValueFigure(
        key="jump",
        title="The perturbation's own jump",
        caption="‖f₊(x*₊) − f₊(x*)‖/‖f₊(x*) − f(x*)‖ on validation examples: what no kernel explains of the "
        "change on adversarial inputs, against what it may.",
        y=tuple(
            Quantity(
                f"change/{steps}/evaluation/pgd/jump",
                "jump over change",
                "1 step" if steps == 1 else f"{steps} steps",
                log=True,
            )
            for steps in STEPS
        ),
        colour="arm",
        panels="y",
    ),
    ValueFigure(
        key="velocity",
        title="By how fast the kernel turns",
        caption="Checkpoints by the angle a step that the class kernels of the run's own probe turn there, "
        "on clean inputs; each is an epoch of an arm.",
        y=(
            Quantity("gap/pgd/batch/relative_error", "gap, relative error on PGD inputs", log=True),
            Quantity(
                f"change/{STEPS[-1]}/batch/pgd/frozen/cosine", f"cosine of {STEPS[-1]} steps, predicted"
            ),
            Quantity("change/1/evaluation/pgd/jump", "jump over change, 1 step", log=True),
        ),
        x=Quantity("velocity", "angle per step, rad", log=True),
        point="epoch",
        colour="arm",
        panels="y",
    ),
)

STUDY = Study(
    "gap",
    CLAIMS,
    runs,
    measure,
    judged,
    FIGURES,
)


def _looked_at(config: RunConfig) -> list[int]:
    """Epochs: before training, after the first, before each fall of the learning rate, and the last."""
    epochs = config.training.epochs
    return sorted({0, 1, *(int(share * epochs) for share in config.training.milestones), epochs})


def _velocities(folder: Path) -> Callable[[float], dict[str, float]]:
    """epoch -> the velocity up to the snapshot there, before training to the next one; none without a probe,
    or once the network has died."""
    curve = list(zip(*read_run(folder).series("kernel/clean/class/angle_velocity"), strict=True))

    def at(epoch: float) -> dict[str, float]:
        return next(({"velocity": velocity} for time, velocity in curve if time >= epoch - 1e-9), {})

    return at


def _gaps(model: nn.Module, config: RunConfig, examples: Examples) -> dict[str, float]:
    """The three kernels on clean and on PGD inputs, with the statistics of a batch of the training's size."""
    values: dict[str, float] = {}
    for name, x in _batch(model, config, examples).items():
        gap = kernel_gap(model, x, rows=ROWS)
        for kernel, parts in (
            ("batch", ("values", "derivative", "cross")),
            ("mixed", ("mixed_values", "mixed_derivative")),
        ):
            whole: Tensor = getattr(gap, kernel)
            at = f"gap/{name}/{kernel}"
            values[f"{at}/relative_error"] = _ratio(whole - gap.running, whole)
            values[f"{at}/distance"] = _distance(whole, gap.running)
            for part in parts:
                values[f"{at}/{part.removeprefix('mixed_')}"] = _ratio(getattr(gap, part), whole)
        values[f"gap/{name}/batch~mixed/distance"] = _distance(gap.batch, gap.mixed)
    return values


def _scaled(model: nn.Module, config: RunConfig, examples: Examples) -> dict[str, float]:
    """The parts of the mixed kernel's gap on the same clean rows in batches of BATCH_SIZES."""
    values: dict[str, float] = {}
    for size in BATCH_SIZES:
        x = examples.train.x(_index(config, examples, size), next(model.parameters()).device)
        gap = kernel_gap(model, x, rows=SCALED_ROWS)
        values[f"scale/{size}/values"] = _ratio(gap.mixed_values, gap.mixed)
        values[f"scale/{size}/derivative"] = _ratio(gap.mixed_derivative, gap.mixed)
    return values


def _changes(model: nn.Module, config: RunConfig, examples: Examples, step: int) -> dict[str, float]:
    """What the run's next steps did to the outputs on validation examples, against what was predicted."""
    values: dict[str, float] = {}
    before = copy.deepcopy(model).double()
    index = data.class_balanced(examples.validation.labels, POINTS, seed=config.seed)
    device = next(model.parameters()).device
    x = examples.validation.x(index, device).double()
    y = examples.validation.labels[index].to(device)
    attack = build_attack(config, num_steps=10)
    for steps in STEPS:
        after = copy.deepcopy(model)
        done = train_again(config, examples, after, step=step, steps=steps)
        after.double()
        frozen = _kernel_steps(before, done, config, "batch")
        running = _kernel_steps(before, done, config, "running")
        settled = drift_only(before, after)
        adversarial = adversarial_change(before, after, x, y, attack, seed=config.seed)
        values[f"change/{steps}/evaluation/pgd/jump"] = _ratio(adversarial.jump, adversarial.network.actual)
        for name, points in (("clean", x), ("pgd", adversarial.x_before)):
            at = f"change/{steps}/evaluation/{name}"
            seen = adversarial.network if name == "pgd" else output_change(before, after, points)
            predictions = {
                "tangent": seen.parameters + seen.buffers,
                "no_drift": seen.parameters,
                "settled": seen.drift + seen.parameters_after,
                "frozen": seen.drift + tangent_change(settled, points, frozen),
                "running": seen.drift + tangent_change(settled, points, running),
            }
            values |= _compared(at, seen, predictions)
            values[f"{at}/drift"] = _ratio(seen.drift, seen.actual)
            at = f"change/{steps}/batch/{name}"
            seen = output_change(before, after, points, batchnorm="batch")
            along = {
                "tangent": seen.parameters,
                "frozen": tangent_change(before, points, frozen, batchnorm="batch"),
                "running": tangent_change(before, points, running, batchnorm="batch"),
            }
            values |= _compared(at, seen, along)
            if steps == 1:
                values |= _terms(at, before, points, done[0].terms)
    return values


def _kernel_steps(
    before: nn.Module, done: Sequence[Repeated], config: RunConfig, batchnorm: str
) -> dict[str, Tensor]:
    """Δθ after the steps if the Jacobian had stayed: each gradient is J(X*)ᵀ ∂L/∂f, J that of ``before`` and
    ∂L/∂f as it was."""
    start = {name: p.detach() for name, p in before.named_parameters() if p.requires_grad}
    moved = {name: torch.zeros_like(p) for name, p in start.items()}
    momenta: dict[str, Tensor] = {}
    for made in done:
        pulled = [
            pullback(before, term.x.double(), term.cotangent.double(), batchnorm=batchnorm)
            for term in made.terms
        ]
        change, momenta = sgd_change(
            {name: start[name] + moved[name] for name in start},
            {name: sum((one[name] for one in pulled), torch.zeros_like(p)) for name, p in start.items()},
            momenta,
            learning_rate=made.learning_rate,
            momentum=config.training.momentum,
            weight_decay=config.training.weight_decay,
        )
        moved = {name: moved[name] + change[name] for name in start}
    return moved


def _terms(at: str, before: nn.Module, x: Tensor, terms: Sequence[LossTerm]) -> dict[str, float]:
    """Where the loss has two terms, TRADES's clean and crafted one, how their effects Θ ∂L/∂f compare."""
    if len(terms) != 2:
        return {}
    clean, crafted = (
        tangent_change(
            before, x, pullback(before, term.x.double(), term.cotangent.double()), batchnorm="batch"
        )
        for term in terms
    )
    return {f"{at}/crafted_term": _ratio(crafted, clean), f"{at}/terms_cosine": _cosine(crafted, clean)}


def _compared(at: str, seen: OutputChange, predictions: Mapping[str, Tensor]) -> dict[str, float]:
    values = {f"{at}/size": float(seen.actual.square().mean().sqrt())}
    for name, predicted in predictions.items():
        values[f"{at}/{name}/relative_error"] = _ratio(predicted - seen.actual, seen.actual)
        values[f"{at}/{name}/cosine"] = _cosine(predicted, seen.actual)
    return values


def _batch(model: nn.Module, config: RunConfig, examples: Examples) -> dict[str, Tensor]:
    """Training examples, clean and crafted by PGD-10 in evaluation mode."""
    device = next(model.parameters()).device
    index = _index(config, examples, config.training.batch_size)
    x, y = examples.train.x(index, device), examples.train.labels[index].to(device)
    noise = randomness.generator(config.seed, "gap", device=device)
    with modes.evaluation(model):
        return {"clean": x, "pgd": build_attack(config, num_steps=10)(model, x, y, generator=noise)}


def _index(config: RunConfig, examples: Examples, size: int) -> Tensor:
    """Of a batch of training examples, whose first ROWS are the same for every size."""

    def drawn(size: int, name: str) -> Tensor:
        return data.class_balanced(examples.train.labels, size, seed=config.seed, name=name)

    rows, others = drawn(ROWS, "gap/rows"), drawn(size, "gap/others")
    return torch.cat([rows, others[~torch.isin(others, rows)]])[:size]


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part.norm() / whole.norm())


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def _distance(K1: Tensor, K2: Tensor) -> float:
    """Mean over the classes."""
    return float(metrics.kernel_distance(K1, K2).mean())
