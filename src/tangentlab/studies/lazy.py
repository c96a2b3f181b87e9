"""Does the lazy stage pay: adversarial training made cheaper by a switch, and what the kernel knows of it.

Asked: arXiv 2312.02236 replaces adversarial examples by clean ones once the kernel is lazy. What may they be
replaced by (clean examples, one step from a random start, one from stored perturbations, fewer steps), when,
and does the kernel know when? What does coming back when the learning rate falls buy? And at equal cost, is
anything else better: single-step methods, Free, fewer steps throughout, clean examples first (Delayed AT,
Gupta et al. 2020)?

Every arm trains for as many epochs as PGD training; the rivals "at half" for as many as half of its cost
buys. The learning rate falls at a half and at three quarters: a claim on the kernel's rule counts a seed only
where it spoke before the first fall, for afterwards the fall speaks. Robust accuracy is APGD's on the first
test points, of the last checkpoint unless said otherwise: the best one of a network that forgets is from
before. Finalists meet AutoAttack too. Cost is in forward equivalents a training example, with what steers.

The levels of the kernel's rule were chosen on seed 0 (benchmarks/lazy_levels.py); 0 to 2 are not judged.
Hardware and time: a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from tangentlab.records import RunRecord, read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig, evaluate, load_config
from tangentlab.runs.parsing import build_method
from tangentlab.studies.claims import PAPER, Claim, Verdict, judge, measured
from tangentlab.studies.study import Study, Values


@dataclass(frozen=True)
class Tier:
    """What a tier trains and how it is judged.

    Args:
        config: a shipped configuration.
        words: overrides of it.
        points: first test points for APGD.
        autoattack: first test points for AutoAttack, of the finalists.
        whole: whether all arms are part of it, or the finalists alone.
    """

    config: str
    words: str
    points: int
    autoattack: int
    whole: bool = True


COMMON = (
    "--training.schedule=piecewise --probe.size=0 --threads=1 --channels_last=true --evaluation.num_steps=10 "
    "--evaluation.test_num_steps=10 --evaluation.test_size=200 --evaluation.every=1"
)
TIERS = {
    0: Tier(
        "digits",
        "--eps=0.2 --training.epochs=12 --training.batch_size=50 --data.validation_size=200",
        360,
        50,
    ),
    1: Tier("fashion-mnist", "--training.epochs=15", 2000, 500),
    2: Tier("cifar10-narrow", "--training.epochs=15", 1000, 200, whole=False),
}

# What the examples are replaced by.
TO = {
    "clean": "--switch.to=standard",
    "one-step": "--switch.to=fgsm_rs",
    "stored": "--switch.to=atta",
    "fewer": "--switch.to=pgd --switch.to.num_steps=2",
}
SHARES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8)  # of the training, at which the fixed rule switches
STORED = [f"stored-at-{share:g}" for share in SHARES]
HALF = 0.5  # of PGD training's cost, for rivals
FIRST_FALL = 0.5  # of the learning rate, a share of the training
TUNING_SEEDS = (0, 1, 2)
HALF_RIVALS = {
    "n_fgsm-half": "--method=n_fgsm",
    "fgsm_pgi-half": "--method=fgsm_pgi",
    "fgsm_rs-half": "--method=fgsm_rs",
    "free-half": "--method=free",
    "atta-half": "--method=atta --method.reset_epochs=null",
    "pgd-3-half": "--method=pgd --method.num_steps=3",
    "pgd-half": "--method=pgd",
}
EMA = "--training.ema_decay=0.995"
KERNEL = "kernel-stored"
FINALISTS = ("pgd", KERNEL, "stored-at-0.2", "n_fgsm-half", "fgsm_pgi-half")


def arms(tier: Tier) -> dict[str, str]:
    """Name -> overrides."""
    pgd, trades = "--method=pgd", "--method=trades"
    fixed = "--switch.rule=fixed --switch.return_on_drop=false"
    kernel = "--switch.rule=kernel"
    epochs = _epochs(tier)
    found = {"pgd": pgd, "trades": trades}
    for to, shares in (
        ("stored", SHARES),
        ("clean", SHARES[1::2]),
        ("one-step", SHARES[1::2]),
        ("fewer", SHARES[1:3]),
    ):
        for share in shares:
            found[f"{to}-at-{share:g}"] = f"{pgd} {fixed} --switch.epoch={share * epochs:g} {TO[to]}"
    found["stored-throughout"] = "--method=atta --method.reset_epochs=null"
    found["trades-fewer-at-0.35"] = (
        f"{trades} {fixed} --switch.epoch={0.35 * epochs:g} --switch.to=trades --switch.to.num_steps=1"
    )
    found[KERNEL] = f"{pgd} {kernel} {TO['stored']} --switch.return_on_drop=false"
    found["kernel-stored-returning"] = f"{pgd} {kernel} {TO['stored']}"
    found["kernel-clean"] = f"{pgd} {kernel} {TO['clean']} --switch.return_on_drop=false"
    found["kernel-clean-guarded"] = f"{pgd} {kernel} {TO['clean']} --switch.held_out=100"
    found["clean-first"] = (
        f"--method=standard {fixed} --switch.epoch={epochs / 3:g} --switch.to=pgd --switch.to.num_steps=10"
    )
    for name, words in HALF_RIVALS.items():
        found[name] = f"{words} --training.epochs={_affordable(tier, words)}"
    for name in ("pgd", KERNEL, "n_fgsm-half"):
        found[f"{name}-ema"] = f"{found[name]} {EMA}"
    return found if tier.whole else {name: found[name] for name in FINALISTS}


def runs(tier: int, seeds: Sequence[int]) -> dict[str, RunConfig]:
    """ARM-SEED -> configuration."""
    chosen = TIERS[tier]
    return {
        f"{name}-{seed}": _config(chosen, f"{words} --name={name} --seed={seed}")
        for seed in seeds
        for name, words in arms(chosen).items()
    }


def _config(tier: Tier, words: str) -> RunConfig:
    return load_config(tier.config, [*COMMON.split(), *tier.words.split(), *words.split()])


def _epochs(tier: Tier) -> int:
    return _config(tier, "").training.epochs


def _affordable(tier: Tier, words: str) -> int:
    """Epochs that half of PGD training's cost buys; one of Free takes each batch several times."""

    def cost(words: str) -> int:
        method = build_method(_config(tier, words))
        return method.passes.cost * method.replays

    return max(1, math.floor(HALF * _epochs(tier) * cost("--method=pgd") / cost(words)))


