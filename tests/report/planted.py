"""Run folders whose truth is planted: when robust accuracy falls, when the kernels part, and the stages.

All written through tangentlab.records, as a run writes them. Time is counted in epochs of 20 steps, a record
every half epoch.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tangentlab.metrics import (
    entropy_rank,
    kernel_distance,
    kernel_specialization,
    participation_ratio,
    specialization_score,
    wilson_interval,
)
from tangentlab.records import Measurement, Run, read_run
from tangentlab.report.subject import Subject, subjects

CLASSES, EXAMPLES, STEPS = 4, 12, 20
INPUTS = ("clean", "fgsm", "pgd", "pgd-once")


@dataclass(frozen=True)
class Plan:
    """What is planted in one run; times in epochs, None for never."""

    name: str
    method: str
    collapse: float | None = None
    parting: float | None = None
    lazy: tuple[float, float] = (4.0, 99.0)
    epochs: int = 16
    robust: float = 0.5
    seed: int = 0
    kernels: bool = True


@dataclass(frozen=True)
class Report:
    """A report made once, read by many tests."""

    html: Path
    runs: list[Path]

    def subjects(self) -> list[Subject]:
        return subjects([read_run(run) for run in self.runs])


FGSM = Plan("fgsm", "fgsm", collapse=11.25, parting=9.25, lazy=(4.0, 9.0))
PGD = Plan("pgd", "pgd")
STANDARD = Plan("standard", "standard", robust=0.02)


def write(folder: Path, plan: Plan, *, finish: bool = True, until: float | None = None) -> Path:
    """One run folder. ``until`` ends the records early; without ``finish`` the run was killed there."""
    torch_rng = torch.Generator().manual_seed(plan.seed + len(plan.name))
    run = Run.create(folder, _config(plan))
    base = torch.randn(CLASSES, EXAMPLES, 40, generator=torch_rng, dtype=torch.float64)
    drift = torch.randn(CLASSES, EXAMPLES, 40, generator=torch_rng, dtype=torch.float64)
    perturbed = torch.randn(CLASSES, EXAMPLES, 40, generator=torch_rng, dtype=torch.float64)
    first: dict[str, torch.Tensor] = {}
    angle = 0.0
    for half in range(2 * plan.epochs + 1):
        epoch = half / 2
        if until is not None and epoch > until:
            break
        step = round(epoch * STEPS)
        noise = math.exp(0.1 * float(torch.randn((), generator=torch_rng)))
        speed = _speed(plan, epoch) * noise
        angle += speed * STEPS / 2
        values: dict[str, Any] = {"epoch": epoch, **_accuracies(plan, epoch, noise), **_costs(plan, epoch)}
        kernels: dict[str, torch.Tensor] = {}
        if plan.kernels:
            kernels = _kernels(plan, epoch, angle, base, drift, perturbed)
            first = first or kernels
            values |= _metrics(plan, epoch, speed if half else None, kernels, first)
        run.write(Measurement(step, values, kernels))
        run.write_status(
            state="running", step=step, steps=plan.epochs * STEPS, epoch=epoch, epochs=plan.epochs
        )
    with contextlib.suppress(KeyboardInterrupt), run:
        if not finish:
            raise KeyboardInterrupt  # what a kill leaves: no last word in status.json
        run.write_evaluations(_evaluations(plan))
        best = {"step": step, "epoch": epoch, "robust_accuracy": plan.robust}
        run.write_status(
            state="finished", step=step, steps=step, epoch=epoch, epochs=plan.epochs, message="", best=best
        )
    return folder


def write_foreign(folder: Path) -> Path:
    """A loop that is not ours: steps and kernel lines, no epoch, no accuracies, no configuration."""
    with Run.create(folder) as run:
        for step in range(0, 400, 40):
            values = {
                "kernel/clean/trace/angle_velocity": 1e-3 / (1 + step),
                "kernel/clean/trace/entropy_rank": 3.0 + step / 100,
                "kernel/clean/trace/top_eigenvalues": [9.0, 1.0, 0.0],
                "note": "by hand",
            }
            run.write(Measurement(step, values))
    return folder


def write_empty(folder: Path) -> Path:
    """Created, and nothing more."""
    Run.create(folder, {"name": "empty"}).close()
    return folder


def _config(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "seed": plan.seed,
        "method": {"name": plan.method, "eps": 0.25},
        "data": {"name": "digits"},
        "model": {"name": "small_cnn", "width": 8},
        "training": {"epochs": plan.epochs, "batch_size": 64, "learning_rate": 0.2},
    }


def _speed(plan: Plan, epoch: float) -> float:
    """Radians per step: a fall until the lazy stage, and from its end on five times the lazy level."""
    start, end = plan.lazy
    lazy = 3e-4
    if epoch >= end:
        return 5 * lazy
    return lazy * math.exp(1.1 * max(start - epoch, 0.0))


def _accuracies(plan: Plan, epoch: float, noise: float) -> dict[str, float]:
    learned = 1 - math.exp(-epoch / 2)
    wobble = 0.01 * (noise - 1) / 0.1
    robust = 0.08 + (plan.robust - 0.08) * learned
    fgsm = min(robust + 0.06 * learned, 1.0)
    if plan.collapse is not None and epoch > plan.collapse:
        robust, fgsm = 0.05, 0.85
    clean = 0.1 + (0.96 if plan.method == "standard" else 0.86) * learned
    return {
        "clean_accuracy": min(max(clean + wobble, 0.0), 1.0),
        "fgsm_accuracy": min(max(fgsm + wobble, 0.0), 1.0),
        "robust_accuracy": min(max(robust + wobble, 0.0), 1.0),
        "train_loss": 2.3 * math.exp(-epoch / 3),
    }


def _costs(plan: Plan, epoch: float) -> dict[str, float]:
    passes = {"standard": 3, "fgsm": 5, "pgd": 23}[plan.method]
    return {
        "cost": passes * epoch,
        "train_seconds": passes * epoch / 10,
        "probe_seconds": 0.05 * passes * epoch / 10,
    }


def _kernels(
    plan: Plan, epoch: float, angle: float, base: torch.Tensor, drift: torch.Tensor, perturbed: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Features that turn by ``angle``, that take on the classes, and that adversarial inputs perturb."""
    labels = torch.arange(EXAMPLES) % CLASSES
    own = torch.nn.functional.one_hot(labels, CLASSES).T.double()[:, :, None]
    clean = (1 + 0.5 * epoch * own) * (math.cos(angle) * base + math.sin(angle) * drift)
    parted = plan.parting is not None and epoch > plan.parting
    shifts = {"clean": 0.0, "fgsm": 0.3, "pgd": 0.9 if parted else 0.33, "pgd-once": 0.2}
    features = {inputs: clean + shift * perturbed for inputs, shift in shifts.items()}
    return {f"{inputs}/class": (f @ f.mT / 40).float() for inputs, f in features.items()}


