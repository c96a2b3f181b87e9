"""The claims of the study of frozen kernels, and what its raw values say of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tangentlab.studies.claims import PAPER, Claim, Verdict, judge_seeds
from tangentlab.studies.study import Values

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
SETTLED = Claim(
    "transfer/settled",
    "Once the learning rate has fallen PGD training's frozen kernel suffices: trained likewise it ends less "
    "than 2 points less robust than the network.",
    "robust accuracy of the network at the end minus that of the frozen one, offset kept, points",
    2.0,
    above=False,
    source=PAPER,
)
LEARNS = Claim(
    "transfer/learns",
    "Frozen in the middle PGD training's kernel still learns robustness: trained on one-step examples it is "
    "more robust than the network was there, by more than 0 points.",
    "robust accuracy of the frozen network minus that of the network in the middle, offset kept, points",
    0.0,
)
EARLY = Claim(
    "transfer/early",
    "Frozen after the first fifteenth of PGD training the kernel does not suffice: trained likewise it makes "
    "less than half of what the network still gains in robust accuracy.",
    "gain of the frozen network over the network at that moment, over the network's own, offset kept",
    0.5,
    above=False,
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
KEEPS = Claim(
    "transfer/keeps",
    "From the middle on, on clean examples, PGD training's frozen kernel keeps more robustness than the "
    "network, by more than 10 points.",
    "robust accuracy of the frozen network, offset kept, minus that of the network that turned to clean "
    "examples, points",
    10.0,
    source=f"{PAPER}, as we read it",
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
    "The last kernel of FGSM-RS training is as good as that of PGD training: trained on clean examples it "
    "ends less than 2 points less robust.",
    "robust accuracy of PGD training's kernel minus FGSM-RS's, offset zero, points",
    2.0,
    above=False,
)
REGRESSION = Claim(
    "transfer/regression",
    "Regression on 300 clean examples with the last kernel of PGD training is more robust than with standard "
    "training's, by more than 10 points.",
    "robust accuracy of kernel regression, PGD − standard, points",
    10.0,
    source=LOO,
)
_FALLS = "fall of the network's accuracy on examples made by the regression over that on its own PGD examples"
TRAINING_FREE = Claim(
    "transfer/training-free",
    "Adversarial examples that the kernel of the untrained network makes, fitted to 300 clean ones, take "
    "more than half of what PGD examples take from the accuracy of the network that standard training "
    "ends with.",
    _FALLS,
    0.5,
    source=PAPER,
)
LAST_KERNEL = Claim(
    "transfer/last-kernel",
    "Adversarial examples that the last kernel of PGD training makes alone, fitted likewise, take more than "
    "half of what PGD examples take from that network's accuracy.",
    _FALLS,
    0.5,
)


class Measured:
    """One seed's numbers; asking for one that was not measured raises KeyError."""

    def __init__(self, lines: Sequence[Values]) -> None:
        keys = ("what", "method", "moment", "turned_to", "offset", "examples", "whole")
        self._lines = {tuple(map(line.get, keys)): line for line in lines}

    def network(self, moment: str = "end", *, turned_to: str | None = None) -> float:
        """Robust accuracy of PGD training's network, points; ``turned_to``: of the one that went on from
        there on these, at its end."""
        line = self._lines["run", "pgd", moment, turned_to, None, None, None]
        return 100 * float(line["robust_accuracy"])

    def frozen(self, method: str, moment: str, offset: str, examples: str, *, whole: bool = False) -> float:
        """Robust accuracy of the linearised network, points; ``whole``: trained as long as the network."""
        line = self._lines["frozen", method, moment, None, offset, examples, whole]
        return 100 * float(line["robust_accuracy"])

    def regression(self, method: str, name: str, moment: str = "end") -> float:
        """That number of the regression with the kernel of that moment."""
        return float(self._lines["regression", method, moment, None, None, None, None][name])


def _whole(found: Measured, moment: str, examples: str) -> float:
    return found.frozen("pgd", moment, "kept", examples, whole=True)


def _gained(found: Measured, moment: str) -> float:
    """Over what the network gains from there."""
    at, end = found.network(moment), found.network()
    if end <= at:
        raise KeyError("nothing is gained")
    return (_whole(found, moment, "one-step") - at) / (end - at)


def _takes(found: Measured, method: str, moment: str) -> float:
    clean, robust, transferred = (
        found.regression(method, name, moment)
        for name in ("network_clean_accuracy", "network_pgd_accuracy", "transferred_accuracy")
    )
    if clean <= robust:
        raise KeyError("nothing is taken")
    return (clean - transferred) / (clean - robust)


EFFECTS: dict[Claim, Callable[[Measured], float]] = {
    SUFFICES: lambda found: found.network() - _whole(found, "middle", "one-step"),
    SETTLED: lambda found: found.network() - _whole(found, "settled", "one-step"),
    LEARNS: lambda found: _whole(found, "middle", "one-step") - found.network("middle"),
    EARLY: lambda found: _gained(found, "early"),
    CLEAN: lambda found: _whole(found, "middle", "one-step") - _whole(found, "middle", "clean"),
    KEEPS: lambda found: _whole(found, "middle", "clean") - found.network("middle", turned_to="clean"),
    KERNEL_OR_EXAMPLES: lambda found: (
        found.frozen("pgd", "end", "zero", "clean") - found.frozen("standard", "end", "zero", "one-step")
    ),
    ONE_STEP: lambda found: (
        found.frozen("pgd", "end", "zero", "clean") - found.frozen("fgsm_rs", "end", "zero", "clean")
    ),
    REGRESSION: lambda found: (
        100 * (found.regression("pgd", "robust_accuracy") - found.regression("standard", "robust_accuracy"))
    ),
    TRAINING_FREE: lambda found: _takes(found, "standard", "start"),
    LAST_KERNEL: lambda found: _takes(found, "pgd", "end"),
}

CLAIMS = tuple(EFFECTS)


def judged(values: Sequence[Values], setting: str) -> list[Verdict]:
    """A verdict for each claim; a seed counts where the runs that its claim needs are there."""
    return judge_seeds(values, setting, EFFECTS, Measured)