# --- measurements ----------------------------------------------------------------------------------------


def measure(folder: Path, config: RunConfig) -> Iterator[Values]:
    """A line for each checkpoint, and one for each look of a switch."""
    tier = next(tier for tier in TIERS.values() if tier.config.startswith(config.data.name))
    record = read_run(folder)
    told = {"arm": config.name, "kind": kind(config.name), **_switched(record)}
    found = evaluate(folder, attacks=("none", "apgd"), test_size=tier.points)
    if config.name in FINALISTS:
        found += evaluate(folder, attacks=("autoattack",), checkpoints=("last",), test_size=tier.autoattack)
    for checkpoint in ("best", "last"):
        lines = {line["attack"]: line for line in found if line["checkpoint"] == checkpoint}
        yield {
            "what": "checkpoint",
            **told,
            "checkpoint": checkpoint,
            "at": lines["none"]["epoch"],
            "clean_accuracy": lines["none"]["accuracy"],
            **{f"{name}_accuracy": line["accuracy"] for name, line in lines.items() if name != "none"},
            **{f"{name}_n": line["n"] for name, line in lines.items() if name != "none"},
            "cost": record.status["cost"],
            "steering_cost": record.status.get("steering_cost", 0.0),
            **{name: record.status[name] for name in ("train_seconds", "steering_seconds")},
        }
    for line in record.metrics:
        if "switch/velocity" in line or "switch/robust_accuracy" in line:
            seen = {
                key.removeprefix("switch/"): value for key, value in line.items() if key.startswith("switch/")
            }
            yield {"what": "look", "arm": config.name, "epoch": line["epoch"], **seen}


def _switched(record: RunRecord) -> dict[str, float]:
    """The epochs of the first change and of the first way back, where there were any."""
    changes = [(line["epoch"], line["switch/phase"]) for line in record.metrics if "switch/reason" in line]
    first = {phase: epoch for epoch, phase in reversed(changes)}
    names = {"cheap": "epoch", "full": "back"}
    return {names[phase]: epoch for phase, epoch in first.items()}


def kind(arm: str) -> str:
    """What a figure colours an arm by."""
    if arm in ("pgd", "trades"):
        return "reference"
    if arm.endswith("-ema"):
        return "with EMA"
    if arm.startswith("kernel"):
        return "the kernel decides"
    if "-at-" in arm:
        return f"{arm.partition('-at-')[0]} from a fixed epoch"
    return "rival"


