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

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from tangentlab import modes, randomness
from tangentlab.attacks import Attack
from tangentlab.data import Split
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig, load_config
from tangentlab.runs.build import build_attack, build_data, build_model, resolve_device
from tangentlab.runs.evaluation import checkpoint_path, count_correct
from tangentlab.studies.claims import PAPER, Claim, Verdict, judge_seeds
from tangentlab.studies.study import COLD, Study, Values
from tangentlab.training import load_weights, recalibrate

STEPS = 20  # of the evaluation's PGD, each eps/4
CRAFTING_STEPS = 10  # of the PGD that crafts the training inputs whose statistics are taken
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
    "updates-loss-clean": ("--method.buffer_updates=[loss, clean]",),
    "updates-clean-loss": ("--method.buffer_updates=[clean, loss]",),
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

CLEAN_STATISTICS = Claim(
    "normalization/clean-statistics",
    "A PGD-trained network gains more than 0.5 points of clean accuracy when the statistics of clean inputs "
    "replace those it was trained with.",
    "clean accuracy with clean population statistics minus as trained, points",
    0.5,
)
TRADE = Claim(
    "normalization/trade",
    "Statistics of clean instead of crafted inputs raise a PGD-trained network's clean accuracy and lower "
    "its robust accuracy, each by more than 0.5 points.",
    "the smaller of the gain in clean and the loss in robust accuracy, points",
    0.5,
    source=PAPER,
)
BATCH = Claim(
    "normalization/batch",
    "Normalized by the crafted batch of 128 and attacked through its statistics or with them held, a "
    "PGD-trained network has more than 1 point less robust accuracy than as trained.",
    "robust accuracy as trained minus by the current batch, points",
    1.0,
)
NULL = Claim(
    "normalization/null",
    "Averaged over batches of 128, biased and unbiased variances differ by less than 0.2 points of clean and "
    "robust accuracy (standard and PGD training).",
    "the larger of the two absolute differences, mean of both methods, points",
    0.2,
    above=False,
)
SMALL_BATCHES = Claim(
    "normalization/small-batches",
    "Averaged over batches in which a channel of the last BatchNorm has at most 64 values, unbiased "
    "variances give more than 0.2 points more clean accuracy than biased ones (standard and PGD training).",
    "clean accuracy with unbiased minus biased variances, mean of both methods, points",
    0.2,
    source=PAPER,
)
CRAFTING = Claim(
    "normalization/crafting",
    "PGD training that crafts on running statistics has more than 0.5 points more clean accuracy than one "
    "that crafts on batch statistics.",
    "clean accuracy as trained, crafted on running minus batch statistics, points",
    0.5,
    source="Pang et al. 2021, arXiv 2010.00467",
)
DUAL = Claim(
    "normalization/dual",
    "Of dual BatchNorm the clean branch has more clean and the crafted branch more robust accuracy, each by "
    "more than 1 point.",
    "the smaller of the two differences, points",
    1.0,
    source="Xie & Yuille 2020, arXiv 1906.03787",
)
NONE = Claim(
    "normalization/none",
    "PGD training without normalization is at least as robust as with BatchNorm.",
    "robust accuracy without normalization minus with BatchNorm as trained, points",
    0.0,
    source="Wang et al. 2022, arXiv 2207.01156",
)


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
    steps = (
        "--method.num_steps=3",
        f"--method.step_size={load_config(chosen.config, chosen.overrides).eps / 2}",
    )
    found: dict[str, RunConfig] = {}
    for name, own in words.items():
        crafting = steps if own[1] in ("pgd", "trades") else ()
        overrides = (*_COMMON, *chosen.overrides, *own, *crafting, "--name", name)
        config = load_config(chosen.config, overrides)
        found |= {f"{name}-{seed}": replace(config, seed=seed) for seed in seeds}
    return found


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


class Accuracies:
    """One seed's lines; ``smallest`` is the least batch size of the averages.

    >>> line = {"variant": "pgd", "statistics": "clean", "variance": "biased", "clean_accuracy": 0.5}
    >>> Accuracies([line]).clean("pgd", population("clean", "biased"))
    50.0
    """

    def __init__(self, lines: Iterable[Values]) -> None:
        names = [entry.name for entry in fields(Setting)]
        self._lines = {(line["variant"], tuple(map(line.get, names))): line for line in lines}
        averaged = (line for line in self._lines.values() if line.get("momentum") is not None)
        self.smallest = min((int(line["batch_size"]) for line in averaged), default=0)

    def clean(self, variant: str, setting: Setting | None = None) -> float:
        """In points; raises KeyError where it was not measured."""
        return self._accuracy("clean_accuracy", variant, setting)

    def robust(self, variant: str, setting: Setting | None = None) -> float:
        """In points; raises KeyError where it was not measured."""
        return self._accuracy("robust_accuracy", variant, setting)

    def _accuracy(self, name: str, variant: str, setting: Setting | None) -> float:
        line = self._lines[variant, tuple(asdict(setting or Setting()).values())]
        return 100.0 * float(line[name])


def _trade(found: Accuracies, variant: str, clean: Setting, crafted: Setting) -> float:
    """The smaller of what ``clean`` gains in clean and loses in robust accuracy."""
    gain = found.clean(variant, clean) - found.clean(variant, crafted)
    return min(gain, found.robust(variant, crafted) - found.robust(variant, clean))


def _null(found: Accuracies) -> float:
    def differs(method: str) -> float:
        unbiased, biased = average(USUAL), average(USUAL, "biased")
        clean = found.clean(method, unbiased) - found.clean(method, biased)
        return max(abs(clean), abs(found.robust(method, unbiased) - found.robust(method, biased)))

    return fmean(map(differs, GRID))


def _small_batches(found: Accuracies) -> float:
    unbiased, biased = average(found.smallest), average(found.smallest, "biased")
    return fmean(found.clean(method, unbiased) - found.clean(method, biased) for method in GRID)


EFFECTS: dict[Claim, Callable[[Accuracies], float]] = {
    CLEAN_STATISTICS: lambda found: found.clean("pgd", population("clean")) - found.clean("pgd"),
    TRADE: lambda found: _trade(found, "pgd", population("clean"), population("crafted")),
    BATCH: lambda found: found.robust("pgd") - found.robust("pgd", current(USUAL)),
    NULL: _null,
    SMALL_BATCHES: _small_batches,
    CRAFTING: lambda found: found.clean("running") - found.clean("updates-loss"),
    DUAL: lambda found: _trade(found, "dual", *(Setting(branch=branch) for branch in modes.BRANCHES)),
    NONE: lambda found: found.robust("none") - found.robust("pgd"),
}


def judged(values: Sequence[Values], setting: str) -> list[Verdict]:
    """A verdict for each claim; one that rests on runs that the tier leaves out has no seeds."""
    return judge_seeds(values, setting, EFFECTS, Accuracies)


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
