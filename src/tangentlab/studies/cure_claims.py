"""The claims of the study of the cure, and what its raw values say of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from statistics import fmean

from tangentlab.studies.claims import PAPER, Claim, Verdict, judge, judge_share, measured
from tangentlab.studies.cure_arms import FIXED, FROM_FGSM, GUARDED, PLACES, SINGLE_STEP, SPECTRAL
from tangentlab.studies.overfitting_claims import LOOK_EVERY
from tangentlab.studies.overfitting_watches import fate
from tangentlab.studies.study import Values

COLLAPSES = Claim(
    "cure/collapses",
    "FGSM training collapses on more than half of the seeds at the lower eps: there is something to cure.",
    "share of the runs, a collapse that lasts",
    0.5,
)
CURED = Claim(
    "cure/cured",
    "Training that the alarm turns to two steps learns and keeps its robust accuracy, in more than 70 % of "
    "the runs, at that eps and at the larger one.",
    "share of the runs at whichever eps it is smaller",
    0.7,  # ten of ten runs say no more
    source=f"{PAPER}, with figures of ours",
)
BY_THE_ALARM = Claim(
    "cure/by-the-alarm",
    "It is the alarm's doing: more of FGSM-RS's runs are cured with it than without, by more than 0.",
    "difference of the shares of a seed's runs that are cured",
    0.0,
)
FGSM_TOO = Claim(
    "cure/fgsm-too",
    "FGSM from no random start is cured by the alarm too, in more than 70 % of the runs, at either eps.",
    "share of the runs at whichever eps it is smaller",
    0.7,
)
COST = Claim(
    "cure/cost",
    "It costs less than 1.4 times what FGSM training costs, which is what two steps throughout cost.",
    "cost in forward equivalents, the looks counted, over FGSM's; the larger of the two eps",
    1.4,
    above=False,
)
N_FGSM = Claim(
    "cure/n-fgsm",
    "It loses less than 1 point of robust accuracy to N-FGSM.",
    "AutoAttack accuracy of N-FGSM minus its, points, at the lower eps",
    1.0,
    above=False,
)
GRAD_ALIGN = Claim(
    "cure/grad-align",
    "It loses less than 1 point of robust accuracy to GradAlign.",
    "AutoAttack accuracy of GradAlign minus its, points, at the lower eps",
    1.0,
    above=False,
)
BEST = Claim(
    "cure/best",
    "It is more robust than any other method of at most 1.5 times FGSM's cost, the best of them chosen on "
    "the other seeds.",
    "APGD accuracy minus that method's, points, at the lower eps",
    0.0,
)
STEERING = Claim(
    "cure/steering",
    f"Its looks, one every {LOOK_EVERY} steps, take less than 3 % of the training time.",
    "seconds of the looks over those of training; lower eps",
    0.03,
    above=False,
)
KEPT = Claim(
    "cure/kept",
    "Without a cure the alarm still keeps something: where FGSM training collapses, the weights of the look "
    "before the first alarm are more robust than the last ones by more than 10 points.",
    "robust accuracy before the alarm minus at the end, points, mean over the runs that collapse; 0 where it "
    "is silent",
    10.0,
)
CLAIMS = (COLLAPSES, CURED, BY_THE_ALARM, FGSM_TOO, COST, N_FGSM, GRAD_ALIGN, BEST, STEERING, KEPT)
AFFORDABLE = 1.5  # times FGSM's cost
RIVALS = (*SINGLE_STEP, "fgsm_rs-long", "n_fgsm-long", "zero_grad-long", "pgd-2", FIXED, GUARDED)


class Runs:
    """The runs, by seed, arm and which of the two eps."""

    def __init__(self, values: Sequence[Values]) -> None:
        self._lines = {(line["seed"], line["arm"], line["place"]): line for line in values}
        self.seeds = sorted({seed for seed, *_ in self._lines})
        self.rivals = sorted({arm for _, arm, _ in self._lines}.intersection(RIVALS))

    def lower(self, seed: int, arm: str) -> Values:
        """At the lower eps; raises KeyError where it was not measured."""
        return self._lines[seed, arm, PLACES[0]]

    def both(self, seed: int, arm: str) -> list[Values]:
        """At the lower eps and the larger; likewise."""
        return [self._lines[seed, arm, place] for place in PLACES]

    def cured(self, seed: int, arm: str) -> list[bool]:
        """Whether the arm's runs learned and stayed quiet, at either eps."""
        return [fate(line)[0] == "quiet" for line in self.both(seed, arm)]

    def least_cured(self, arm: str) -> dict[int, list[bool]]:
        """seed -> the outcome at the eps where fewer are."""
        found = measured(self.seeds, partial(self.cured, arm=arm))
        by_eps = [{seed: [own[place]] for seed, own in found.items()} for place in range(len(PLACES))]
        return min(by_eps, key=lambda one: sum(outcome for (outcome,) in one.values()))

    def cured_by_the_alarm(self, seed: int) -> float:
        """The share of the alarm's runs that are cured over that of those that it starts from."""
        return fmean(self.cured(seed, SPECTRAL)) - fmean(self.cured(seed, "fgsm_rs"))

    def cost(self, seed: int, arm: str) -> float:
        """Over FGSM's; the larger of the two eps."""
        pairs = zip(self.both(seed, arm), self.both(seed, "fgsm"), strict=True)
        return max(float(own["cost"] / fgsm["cost"]) for own, fgsm in pairs)

    def robust(self, seed: int, arm: str, attack: str = "apgd") -> float:
        """Robust accuracy in points at the lower eps."""
        return 100 * float(self.lower(seed, arm)[f"{attack}_accuracy"])

    def loses(self, rival: str, seed: int, attack: str = "apgd") -> float:
        """Robust accuracy of the rival minus spectral training's."""
        return self.robust(seed, rival, attack) - self.robust(seed, SPECTRAL, attack)

    def beats(self, seed: int) -> float:
        """Against the rival that the other seeds favour, of those where every rival of any was measured."""
        others: list[dict[str, float]] = []
        for other in self.seeds:
            with suppress(KeyError):
                robust = {rival: self.robust(other, rival) for rival in self.rivals}
                dear = {rival for rival in self.rivals if self.cost(other, rival) > AFFORDABLE}
                others += [{**robust, **dict.fromkeys(dear, -math.inf)}] if other != seed else []
        if not others:
            raise KeyError("other seeds")
        return -self.loses(max(self.rivals, key=lambda rival: fmean(one[rival] for one in others)), seed)

    def kept(self, seed: int) -> float:
        """Robust accuracy of FGSM training before the alarm, over its last."""
        lines, last = self.both(seed, "fgsm"), "apgd_accuracy"
        gains = [line.get("kept_accuracy", line[last]) - line[last] for line in lines if _collapsed(line)]
        if not gains:
            raise KeyError("no collapse")
        return 100 * fmean(gains)

    def steering(self, seed: int) -> float:
        """Seconds of the looks over those of training, at the lower eps."""
        line = self.lower(seed, SPECTRAL)
        return float(line["steering_seconds"] / line["train_seconds"])


