"""Does the kernel move, or do its inputs? Inputs crafted anew at each snapshot beside inputs crafted once."""

from __future__ import annotations

from collections.abc import Sequence

from tangentlab.report.figure import Axis, Figure, Line, LinePanel, Style, View, number
from tangentlab.report.figures._common import conclude, time_axis
from tangentlab.report.subject import Curve, Subject

_ANEW, _ONCE = "pgd", "pgd-once"
# Relative difference of the two distances from which the inputs are called movers.
_GAP = 0.2


def movement(runs: Sequence[Subject]) -> Figure:
    """A panel a run: distance from the first kernel with inputs crafted anew, and crafted once."""
    both = [run for run in runs if _curve(run, _ANEW) and _curve(run, _ONCE)]
    return Figure(
        key="movement",
        title="Movement of the kernel, movement of its inputs",
        caption="Distance of the kernel from the first snapshot's. Crafted anew: the PGD examples follow the "
        "network. Crafted once: the PGD examples of the first snapshot are kept; only the network moves.",
        finding=conclude(
            f"a gap between the lines of {_GAP:.0%} or more at the end: the inputs moved the kernel too",
            [(run, _sentence(run)) for run in both],
            found=any(abs(_gap(run)) >= _GAP for run in both),
            missing="no run kept a set of inputs crafted once",
        ),
        views=(View("", tuple(_panel(run) for run in both)),) if both else (),
    )


def _curve(run: Subject, inputs: str) -> Curve:
    return run.kernel_curve(inputs, "distance_from_first")


def _panel(run: Subject) -> LinePanel:
    return LinePanel(
        title=run.label,
        x_axis=time_axis(run.axis),
        y_axis=Axis("kernel distance from the first"),
        lines=(_line(run, _ANEW, "PGD crafted anew", "solid"), _line(run, _ONCE, "PGD crafted once", "dash")),
        colour=run.place,
    )


def _line(run: Subject, inputs: str, name: str, style: Style) -> Line:
    curve = _curve(run, inputs)
    return Line(name, curve.x, curve.y, run.place, style)


def _gap(run: Subject) -> float:
    """How much farther the kernel went with inputs crafted once; distances do not add up, so no shares."""
    anew, once = _curve(run, _ANEW).y[-1], _curve(run, _ONCE).y[-1]
    return once / anew - 1 if anew > 0 else 0.0


def _sentence(run: Subject) -> str:
    anew, once = _curve(run, _ANEW).y[-1], _curve(run, _ONCE).y[-1]
    return (
        f"{number(anew)} from the first kernel with inputs crafted anew, {number(once)} with inputs crafted "
        f"once ({round(100 * _gap(run)):+d}%)"
    )
