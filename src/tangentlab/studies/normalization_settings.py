"""What the study of normalization trains, by tier, and what each network is evaluated with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tangentlab import modes
from tangentlab.runs import RunConfig
from tangentlab.studies.study import COLD, configured

USUAL, MIDDLE = 128, 16  # examples a batch


@dataclass(frozen=True)
class Tier:
    """What a tier trains and measures.

    Args:
        config: a shipped configuration.
        overrides: of it.
        methods: whose networks are evaluated with other statistics.
        population: training inputs that statistics are taken of.
        points: test points; fewer where the data set has fewer.
        smallest: a batch size at which the last BatchNorm layer sees m ≤ 64 values a channel: its feature
            maps have 4, 49 and 16 places.
        variants: names of PGD training with other settings.
    """

    config: str
    overrides: tuple[str, ...]
    methods: tuple[str, ...]
    population: int
    points: int
    smallest: int
    variants: tuple[str, ...]


_COMMON = (
    "--data.validation_size=300",
    "--probe.size=0",
    "--threads=1",
    "--channels_last=true",
    "--training.schedule=linear",
    "--evaluation.every=1000",
    "--evaluation.num_steps=5",
    "--evaluation.test_num_steps=5",
    "--evaluation.test_size=100",
)
# PGD training but for these overrides.
VARIANTS: dict[str, tuple[str, ...]] = {
    # BatchNorm in a training step. In the first three crafting does not read the buffers: the weights are
    # the base run's, and only what is evaluated differs.
    "updates-loss": ("--method.buffer_updates=[loss]",),
    "updates-loss-clean": ("--method.buffer_updates=[loss,clean]",),
    "updates-clean-loss": ("--method.buffer_updates=[clean,loss]",),
    "running": ("--method.crafting_statistics=running", "--method.buffer_updates=[loss]"),
    "running-clean": ("--method.crafting_statistics=running", "--method.buffer_updates=[clean]"),
    "running-momentum": (
        "--method.crafting_statistics=running",
        "--method.buffer_updates=[loss]",
        "--training.batchnorm_momentum=0.01",
    ),
    # Half the loss on clean inputs, through the same BatchNorm or one of its own.
    "half": ("--method.clean_weight=0.5",),
    "dual": ("--method.clean_weight=0.5", "--model.normalization=dual"),
    "group": ("--model.normalization=group",),
    "none": ("--model.normalization=none",),
    "input-channels": ("--data.normalize=true",),
    "input-each": ("--data.normalize=per-image",),
}

ALL = ("standard", "fgsm_rs", "n_fgsm", "pgd", "trades")
TIERS = {
    0: Tier(
        "digits",
        ("--eps=0.15", "--training.epochs=12", "--training.batch_size=64"),
        ALL,
        1024,
        360,
        8,
        tuple(VARIANTS),
    ),
    1: Tier("fashion-mnist", (COLD, "--training.epochs=15"), ALL, 2048, 1000, 1, tuple(VARIANTS)),
    2: Tier(
        "cifar10-narrow",
        ("--training.epochs=15",),
        ("standard", "fgsm_rs", "pgd"),
        2048,
        500,
        2,
        ("updates-loss", "running", "dual", "none"),
    ),
}
GRID = ("standard", "pgd")  # methods whose networks meet every batch size, momentum and variance


@dataclass(frozen=True)
class Setting:
    """What the evaluated network normalizes with.

    Args:
        statistics: trained, clean, crafted, mixture, clean-batch or batch.
        variance: biased or unbiased; None where nothing is estimated.
        batch_size: examples a batch of the averages or of the current batch; None for the whole population.
        momentum: of the averages, 0 the plain one; None for the whole population.
        branch: of dual BatchNorm, at test time; None without.
    """

    statistics: str = "trained"
    variance: str | None = None
    batch_size: int | None = None
    momentum: float | None = None
    branch: str | None = None


def population(statistics: str, variance: str = "unbiased") -> Setting:
    """Of all inputs at once."""
    return Setting(statistics, variance)


def average(batch_size: int, variance: str = "unbiased", momentum: float = 0.0) -> Setting:
    """Of clean inputs' batches."""
    return Setting("clean", variance, batch_size, momentum)


def current(batch_size: int) -> Setting:
    """PyTorch normalizes a batch by its biased variance."""
    return Setting("batch", "biased", batch_size)


def settings(variant: str, tier: Tier) -> list[Setting]:
    """Those that a run's network is evaluated in."""
    if variant == "dual":
        return [Setting(branch=branch) for branch in modes.BRANCHES]
    found = [Setting()]
    if variant in tier.methods:
        found += [population(statistics) for statistics in ("clean", "crafted", "mixture")]
        found += [Setting("clean-batch", "biased", USUAL), current(USUAL)]
    if variant in GRID:
        # The population's estimators differ by one in some 10^5 values: one pair shows it.
        found += [population("clean", "biased"), current(MIDDLE)]
        found += [Setting("clean-batch", variance, MIDDLE) for variance in ("biased", "unbiased")]
        for size in (USUAL, MIDDLE, tier.smallest):
            found += [average(size, "biased")]
            found += [average(size, momentum=momentum) for momentum in (0.0, 0.1, 1.0)]
    return found


def runs(tier: int, seeds: Sequence[int]) -> dict[str, RunConfig]:
    """VARIANT-SEED -> configuration; a method's own run is the variant of its name."""
    chosen = TIERS[tier]
    words: dict[str, tuple[str, ...]] = {method: ("--method", method) for method in chosen.methods}
    words |= {name: ("--method", "pgd", *VARIANTS[name]) for name in chosen.variants}
    # Three steps of eps/2 reach the ball's surface at a third of PGD-10's cost.
    step = configured(chosen.config, " ".join(chosen.overrides)).eps / 2
    found: dict[str, RunConfig] = {}
    for name, own in words.items():
        steps = ("--method.num_steps=3", f"--method.step_size={step}") if own[1] in ("pgd", "trades") else ()
        overrides = " ".join((*_COMMON, *chosen.overrides, *own, *steps, "--name", name))
        found |= {f"{name}-{seed}": configured(chosen.config, overrides, seed=seed) for seed in seeds}
    return found
