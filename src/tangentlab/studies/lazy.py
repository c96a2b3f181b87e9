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

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tangentlab.records import RunRecord, read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig, evaluate
from tangentlab.studies.lazy_arms import (
    CHOSEN_SHARE,
    FINALISTS,
    FIXED,
    KERNEL,
    KINDS,
    ON_ALL_POINTS,
    TIERS,
    TO,
    TUNING_SEEDS,
    USUAL,
    kind,
    runs,
)
from tangentlab.studies.lazy_claims import CLAIMS, judged
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


# --- figures ---------------------------------------------------------------------------------------------

_CLEAN = Quantity("clean_accuracy", "clean accuracy", percent=True)
_ROBUST = Quantity("apgd_accuracy", "robust accuracy (APGD)", percent=True)
_LAST = {"what": "checkpoint", "checkpoint": "last"}
FIGURES = (
    ValueFigure(
        key="frontier",
        title="Robust accuracy against cost",
        caption="Last checkpoints. Cost is in forward equivalents a training example. Going on with clean "
        "examples, from a fixed epoch or where the kernel decides, is in the next figures.",
        y=(_ROBUST, _CLEAN),
        x=Quantity("cost", "cost (forward equivalents an example)"),
        point="arm",
        frontier=True,
        colour="kind",
        views="y",
        where={**_LAST, "kind": KINDS},
        unless={"arm": ("kernel-clean", *(f"clean-at-{share:g}" for share in FIXED["clean"]))},
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