def _collapsed(line: Values) -> bool:
    return fate(line)[0] == "collapsed"


def judged(values: Sequence[Values], setting: str) -> list[Verdict]:
    """A verdict for each claim; a seed counts where the arms that its claim needs are there."""
    seen = Runs(values)
    effects: Mapping[Claim, Callable[[int], float]] = {
        BY_THE_ALARM: seen.cured_by_the_alarm,
        COST: lambda seed: seen.cost(seed, SPECTRAL),
        N_FGSM: partial(seen.loses, "n_fgsm", attack="autoattack"),
        GRAD_ALIGN: partial(seen.loses, "grad_align", attack="autoattack"),
        BEST: seen.beats,
        STEERING: seen.steering,
        KEPT: seen.kept,
    }
    shares: Mapping[Claim, Mapping[int, list[bool]]] = {
        COLLAPSES: measured(seen.seeds, lambda seed: [_collapsed(seen.lower(seed, "fgsm"))]),
        CURED: seen.least_cured(SPECTRAL),
        FGSM_TOO: seen.least_cured(FROM_FGSM),
    }
    return [
        judge_share(claim, setting, shares[claim])
        if claim in shares
        else judge(claim, setting, measured(seen.seeds, effects[claim]))
        for claim in CLAIMS
    ]
