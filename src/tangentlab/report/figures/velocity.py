"""How fast the kernel turns, with the stages of training shaded."""

from __future__ import annotations

from collections.abc import Sequence

from tangentlab.report.figure import Axis, Figure, LinePanel, Span, View
from tangentlab.report.figures._common import conclude, line_of, time_axis
from tangentlab.report.subject import Subject

_ANGLE = Axis("angle per step (radians)", log=True)
_DISTANCE = Axis("kernel distance per step", log=True)


def velocity(runs: Sequence[Subject]) -> Figure:
    """A panel a run: the stages are those of the kernel on clean inputs, the others stand beside it."""
    moving = [run for run in runs if run.stages is not None]
    return Figure(
        key="velocity",
        title="Kernel velocity and stages",
        caption="Angle by which the kernel turns in one optimizer step, between snapshots, on a logarithmic "
        "scale. The stages are found in the curve on clean inputs; a falling learning rate alone makes a "
        "kernel look lazy.",
        finding=conclude(
            "a fast start, a lazy stage in which the kernel hardly moves, and movement again",
            [(run, _sentence(run)) for run in moving],
            found=any(run.stages and run.stages.lazy for run in moving),
            missing="no run recorded a kernel velocity",
        ),
        views=(View("", tuple(_panel(run) for run in moving)),) if moving else (),
    )


def _panel(run: Subject) -> LinePanel:
    angles = bool(run.inputs_of("angle_velocity"))
    metric = "angle_velocity" if angles else "velocity"
    lines = [line_of(run, inputs, run.velocity(inputs)) for inputs in run.inputs_of(metric)]
    return LinePanel(
        title=run.label,
        x_axis=time_axis(run.axis),
        y_axis=_ANGLE if angles else _DISTANCE,
        lines=tuple(line for line in lines if line.x),
        spans=_spans(run),
        colour=run.place,
    )


def _spans(run: Subject) -> tuple[Span, ...]:
    stages = run.stages
    if stages is None or stages.lazy is None or stages.end is None:
        return ()
    start = run.velocity(run.velocity_inputs).x[0]
    spans = [Span(start, stages.lazy.low, "learning"), Span(stages.lazy.low, stages.lazy.high, "lazy")]
    if stages.third_start is not None:
        spans.append(Span(stages.third_start, stages.third_end or stages.end, "again"))
    return tuple(span for span in spans if span.end > span.start)


def _sentence(run: Subject) -> str:
    said = run.stages.describe(run.axis) if run.stages else ""
    return f"{said[:1].lower()}{said[1:].rstrip('.')}"
