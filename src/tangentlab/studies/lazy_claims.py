"""The claims of the study of the lazy switch, and what its raw values say of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from statistics import fmean

import numpy as np

from tangentlab.studies.claims import PAPER, Claim, Verdict, judge, measured
from tangentlab.studies.lazy_arms import (
    CAME_BACK,
    CHOSEN,
    CHOSEN_TWICE,
    FIRST_FALL,
    HALF_RIVALS,
    KERNEL,
    ON_ALL_POINTS,
    REFERENCE_TWICE,
    STORED,
    THROUGHOUT,
)
from tangentlab.studies.study import Values

CLEAN = Claim(
    "lazy/clean",
    "PGD training that the kernel turns to clean examples while it is lazy, and back, loses less than 1 "
    "point of robust accuracy.",
    "robust accuracy of PGD training minus that with the kernel's switch to clean examples, points",
    1.0,
    above=False,
    source=PAPER,
)
FIRES = Claim(
    "lazy/fires",
    "By the kernel's rule PGD training is lazy before the learning rate first falls, at half of the "
    "training.",
    "when the rule switched to clean examples, as a share of the training; 1 where it never did",
    FIRST_FALL,
    above=False,
    source=PAPER,
)
STORED_CLAIM = Claim(
    "lazy/stored",
    "PGD training that goes on with one step from stored perturbations while the kernel is lazy loses less "
    "than 1 point of robust accuracy.",
    "robust accuracy (APGD, all test points) of PGD training minus that with the kernel's switch, points",
    1.0,
    above=False,
)
COST = Claim(
    "lazy/cost",
    "That switch halves the cost of PGD training.",
    "cost in forward equivalents, what steers included, over PGD training's",
    0.5,
    above=False,
    source=f"{PAPER}, with a figure of ours",
)
STEERING = Claim(
    "lazy/steering",
    "The probe that decides takes less than 3 % of the training time.",
    "seconds of the switch's looks over those of training",
    0.03,
    above=False,
)
FIXED_CLAIM = Claim(
    "lazy/fixed",
    "No kernel is needed: from a fifth of the training on, stored perturbations lose less than 1 point of "
    "robust accuracy, for at most half of PGD training's cost.",
    "robust accuracy (APGD, all test points) of PGD training minus with the switch at a fifth, points",
    1.0,
    above=False,
)
LONG = Claim(
    "lazy/longer",
    "That is not for want of training: twice as long, stored perturbations from a fifth on lose less than 1 "
    "point to PGD training of as many epochs.",
    "robust accuracy (APGD, all test points) of PGD training minus with the switch, twice the epochs, points",
    1.0,
    above=False,
)
RIVALS = Claim(
    "lazy/rivals",
    "PGD training that the kernel turns to stored perturbations is more robust than the most robust rival "
    "that costs at most half of PGD training, chosen on the other seeds.",
    "robust accuracy (APGD, all test points) with the switch minus that of the rival, points",
    0.0,
)
KNOWS = Claim(
    "lazy/kernel-knows",
    "The kernel decides better than the best fixed switching point of no higher cost, the beginning among "
    "them, chosen on the other seeds, by more than 0.5 points.",
    "robust accuracy (APGD, all test points) with the kernel's switch to stored perturbations minus that "
    "point's, points",
    0.5,
    source=f"{PAPER}, as we read it",
)
TIMING = Claim(
    "lazy/timing",
    "The kernel knows when: its switch is better than fixed ones at its own cost by more than 0.5 points.",
    "robust accuracy (APGD, all test points) with the kernel's switch to stored perturbations minus that of "
    "fixed ones, interpolated by cost, points",
    0.5,
    source=f"{PAPER}, as we read it",
)
EARLY = Claim(
    "lazy/full-first",
    "The full attack is needed at first: one step from stored perturbations throughout is more than 1 point "
    "less robust than after a tenth of the training.",
    "robust accuracy (APGD, all test points) switched at a tenth minus throughout, points",
    1.0,
)
RETURN = Claim(
    "lazy/return",
    "Coming back to the full attack for good when the learning rate falls gains more than 0.5 points of "
    "robust accuracy.",
    "robust accuracy (APGD, all test points) with the way back minus without, switch to stored perturbations "
    "at a fifth, points",
    0.5,
)
FORGETTING = Claim(
    "lazy/forgetting",
    "Few clean examples late, when the learning rate has fallen twice, do less harm than many from early on: "
    "switched to at 0.8 of the training they leave more than 10 points more robust accuracy than at 0.2.",
    "robust accuracy switched to clean examples at 0.8 of the training minus at 0.2, points",
    10.0,
)
AVERAGED = Claim(
    "lazy/ema",
    "With an average of the weights too, the kernel's switch to stored perturbations loses less than 1 point "
    "to PGD training.",
    "robust accuracy (APGD, all test points) of PGD training minus with the switch, both of averaged "
    "weights, points",
    1.0,
    above=False,
)

Of = Callable[[str], float]


def _loss(reference: str, arm: str) -> Callable[[Of], float]:
    return lambda robust: robust(reference) - robust(arm)


ROBUST: Mapping[Claim, Callable[[Of], float]] = {
    CLEAN: _loss("pgd", "kernel-clean"),
    FORGETTING: _loss("clean-at-0.8", "clean-at-0.2"),
}
ROBUST_ON_ALL: Mapping[Claim, Callable[[Of], float]] = {
    STORED_CLAIM: _loss("pgd", KERNEL),
    FIXED_CLAIM: _loss("pgd", CHOSEN),
    LONG: _loss(REFERENCE_TWICE, CHOSEN_TWICE),
    EARLY: _loss(STORED[1], THROUGHOUT),
    RETURN: _loss(CAME_BACK, CHOSEN),
    AVERAGED: _loss("pgd-ema", f"{KERNEL}-ema"),
}
# The arm that must have switched, or a claim of what the switch costs would hold for nothing.
DECIDED = {STORED_CLAIM: KERNEL, AVERAGED: f"{KERNEL}-ema"}
# These were written when two seeds had been seen.
SEEN_BEFORE = dict.fromkeys((FIXED_CLAIM, RIVALS, TIMING), (5, 6))
CLAIMS = (
    *(CLEAN, FIRES, STORED_CLAIM, COST, STEERING, FIXED_CLAIM, LONG, RIVALS),
    *(KNOWS, TIMING, EARLY, RETURN, FORGETTING, AVERAGED),
)


class Lasts:
    """The last checkpoints, by seed and arm."""

    def __init__(self, values: Sequence[Values]) -> None:
        self._lines = {
            (line["seed"], line["arm"]): line for line in values if line.get("checkpoint") == "last"
        }
        self.seeds = sorted({seed for seed, _ in self._lines})

    def of(self, seed: int, name: str) -> Of:
        """arm -> the number of that name; raises KeyError where it was not measured."""
        return lambda arm: float(self._lines[seed, arm][name])

    def robust(self, seed: int, *, on_all: bool = True) -> Of:
        """arm -> robust accuracy in points; on the first test points or on all."""
        return lambda arm: 100 * self.of(seed, "apgd_all_accuracy" if on_all else "apgd_accuracy")(arm)

    def switched(self, seed: int) -> float:
        """When the rule first switched, as a share of the training; 1 where it never did."""
        line = self._lines[seed, "kernel-clean"]
        return float(line.get("epoch", line["at"]) / line["at"])

    def loses(self, claim: Claim, seed: int) -> float:
        """The effect of a claim on robust accuracy alone; of what is said of a lazy kernel, where it was."""
        if claim is CLEAN and self.switched(seed) >= FIRST_FALL:
            raise KeyError("it did not switch in a lazy stage")
        if claim in DECIDED:
            self.of(seed, "epoch")(DECIDED[claim])
        effect = ROBUST_ON_ALL.get(claim) or ROBUST[claim]
        return effect(self.robust(seed, on_all=claim in ROBUST_ON_ALL))

    def favourite(self, arms: Sequence[str], seed: int) -> str:
        """The most robust of the arms on the other seeds where all of them were measured, by the first test
        points."""
        if not arms:
            raise KeyError("arms")
        others: list[list[float]] = []
        for other in self.seeds:
            with suppress(KeyError):
                others += [list(map(self.robust(other, on_all=False), arms))] if other != seed else []
        if not others:
            raise KeyError("other seeds")
        means = dict(zip(arms, map(fmean, zip(*others, strict=True)), strict=True))
        return max(means, key=lambda arm: means[arm])

    def knows(self, seed: int) -> float:
        """Against the fixed point that the other seeds favour; one is the beginning."""
        cost = self.of(seed, "cost")
        cheap = [arm for arm in (THROUGHOUT, *STORED) if cost(arm) <= cost(KERNEL)]
        robust = self.robust(seed)
        return robust(KERNEL) - robust(self.favourite(cheap, seed))

    def times(self, seed: int) -> float:
        """Against fixed points, at its cost."""
        cost, robust = self.of(seed, "cost"), self.robust(seed)
        fixed = sorted((cost(arm), robust(arm)) for arm in STORED if arm in ON_ALL_POINTS)
        costs, accuracies = zip(*fixed, strict=True)
        if not costs[0] <= cost(KERNEL) <= costs[-1]:
            raise KeyError("no fixed point costs as much")
        return robust(KERNEL) - float(np.interp(cost(KERNEL), costs, accuracies))

    def beats(self, seed: int) -> float:
        """Against the rival that the other seeds favour."""
        robust = self.robust(seed)
        return robust(KERNEL) - robust(self.favourite(HALF_RIVALS, seed))

    def share(self, seed: int) -> float:
        """Cost over PGD training's."""
        return self.of(seed, "cost")(KERNEL) / self.of(seed, "cost")("pgd")

    def steering(self, seed: int) -> float:
        """Seconds of the looks over those of training."""
        return self.of(seed, "steering_seconds")(KERNEL) / self.of(seed, "train_seconds")(KERNEL)


def judged(values: Sequence[Values], setting: str) -> list[Verdict]:
    """A verdict for each claim; a seed counts where the arms that its claim needs are there."""
    lasts = Lasts(values)
    others: dict[Claim, Callable[[int], float]] = {
        FIRES: lasts.switched,
        COST: lasts.share,
        STEERING: lasts.steering,
        KNOWS: lasts.knows,
        TIMING: lasts.times,
        RIVALS: lasts.beats,
    }
    found = []
    for claim in CLAIMS:
        seeds = [seed for seed in lasts.seeds if seed not in SEEN_BEFORE.get(claim, ())]
        found.append(judge(claim, setting, measured(seeds, others.get(claim, partial(lasts.loses, claim)))))
    return found
