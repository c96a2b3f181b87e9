"""Which statistics BatchNorm normalizes with: what each costs in clean and in robust accuracy.

Question: the paper (arXiv 2312.02236) holds that global and batch statistics affect clean and robust accuracy
differently, and that BatchNorm's estimators should be unbiased. Networks of five methods are evaluated with
other statistics than they were trained with; PGD-trained ones are trained with other BatchNorm settings, with
separate statistics (dual), with GroupNorm, without normalization, and with other input normalizations.

The attack always sees what the defender normalizes with:

trained      the buffers as training left them, or no BatchNorm at all
clean, crafted, mixture
             buffers set anew from the first ``population`` training inputs, clean, crafted by PGD from the
             network as trained, or both: exactly (no batch size), or as averages of batches with a momentum
clean-batch  each test batch by its own clean inputs' statistics, held while it is attacked: as if few
             examples of a batch were attacked
batch        the current batch's statistics, of the clean batch and of the crafted one; every output depends
             on the whole batch. PGD climbs the batch's summed loss through the statistics, or each example's
             with the statistics held at the clean batch's; of each batch the one that leaves fewer correct
             counts. The first alone spends itself on few examples: of a standard network on digits it left
             half of a batch correct, where the second left an eighth

Robust accuracy is PGD-20's from a random start on the first test points; nothing stronger is claimed.
Hardware and time: a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from tangentlab import modes, randomness
from tangentlab.attacks import Attack
from tangentlab.data import Split
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig
from tangentlab.runs.build import build_attack, build_data, build_model, resolve_device
from tangentlab.runs.evaluation import checkpoint_path, count_correct
from tangentlab.studies.normalization_claims import EFFECTS, judged
from tangentlab.studies.normalization_settings import ALL, TIERS, USUAL, Setting, runs, settings
from tangentlab.studies.study import Study, Values
from tangentlab.training import load_weights, recalibrate

STEPS = 20  # of the evaluation's PGD, each eps/4
CRAFTING_STEPS = 10  # of the PGD that crafts the training inputs whose statistics are taken


def measure(folder: Path, config: RunConfig) -> Iterator[Values]:
    """Clean and robust accuracy of the last checkpoint in each of its settings."""
    tier = next(tier for tier in TIERS.values() if tier.config.startswith(config.data.name))
    examples = build_data(config)
    model = build_model(config, examples, resolve_device(config.device))
    load_weights(checkpoint_path(folder, "last"), model)
    inputs = examples.train.select(torch.arange(min(tier.population, len(examples.train))))
    points = examples.test.select(torch.arange(min(tier.points, len(examples.test))))
    attack = build_attack(config, num_steps=STEPS)
    for setting in settings(config.name, tier):
        with modes.buffers_kept(model), _branch(model, setting):
            if setting.statistics in ("clean", "crafted", "mixture"):
                _recalibrate(model, inputs, setting, config)
            count = _count_in_batches if setting.statistics in ("batch", "clean-batch") else _count
            correct = {
                "clean_accuracy": count(model, points, None, setting, config.seed),
                "robust_accuracy": count(model, points, attack, setting, config.seed),
            }
        accuracies = {name: number / len(points) for name, number in correct.items()}
        yield {"variant": config.name, **asdict(setting), **accuracies, "n": len(points)}


@contextmanager
def _branch(model: nn.Module, setting: Setting) -> Iterator[None]:
    if setting.branch is None:
        yield
        return
    with modes.branch(model, setting.branch):
        yield


def _recalibrate(model: nn.Module, inputs: Split, setting: Setting, config: RunConfig) -> None:
    attack = build_attack(config, num_steps=CRAFTING_STEPS)
    kinds: dict[str, Sequence[Attack | None]] = {
        "clean": (None,),
        "crafted": (attack,),
        "mixture": (None, attack),
    }
    assert setting.variance is not None
    recalibrate(
        model,
        _batches(inputs, setting.batch_size or USUAL, _device(model)),
        inputs=kinds[setting.statistics],
        variance=setting.variance,
        momentum=setting.momentum,
        generator=randomness.generator(config.seed, "normalization/crafting", device=_device(model)),
    )


def _count(model: nn.Module, points: Split, attack: Attack | None, setting: Setting, seed: int) -> int:
    """Each example on its own."""
    return count_correct(model, points, attack, seed=seed, device=_device(model))


def _count_in_batches(
    model: nn.Module, points: Split, attack: Attack | None, setting: Setting, seed: int
) -> int:
    """Batch by batch, by the batch's statistics: held at the clean inputs', or of what is fed."""
    correct, device = 0, _device(model)
    assert setting.batch_size is not None
    assert setting.variance is not None
    own = "running" if setting.statistics == "clean-batch" else "batch"
    for number, (x, y) in enumerate(_batches(points, setting.batch_size, device)):
        recalibrate(model, [x], variance=setting.variance)  # what "running" reads
        left = []
        for crafting in {own, "running"}:
            with modes.evaluation(model), torch.no_grad():
                fed = x
                if attack is not None:
                    noise = randomness.generator(seed, "normalization/evaluation", number, device=device)
                    with modes.batchnorm(model, statistics=crafting):
                        fed = attack(model, x, y, generator=noise)
                with modes.batchnorm(model, statistics=own):
                    left.append(int((model(fed).argmax(1) == y).sum()))
        correct += min(left)
    return correct


def _batches(split: Split, size: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(split), size):
        part = slice(start, start + size)
        yield split.x(part, device), split.labels[part].to(device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


ACCURACIES = (
    Quantity("clean_accuracy", "clean accuracy", percent=True),
    Quantity("robust_accuracy", "robust accuracy", percent=True),
)
FIGURES = (
    ValueFigure(
        key="statistics",
        title="Whose statistics the network normalizes with",
        caption="Running statistics as trained, and those of clean inputs, crafted inputs or both, over the "
        f"population. Robust accuracy is PGD-{STEPS}'s.",
        y=ACCURACIES,
        x="statistics",
        panels="y",
        where={"batch_size": None, "variance": (None, "unbiased"), "variant": ALL},
    ),
    ValueFigure(
        key="current-batch",
        title="Normalized by the current batch",
        caption="By the statistics of the batch's clean inputs, held (clean-batch), or of what is fed, with "
        "the attack through them or with them held, whichever leaves fewer correct (batch).",
        y=ACCURACIES,
        x="batch_size",
        panels="y",
        views="statistics",
        where={"statistics": ("clean-batch", "batch"), "variance": "biased"},
    ),
    ValueFigure(
        key="variance",
        title="Biased and unbiased variances",
        caption="Statistics of clean inputs, averaged over batches of each size.",
        y=ACCURACIES,
        x="batch_size",
        colour="variance",
        panels="y",
        views="method",
        where={"statistics": "clean", "momentum": 0.0},
    ),
    ValueFigure(
        key="momentum",
        title="Momentum of the averages",
        caption="Statistics of clean inputs, unbiased variances: the plain average (0), an exponential one, "
        "and the last batch's alone (1).",
        y=ACCURACIES,
        x="momentum",
        colour="batch_size",
        panels="y",
        views="method",
        where={"statistics": "clean", "variance": "unbiased", "momentum": (0.0, 0.1, 1.0)},
    ),
    ValueFigure(
        key="training",
        title="PGD training with other normalizations",
        caption="Evaluated as trained. Above: BatchNorm's settings in a training step; then half the loss on "
        "clean inputs, other layers, and other scales of the inputs.",
        y=ACCURACIES,
        x="variant",
        panels="y",
        where={"statistics": "trained", "branch": None, "method": "pgd"},
    ),
    ValueFigure(
        key="dual",
        title="The two branches of dual BatchNorm",
        caption="At test time all inputs go through one branch; the attack too.",
        y=ACCURACIES,
        x="branch",
        panels="y",
        where={"variant": "dual"},
    ),
)

STUDY = Study("normalization", tuple(EFFECTS), runs, measure, judged, FIGURES)