# --- claims ----------------------------------------------------------------------------------------------

CLEAN = Claim(
    "lazy/clean",
    "Once the kernel is lazy, PGD training goes on with clean examples and loses less than 1 point of robust "
    "accuracy.",
    "robust accuracy of PGD training minus that with the kernel's switch to clean examples, points",
    1.0,
    above=False,
    source=PAPER,
)
STORED_CLAIM = Claim(
    "lazy/stored",
    "Once the kernel is lazy, PGD training goes on with one step from stored perturbations and loses less "
    "than 1 point of robust accuracy.",
    "robust accuracy of PGD training minus that with the kernel's switch to stored perturbations, points",
    1.0,
    above=False,
)
COST = Claim(
    "lazy/cost",
    "The kernel's switch to stored perturbations halves the cost of PGD training.",
    "cost in forward equivalents, what steers included, over PGD training's",
    0.5,
    above=False,
    source=f"{PAPER}, with a figure of ours",
)
STEERING = Claim(
    "lazy/steering",
    "The probe that decides takes less than 3 % of the training time.",
    "seconds of the switch's looks over those of training, kernel-stored",
    0.03,
    above=False,
)
RIVALS = Claim(
    "lazy/rivals",
    "The kernel's switch to stored perturbations, where it costs no more, is more robust than the rival at "
    "half of PGD training's cost that is the most robust one on the other seeds.",
    "robust accuracy minus that rival's, points",
    0.0,
)
KNOWS = Claim(
    "lazy/kernel-knows",
    "The kernel decides better than a fixed switching point of the same cost.",
    "robust accuracy with the kernel's switch to stored perturbations minus that of fixed points, "
    "interpolated at its cost, points",
    0.0,
    source=f"{PAPER}, as we read it",
)
EARLY = Claim(
    "lazy/full-first",
    "The full attack is needed at first: one step from stored perturbations throughout is more than 1 point "
    "less robust than after a tenth of the training.",
    "robust accuracy switched at a tenth minus throughout, points",
    1.0,
)
RETURN = Claim(
    "lazy/return",
    "Coming back to the full attack when the learning rate falls gains more than 0.5 points of robust "
    "accuracy.",
    "robust accuracy with the way back minus without, kernel's switch to stored perturbations, points",
    0.5,
)
FORGETTING = Claim(
    "lazy/forgetting",
    "Clean examples at the end do less harm than early: switched to at 0.8 of the training they leave more "
    "than 10 points more robust accuracy than switched to at 0.2.",
    "robust accuracy switched to clean examples at 0.8 of the training minus at 0.2, points",
    10.0,
)
AVERAGED = Claim(
    "lazy/ema",
    "With an average of the weights too, the kernel's switch to stored perturbations loses less than 1 point "
    "to PGD training.",
    "robust accuracy of PGD training minus with the switch, both of averaged weights, points",
    1.0,
    above=False,
)

Of = Callable[[str], float]


def _loss(reference: str, arm: str) -> Callable[[Of], float]:
    return lambda robust: robust(reference) - robust(arm)


ROBUST: Mapping[Claim, Callable[[Of], float]] = {
    CLEAN: _loss("pgd", "kernel-clean"),
    STORED_CLAIM: _loss("pgd", KERNEL),
    EARLY: _loss(STORED[0], "stored-throughout"),
    RETURN: _loss("kernel-stored-returning", KERNEL),
    FORGETTING: _loss(f"clean-at-{SHARES[-1]:g}", f"clean-at-{SHARES[1]:g}"),
    AVERAGED: _loss("pgd-ema", f"{KERNEL}-ema"),
}
# Claims that say "once the kernel is lazy", and the arm in which it must have been.
BY_THE_KERNEL = {CLEAN: "kernel-clean", STORED_CLAIM: KERNEL, AVERAGED: f"{KERNEL}-ema", RETURN: KERNEL}
CLAIMS = (CLEAN, STORED_CLAIM, COST, STEERING, RIVALS, KNOWS, EARLY, RETURN, FORGETTING, AVERAGED)