def _metrics(
    plan: Plan,
    epoch: float,
    speed: float | None,
    kernels: dict[str, torch.Tensor],
    first: dict[str, torch.Tensor],
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    y = torch.arange(EXAMPLES) % CLASSES
    for name, kernel in kernels.items():
        matrix = kernel_specialization(kernel, y)
        values |= {
            f"kernel/{name}/angle_velocity": speed,
            f"kernel/{name}/distance_from_first": float(kernel_distance(kernel, first[name]).mean()),
            f"kernel/{name}/entropy_rank": float(entropy_rank(kernel).mean()),
            f"kernel/{name}/participation_ratio": float(participation_ratio(kernel).mean()),
            f"kernel/{name}/top_eigenvalues": torch.linalg.eigvalsh(kernel).mean(0).flip(0)[:6].tolist(),
            f"kernel/{name}/specialization": float(specialization_score(matrix)),
            f"kernel/{name}/specialization_matrix": matrix.tolist(),
        }
    gap = 0.004 + 0.001 * math.sin(epoch)
    if plan.parting is not None and epoch > plan.parting:
        gap = min(0.5, 0.1 + 0.1 * (epoch - plan.parting))
    values["kernel/fgsm~pgd/class/distance"] = gap
    for pair in ("clean~fgsm", "clean~pgd"):
        a, b = pair.split("~")
        distance = kernel_distance(kernels[f"{a}/class"], kernels[f"{b}/class"]).mean()
        values[f"kernel/{pair}/class/distance"] = float(distance)
    return values


def _evaluations(plan: Plan) -> list[dict[str, Any]]:
    lines = []
    attacks: dict[str, dict[str, Any]] = {
        "none": {},
        "fgsm": {"eps": 0.25},
        "pgd": {"eps": 0.25, "step_size": 0.0625, "num_steps": 50, "num_restarts": 10},
    }
    for checkpoint in ("best", "last"):
        fallen = checkpoint == "last" and plan.collapse is not None
        correct = {
            "none": 330,
            "fgsm": 300 if fallen else 190,
            "pgd": 11 if fallen else int(360 * plan.robust),
        }
        for attack, settings in attacks.items():
            lines.append(
                {
                    "checkpoint": checkpoint,
                    "step": plan.epochs * STEPS,
                    "epoch": plan.epochs,
                    "split": "test",
                    "attack": attack,
                    "settings": settings,
                    "n": 360,
                    "correct": correct[attack],
                    "accuracy": correct[attack] / 360,
                    "interval": list(wilson_interval(correct[attack], 360)),
                    "seconds": 0.5,
                }
            )
    return lines
