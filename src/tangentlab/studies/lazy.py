"""Does the lazy stage pay: adversarial training made cheaper by a switch, and what the kernel knows of it.

Asked: arXiv 2312.02236 replaces adversarial examples by clean ones once the kernel is lazy. What may they be
replaced by (clean examples, one step from a random start, one from stored perturbations, fewer steps), when,
and does the kernel know when? What does coming back when the learning rate falls buy? And at equal cost, is
anything else better: single-step methods, Free, fewer steps throughout, clean examples first (Delayed AT,
Gupta et al. 2020)?

Every arm trains for as many epochs as PGD training; those "at half" for as many as half of its cost buys. The
learning rate rises over the first fifth and falls at a half and at three quarters. Where PGD training is
replaced from an epoch on, BatchNorm is treated as before. PGD training of so many epochs has not converged,
so that two arms train twice as long. Robust accuracy is APGD's on the first test points, of the last
checkpoint unless said otherwise: the best one of a network that forgets is from before. Arms that fine claims
compare meet it on all test points, finalists AutoAttack on some. Cost is in forward equivalents a training
example, with what steers. A network that died counts as what it is, guessing.

While the learning rate rises the kernel's rule says nothing, so that it cannot switch before 0.3 of the
training; whether it knows better when is a claim beside those of what its switch costs and loses.

Under other conditions (no warm-up, a lower or a constant learning rate, a narrower network, a smaller eps)
the replacements are tried from one epoch on: when does each hold?

The levels of the kernel's rule were chosen on the seeds 0 to 2 (benchmarks/lazy_levels.py), how it goes on
after its switch on 3 and 4, in trainings without a warm-up; none of them is judged.
Hardware and time: a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from tangentlab.records import RunRecord, read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig, evaluate
from tangentlab.studies.claims import PAPER, Claim, Verdict, judge, measured
from tangentlab.studies.lazy_arms import (
    CAME_BACK,
    CHOSEN,
    CHOSEN_SHARE,
    CHOSEN_TWICE,
    FINALISTS,
    FIRST_FALL,
    FIXED,
    HALF_RIVALS,
    KERNEL,
    KINDS,
    ON_ALL_POINTS,
    REFERENCE_TWICE,
    STORED,
    THROUGHOUT,
    TIERS,
    TO,
    TUNING_SEEDS,
    USUAL,
    fixed_kind,
    kind,
    runs,
)
from tangentlab.studies.study import Study, Values

TRIED = ("pgd", KERNEL, *(f"{to}-at-{CHOSEN_SHARE}" for to in ("clean", "one-step", "stored")))

# --- measurements ----------------------------------------------------------------------------------------


def measure(folder: Path, config: RunConfig) -> Iterator[Values]:
    """A line for each checkpoint, each evaluation, each look of a switch and each snapshot of a probe."""
    tier = next(tier for tier in TIERS.values() if tier.config.startswith(config.data.name))
    record = read_run(folder)
    told = {"arm": config.name, "kind": kind(config.name), **_condition(config.name), **_switched(record)}
    finalist = config.name in FINALISTS
    more = [("apgd_all", "apgd", tier.all_points)] if config.name in ON_ALL_POINTS else []
    more += [("autoattack", "autoattack", tier.autoattack)] if finalist else []
    for checkpoint in ("best", "last") if finalist else ("last",):
        found = evaluate(folder, attacks=("none", "apgd"), checkpoints=(checkpoint,), test_size=tier.points)
        lines = {line["attack"]: line for line in found}
        if checkpoint == "last":
            for name, attack, size in more:
                (lines[name],) = evaluate(folder, attacks=(attack,), checkpoints=("last",), test_size=size)
        yield {
            "what": "checkpoint",
            **told,
            "checkpoint": checkpoint,
            "at": lines["none"]["epoch"],
            "clean_accuracy": lines["none"]["accuracy"],
            **{f"{name}_accuracy": line["accuracy"] for name, line in lines.items() if name != "none"},
            **{f"{name}_n": line["n"] for name, line in lines.items() if name != "none"},
            **_before_autoattack(lines),
            "best_validation_accuracy": record.status["best"]["robust_accuracy"],
            "cost": record.status["cost"],
            "steering_cost": record.status.get("steering_cost", 0.0),
            **{name: record.status[name] for name in ("train_seconds", "steering_seconds")},
        }
    velocity = "kernel/clean/class/angle_velocity"
    for line in record.metrics:
        at = {"arm": config.name, "kind": told["kind"], "epoch": line["epoch"]}
        if "robust_accuracy" in line:
            seen = {name: line[name] for name in ("clean_accuracy", "robust_accuracy")}
            yield {"what": "evaluation", **at, **seen}
        if velocity in line:
            yield {"what": "kernel", **at, "velocity": line[velocity]}
        if "switch/velocity" in line or "switch/robust_accuracy" in line:
            seen = {
                key.removeprefix("switch/"): value for key, value in line.items() if key.startswith("switch/")
            }
            yield {"what": "look", **at, **seen}


def _before_autoattack(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What APGD alone leaves of AutoAttack's points."""
    if "autoattack" not in lines:
        return {}
    found = lines["autoattack"]
    return {"autoattack_apgd_accuracy": found["remaining"]["apgd-ce"] / found["n"]}


