"""Clean, FGSM and PGD accuracy of all runs over training, on the validation split."""

from __future__ import annotations

from collections.abc import Sequence

from tangentlab.report.figure import Axis, Figure, Line, LinePanel, Mark, View
from tangentlab.report.figures._common import by_axis, conclude, time_axis
from tangentlab.report.subject import Subject

_KINDS = {
    "clean_accuracy": "clean accuracy",
    "fgsm_accuracy": "FGSM accuracy",
    "robust_accuracy": "PGD accuracy",
}


def accuracies(runs: Sequence[Subject]) -> Figure:
    """A panel a kind of accuracy, a line a run; a mark where a run overfitted catastrophically."""
    panels = tuple(
        _panel(name, axis, group)
        for axis, group in by_axis(runs)
        for name in _KINDS
        if any(run.curve(name) for run in group)
    )
    finding = conclude(
        "PGD accuracy that falls by half or more while FGSM accuracy stays: catastrophic overfitting",
        [(run, _sentence(run)) for run in runs if run.records_collapse],
        found=any(run.collapse for run in runs),
        missing="no run recorded both FGSM and PGD accuracy",
    )
    return Figure(
        key="accuracies",
        title="Accuracies",
        caption="Accuracy on the validation split, a colour a run: on clean inputs, under FGSM (one step) "
        "and under PGD (several steps). A dotted upright line marks where a run overfitted catastrophically.",
        finding=finding,
        views=(View("", panels),) if panels else (),
    )


def _panel(name: str, axis: str, runs: Sequence[Subject]) -> LinePanel:
    recorded = [(run, run.curve(name)) for run in runs if run.curve(name)]
    collapses = [(run, run.collapse) for run, _ in recorded if run.collapse and name == "robust_accuracy"]
    return LinePanel(
        title=_KINDS[name],
        x_axis=time_axis(axis),
        y_axis=Axis("accuracy", percent=True),
        lines=tuple(Line(run.label, curve.x, curve.y, run.place) for run, curve in recorded),
        marks=tuple(
            Mark(collapse.epoch, f"fell {collapse.epoch:.3g}", run.place) for run, collapse in collapses
        ),
    )


def _sentence(run: Subject) -> str:
    robust, fgsm = run.curve("robust_accuracy"), run.curve("fgsm_accuracy")
    if run.collapse is None:
        best, last = max(robust.y), robust.y[-1]
        return f"no collapse (PGD accuracy {best:.1%} at best, {last:.1%} at the end)"
    fall = run.collapse
    what = "collapse" if fall.lasted >= run.lasting else "passing collapse"
    return (
        f"{what} at {run.axis} {fall.epoch:.3g}, PGD accuracy down from "
        f"{fall.best_robust_accuracy:.1%} to {robust.y[-1]:.1%} at the end, FGSM accuracy {fgsm.y[-1]:.1%}"
    )
