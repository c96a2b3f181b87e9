"""Catastrophic overfitting prevented: single-step training that the alarm turns to two steps, and its rivals.

Asked: arXiv 2312.02236 cures the collapse of single-step training by the kernel's spectrum. Here the alarm
(tangentlab.OverfittingAlarm) watches what PGD in two steps leaves of the confidence under FGSM, and while it
is raised training takes something else: two steps, also from the weights before the alarm; more noise
(N-FGSM); a smaller step; GradAlign's penalty; a penalty that keeps FGSM's updates useful against PGD
(update_align), on the kernel between the two inputs. Against the
single-step methods that are said not to collapse; PGD in two steps throughout, which costs 1.4 times as much
as FGSM; two steps from a fixed epoch on; and two steps once PGD accuracy on held-out examples fell (Li et al.
2020, arXiv 2006.03089). The shipped method starts from FGSM-RS; FGSM with the same alarm says what the alarm
does by itself.

At an eps where FGSM training collapses on most seeds, and at 1.5 times that or less. A run is cured where it
learned something and stayed quiet, whatever FGSM accuracy did; FGSM's collapse is one that lasts
(tangentlab.studies.overfitting_watches). Robust accuracy is that of the last checkpoint: AutoAttack's for the
finalists, on the first test points, and APGD's on more of them, of the best checkpoint too. Cost is in
forward equivalents a training example, the alarm's looks counted. The single-step rivals are there too with
as many epochs as 1.4 times FGSM's cost buys.

The threshold that steers was chosen on the tuning seeds, which are not judged; the rivals' settings are to be
chosen there too (benchmarks/cure_settings.py). The other variants of what the alarm steers to are for them
alone.
Hardware and time: a CPU; for tier 3 a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from tangentlab.records import RunRecord, read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig, evaluate
from tangentlab.runs.evaluation import BEFORE_ALARM, checkpoint_path
from tangentlab.studies.cure_arms import FINALISTS, PLACES, TIERS, kind, runs, tier_config
from tangentlab.studies.cure_claims import CLAIMS, judged
from tangentlab.studies.overfitting_watches import TUNING_SEEDS, fate
from tangentlab.studies.study import Study, Values

# --- measurements ----------------------------------------------------------------------------------------


def measure(folder: Path, config: RunConfig) -> Iterator[Values]:
    """A line of the run and its checkpoints."""
    tier = next(tier for tier in TIERS.values() if tier_config(tier).data == config.data)
    arm = config.name.rpartition("-")[0]
    record = read_run(folder)
    found = evaluate(folder, attacks=("none", "apgd"), checkpoints=("last",), test_size=tier.points)
    if arm in FINALISTS:
        found += evaluate(folder, attacks=("autoattack",), checkpoints=("last",), test_size=tier.autoattack)
    judged_by = {line["attack"]: line for line in found}
    others: dict[str, float] = {}
    for name, checkpoint in (("best", "best"), ("kept", BEFORE_ALARM)):
        if checkpoint_path(folder, checkpoint).exists():
            (line,) = evaluate(folder, attacks=("apgd",), checkpoints=(checkpoint,), test_size=tier.points)
            others |= {f"{name}_accuracy": line["accuracy"], f"{name}_epoch": line["epoch"]}
    yield {
        "arm": arm,
        "kind": kind(arm),
        "eps": config.eps,
        "place": PLACES[tier.eps.index(config.eps)],
        "clean_accuracy": judged_by.pop("none")["accuracy"],
        **{f"{name}_accuracy": line["accuracy"] for name, line in judged_by.items()},
        **{f"{name}_n": line["n"] for name, line in judged_by.items()},
        **course(record),
        **others,
        "cost": record.status["cost"],
        "steering_cost": record.status.get("steering_cost", 0.0),
        **{name: record.status[name] for name in ("train_seconds", "steering_seconds")},
        **_raised(record),
    }


def course(record: RunRecord) -> Values:
    """The run's accuracies on the validation split, and what became of it."""
    epochs, robust = record.series("robust_accuracy")
    along = {"epochs": epochs, "robust_accuracy": robust, "fgsm_accuracy": record.series("fgsm_accuracy")[1]}
    became, collapse = fate(along)
    return {**along, "best_validation_accuracy": max(robust[1:]), "fate": became, "collapse": collapse}


def _raised(record: RunRecord) -> dict[str, float]:
    """The share of the looks at which the alarm was raised, where there is one."""
    looks = [float(raised) for raised in record.series("alarm/raised")[1]]
    return {"raised": fmean(looks)} if looks else {}


# --- figures ---------------------------------------------------------------------------------------------

_CLEAN = Quantity("clean_accuracy", "clean accuracy", percent=True)
_ROBUST = Quantity("apgd_accuracy", "robust accuracy (APGD)", percent=True)
FIGURES = (
    ValueFigure(
        key="arms",
        title="Robust at the end",
        caption="Last checkpoints; a collapsed network has hardly any robust accuracy. The best one is "
        "chosen by PGD-10 on the validation split.",
        y=(
            _ROBUST,
            Quantity("best_accuracy", "robust accuracy of the best checkpoint (APGD)", percent=True),
            Quantity("autoattack_accuracy", "robust accuracy (AutoAttack)", percent=True),
            _CLEAN,
        ),
        x="arm",
        colour="kind",
        panels="eps",
        views="y",
    ),
    ValueFigure(
        key="frontier",
        title="Robust accuracy against cost",
        caption="Last checkpoints. Cost is in forward equivalents a training example, the looks counted.",
        y=(_ROBUST,),
        x=Quantity("cost", "cost (forward equivalents an example)"),
        point="arm",
        frontier=True,
        colour="kind",
        panels="eps",
    ),
    ValueFigure(
        key="raised",
        title="How often the alarm was raised",
        caption="Share of the looks; while it is raised training takes something else than its one step.",
        y=(Quantity("raised", "raised", percent=True),),
        x="arm",
        colour="kind",
        panels="eps",
    ),
)

STUDY = Study("cure", CLAIMS, runs, measure, judged, FIGURES, tuning_seeds=TUNING_SEEDS, tiers=tuple(TIERS))
