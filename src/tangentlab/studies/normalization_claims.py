"""The claims of the study of normalization, and what its raw values say of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from statistics import fmean

from tangentlab import modes
from tangentlab.studies.claims import PAPER, Claim, Verdict, judge_seeds
from tangentlab.studies.normalization_settings import GRID, USUAL, Setting, average, current, population
from tangentlab.studies.study import Values

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