def _condition(arm: str) -> dict[str, str]:
    """What it was trained under, and its name there: of arms that are tried under several conditions."""
    name, _, condition = arm.partition("+")
    return {"condition": condition or USUAL, "replaced_by": name} if name in TRIED else {}


def _switched(record: RunRecord) -> dict[str, float]:
    """The epochs of the first change and of the last way back, where there were any."""
    changes = [(line["switch/phase"], line["epoch"]) for line in record.metrics if "switch/reason" in line]
    first, last = dict(reversed(changes)), dict(changes)
    return {
        **({"epoch": first["cheap"]} if "cheap" in first else {}),
        **({"back": last["full"]} if "full" in last else {}),
    }


# --- claims ----------------------------------------------------------------------------------------------

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


# --- figures ---------------------------------------------------------------------------------------------

_CLEAN = Quantity("clean_accuracy", "clean accuracy", percent=True)
_ROBUST = Quantity("apgd_accuracy", "robust accuracy (APGD)", percent=True)
_LAST = {"what": "checkpoint", "checkpoint": "last"}
FIGURES = (
    ValueFigure(
        key="frontier",
        title="Robust accuracy against cost",
        caption="Last checkpoints. Cost is in forward equivalents a training example. Going on with clean "
        "examples from a fixed epoch is in the next figures.",
        y=(_ROBUST, _CLEAN),
        x=Quantity("cost", "cost (forward equivalents an example)"),
        point="arm",
        colour="kind",
        panels="y",
        where={**_LAST, "kind": tuple(kind for kind in KINDS if kind != fixed_kind("clean"))},
    ),
    ValueFigure(
        key="switching",
        title="Where to switch",
        caption="PGD training that goes on with something cheaper from a fixed epoch; last checkpoints. The "
        "learning rate falls at a half and at three quarters.",
        y=(_ROBUST, _CLEAN),
        colour="kind",
        panels="y",
        where={
            **_LAST,
            "arm": tuple(f"{to}-at-{share:g}" for to, shares in FIXED.items() for share in shares),
        },
    ),
    ValueFigure(
        key="arms",
        title="Every arm",
        caption="Last checkpoints.",
        y=(_ROBUST, _CLEAN),
        x="arm",
        colour="kind",
        panels="y",
        where={**_LAST, "kind": KINDS},
    ),
    ValueFigure(
        key="finalists",
        title="Best and last, and under AutoAttack",
        caption="The best checkpoint is chosen by PGD-10 on the validation split; APGD on all test points "
        "and AutoAttack of the last one, on fewer points, beside what APGD leaves of these.",
        y=(
            _ROBUST,
            Quantity("apgd_all_accuracy", "robust accuracy (APGD, all test points)", percent=True),
            Quantity("autoattack_accuracy", "robust accuracy (AutoAttack)", percent=True),
            Quantity("autoattack_apgd_accuracy", "robust accuracy (APGD, AutoAttack's points)", percent=True),
        ),
        x="arm",
        colour="checkpoint",
        views="y",
        where={"what": "checkpoint", "arm": FINALISTS},
    ),
    ValueFigure(
        key="conditions",
        title="When does each hold",
        caption="PGD training, and what it is replaced by, where the kernel decides or from "
        f"{CHOSEN_SHARE:.0%} of the training on: without the warm-up, at a learning rate of 0.02 and at a "
        "constant one, at half of the eps and in a narrower network.",
        y=(_ROBUST, _CLEAN),
        x="replaced_by",
        panels="condition",
        views="y",
        colour="replaced_by",
        where={**_LAST, "replaced_by": TRIED},
    ),
    ValueFigure(
        key="along",
        title="What is forgotten, and when",
        caption="PGD-10 accuracy on the validation split along the training.",
        y=(Quantity("robust_accuracy", "robust accuracy (PGD-10)", percent=True),),
        colour="arm",
        where={
            "what": "evaluation",
            "arm": ("pgd", KERNEL, "kernel-clean", *(f"{to}-at-0.2" for to in TO), "clean-at-0.8"),
        },
    ),
    ValueFigure(
        key="kernel",
        title="The kernel under PGD and TRADES training",
        caption="Velocity of the class kernels on clean inputs, to hold the fixed points against.",
        y=(Quantity("velocity", "angle per step (radians)", log=True),),
        colour="arm",
        where={"what": "kernel"},
    ),
    ValueFigure(
        key="velocity",
        title="What the kernel's rule saw",
        caption="Velocity of the kernel on the switch's own examples.",
        y=(Quantity("velocity", "angle per step (radians)", log=True),),
        colour="arm",
        where={"what": "look"},
    ),
)

STUDY = Study("lazy", CLAIMS, runs, measure, judged, FIGURES, tuning_seeds=TUNING_SEEDS)
