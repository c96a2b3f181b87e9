"""What a switch between two methods decided, and on what evidence."""

from __future__ import annotations

from collections.abc import Sequence

from tangentlab.report.figure import Axis, Figure, Line, LinePanel, Mark, View
from tangentlab.report.figures._common import conclude, spans_of, time_axis
from tangentlab.report.subject import Curve, Subject, clean_text

_PHASES = ("full", "cheap")
_VELOCITY = Axis("angle per step (radians)", log=True)
_HELD_OUT = Axis("held-out PGD accuracy", percent=True)
_VALIDATION = Axis("PGD accuracy, validation", percent=True)


def decisions(runs: Sequence[Subject]) -> Figure:
    """A panel a run and kind of evidence; shaded while the cheap method trained, a mark at each change."""
    switched = [run for run in runs if _phases(run)]
    panels = tuple(
        panel
        for run in switched
        for panel in (_velocity(run), _held_out(run), _validation(run))
        if panel.lines
    )
    return Figure(
        key="decisions",
        title="What the switch decided",
        caption="Shaded where the cheaper method trained. Above, the velocity of the switch's own probe: the "
        "cheap phase begins where it stays below the dashed level and ends where it stays above the dotted "
        "one, or, if asked, where the learning rate falls. Robust accuracy on held-out points is the safety "
        "net: the phase ends where it falls below the dotted level. That on the validation split decides "
        "nothing.",
        finding=conclude(
            "a change of method where the kernel has become lazy, without a fall of robust accuracy after it",
            [(run, _sentence(run)) for run in switched],
            found=any(phase == "cheap" for run in switched for _, phase in _phases(run)),
            missing="no run had a switch",
        ),
        views=(View("", panels),) if panels else (),
        optional=True,
    )


def _phases(run: Subject) -> list[tuple[float, str]]:
    """(time, phase) of the looks; what a foreign log calls otherwise is left out."""
    return [(time, phase) for time, phase in run.series("switch/phase") if phase in _PHASES]


def _velocity(run: Subject) -> LinePanel:
    curves = {
        "velocity": run.curve("switch/velocity"),
        "lazy below": run.curve("switch/lazy_below"),
        "learning above": run.curve("switch/learning_above"),
    }
    return _panel(run, _VELOCITY, {name: curve.positive() for name, curve in curves.items()})


def _held_out(run: Subject) -> LinePanel:
    curves = {
        "robust accuracy": run.curve("switch/robust_accuracy"),
        "least allowed": run.curve("switch/least_robust_accuracy"),
    }
    return _panel(run, _HELD_OUT, curves)


def _validation(run: Subject) -> LinePanel:
    return _panel(run, _VALIDATION, {"robust accuracy": run.curve("robust_accuracy")})


_STYLES = {"lazy below": "dash", "learning above": "dot", "least allowed": "dot"}


def _panel(run: Subject, y_axis: Axis, curves: dict[str, Curve]) -> LinePanel:
    return LinePanel(
        title=run.label,
        x_axis=time_axis(run.axis),
        y_axis=y_axis,
        lines=tuple(
            Line(name, curve.x, curve.y, run.place, _STYLES.get(name, "solid"))  # type: ignore[arg-type]
            for name, curve in curves.items()
            if curve
        ),
        spans=spans_of(run, [(time, phase == "cheap") for time, phase in _phases(run)], "cheap"),
        marks=tuple(Mark(time, "", run.place) for time, _ in run.series("switch/reason")),
        colour=run.place,
    )


def _sentence(run: Subject) -> str:
    changes = [
        f"{'to the cheaper method' if phase == 'cheap' else 'back'} at {run.axis} {time:.3g}, as "
        f"{clean_text(str(reason), 80)}"
        for time, reason in run.series("switch/reason")
        for at, phase in _phases(run)
        if at == time
    ]
    return "; ".join(changes) or "the method never changed"
