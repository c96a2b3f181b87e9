"""What the alarm of catastrophic overfitting saw, when it spoke, and whether what it warns of came."""

from __future__ import annotations

from collections.abc import Sequence

from tangentlab.report.figure import Axis, Figure, Line, LinePanel, Mark, View
from tangentlab.report.figures._common import conclude, spans_of, time_axis
from tangentlab.report.subject import Subject


def alarm(runs: Sequence[Subject]) -> Figure:
    """A panel a run: the confidence share and the threshold; shaded while the alarm is raised."""
    watched = [run for run in runs if _answers(run)]
    return Figure(
        key="alarm",
        title="The alarm",
        caption="Of the network's confidence in the right classes under FGSM, what PGD in two steps leaves: "
        "every look, each at other examples, and the last three together, against the threshold. Shaded "
        "while the alarm is raised. Marks: where it first spoke, and where robust accuracy fell, a "
        "catastrophic overfitting.",
        finding=conclude(
            "the alarm speaking before robust accuracy falls, and staying silent where it does not",
            [(run, _sentence(run)) for run in watched],
            found=any(run.alarm is not None for run in watched),
            missing="no run had an alarm",
        ),
        views=(View("", tuple(map(_panel, watched))),) if watched else (),
        optional=True,
    )


def _answers(run: Subject) -> list[tuple[float, bool]]:
    """(time, raised) of the looks; what a foreign log calls otherwise is left out."""
    return [(time, raised) for time, raised in run.series("alarm/raised") if isinstance(raised, bool)]


def _panel(run: Subject) -> LinePanel:
    curves = [
        ("one look", run.curve("alarm/share"), "dot"),
        ("three looks", run.curve("alarm/pooled"), "solid"),
        ("threshold", run.curve("alarm/threshold"), "dash"),
    ]
    marks = []
    if run.alarm is not None:
        marks.append(Mark(run.alarm, f"spoke {run.alarm:.3g}", run.place))
    if run.collapse is not None:
        marks.append(Mark(run.collapse.epoch, f"fell {run.collapse.epoch:.3g}", run.place))
    return LinePanel(
        title=run.label,
        x_axis=time_axis(run.axis),
        y_axis=Axis("confidence share"),
        lines=tuple(
            Line(name, curve.x, curve.y, run.place, style)  # type: ignore[arg-type]
            for name, curve, style in curves
            if curve
        ),
        spans=spans_of(run, _answers(run), "raised"),
        marks=tuple(marks),
        colour=run.place,
    )


def _sentence(run: Subject) -> str:
    spoke, fell = run.alarm, run.collapse.epoch if run.collapse else None
    alarm = "the alarm was silent" if spoke is None else f"the alarm spoke at {run.axis} {spoke:.3g}"
    robust = "robust accuracy not recorded"
    if fell is not None:
        robust = f"robust accuracy fell at {run.axis} {fell:.3g}"
    elif run.records_collapse:
        robust = "robust accuracy did not fall"
    lead = ""
    if spoke is not None and fell is not None:
        lead = f", {abs(fell - spoke):.2g} {run.axis}s {'later' if fell >= spoke else 'earlier'}"
    return f"{alarm}; {robust}{lead}"