class Lasts:
    """The last checkpoints, by seed and arm."""

    def __init__(self, values: Sequence[Values]) -> None:
        self._lines = {
            (line["seed"], line["arm"]): line
            for line in values
            if line.get("checkpoint") == "last" and line["seed"] not in TUNING_SEEDS
        }
        self.seeds = sorted({seed for seed, _ in self._lines})

    def of(self, seed: int, name: str) -> Of:
        """arm -> the number of that name; raises KeyError where it was not measured."""
        return lambda arm: float(self._lines[seed, arm][name])

    def robust(self, seed: int) -> Of:
        """arm -> robust accuracy in points."""
        return lambda arm: 100 * self.of(seed, "apgd_accuracy")(arm)

    def lazy(self, seed: int, arm: str) -> None:
        """Raise KeyError unless the arm switched before the learning rate first fell."""
        line = self._lines[seed, arm]
        if not line.get("epoch", line["at"]) < FIRST_FALL * line["at"]:
            raise KeyError("it did not switch in a lazy stage")

    def loses(self, claim: Claim, seed: int) -> float:
        """The effect of a claim on robust accuracy alone."""
        if claim in BY_THE_KERNEL:
            self.lazy(seed, BY_THE_KERNEL[claim])
        return ROBUST[claim](self.robust(seed))

    def knows(self, seed: int) -> float:
        """Against the fixed points, linearly between the two whose costs are next to the kernel's."""
        self.lazy(seed, KERNEL)
        cost, robust = self.of(seed, "cost"), self.robust(seed)
        fixed = sorted((cost(arm), robust(arm)) for arm in ("stored-throughout", *STORED, "pgd"))
        costs, accuracies = zip(*fixed, strict=True)
        return robust(KERNEL) - float(np.interp(cost(KERNEL), np.array(costs), np.array(accuracies)))

    def beats(self, seed: int) -> float:
        """Against the rival that the other seeds favour, where that costs no less."""
        others = []
        for other in self.seeds:
            with suppress(KeyError):
                others += [list(map(self.robust(other), HALF_RIVALS))] if other != seed else []
        if not others:
            raise KeyError("other seeds")
        means = dict(zip(HALF_RIVALS, map(fmean, zip(*others, strict=True)), strict=True))
        best = max(means, key=lambda arm: means[arm])
        if self.of(seed, "cost")(KERNEL) > self.of(seed, "cost")(best):
            raise KeyError("it costs more")
        return self.robust(seed)(KERNEL) - self.robust(seed)(best)

    def share(self, seed: int) -> float:
        """Cost over PGD training's."""
        self.lazy(seed, KERNEL)
        return self.of(seed, "cost")(KERNEL) / self.of(seed, "cost")("pgd")

    def steering(self, seed: int) -> float:
        """Seconds of the looks over those of training."""
        return self.of(seed, "steering_seconds")(KERNEL) / self.of(seed, "train_seconds")(KERNEL)


def judged(values: Sequence[Values], setting: str) -> list[Verdict]:
    """A verdict for each claim; a seed counts where the arms that its claim needs are there."""
    lasts = Lasts(values)
    others: dict[Claim, Callable[[int], float]] = {
        COST: lasts.share,
        STEERING: lasts.steering,
        KNOWS: lasts.knows,
        RIVALS: lasts.beats,
    }
    return [
        judge(claim, setting, measured(lasts.seeds, others.get(claim, partial(lasts.loses, claim))))
        for claim in CLAIMS
    ]


# --- figures ---------------------------------------------------------------------------------------------

_CLEAN = Quantity("clean_accuracy", "clean accuracy", percent=True)
_ROBUST = Quantity("apgd_accuracy", "robust accuracy (APGD)", percent=True)
_LAST = {"what": "checkpoint", "checkpoint": "last"}
FIGURES = (
    ValueFigure(
        key="frontier",
        title="Robust accuracy against cost",
        caption="Last checkpoints. Cost is in forward equivalents a training example.",
        y=(_ROBUST, _CLEAN),
        x=Quantity("cost", "cost (forward equivalents an example)"),
        point="arm",
        colour="kind",
        panels="y",
        where=_LAST,
    ),
    ValueFigure(
        key="switching",
        title="Where to switch",
        caption="PGD training that goes on with something cheaper from a fixed epoch; last checkpoints. The "
        "learning rate falls at a half and at three quarters.",
        y=(_ROBUST, _CLEAN),
        colour="kind",
        panels="y",
        where={**_LAST, "kind": tuple(f"{to} from a fixed epoch" for to in TO)},
    ),
    ValueFigure(
        key="arms",
        title="Best and last",
        caption="The best checkpoint is chosen by PGD-10 on the validation split.",
        y=(_ROBUST, _CLEAN),
        x="arm",
        colour="checkpoint",
        panels="y",
        where={"what": "checkpoint"},
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

STUDY = Study("lazy", CLAIMS, runs, measure, judged, FIGURES)
