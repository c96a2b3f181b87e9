"""How far apart the kernels on clean, FGSM and PGD inputs are, and when those of FGSM and PGD part."""

from __future__ import annotations

from collections.abc import Sequence

from tangentlab.report.figure import Axis, Figure, LinePanel, Mark, View, number
from tangentlab.report.figures._common import conclude, line_of, time_axis
from tangentlab.report.subject import Curve, Subject


def gaps(runs: Sequence[Subject]) -> Figure:
    """A panel a run, a line a pair of inputs; marks at the parting and at the collapse."""
    panels = tuple(panel for run in runs if (panel := _panel(run)))
    return Figure(
        key="gaps",
        title="Clean, FGSM and PGD kernels",
        caption="Kernel distance between the kernels of one network on two kinds of inputs, on a logarithmic "
        "scale. Marks: where the kernels on FGSM and PGD inputs parted, and where robust accuracy fell "
        "(catastrophic overfitting).",
        finding=conclude(
            "the FGSM-to-PGD line rising for good, and whether it does so before robust accuracy falls",
            [(run, said) for run in runs if (said := _sentence(run))],
            found=any(run.parting is not None for run in runs),
            missing="no run recorded the distance between its FGSM and PGD kernels",
        ),
        views=(View("", panels),) if panels else (),
    )


def _sentence(run: Subject) -> str:
    """When the kernels parted and robust accuracy fell, in words; "" where the kernels were not recorded."""
    gap = run.kernel_curve("fgsm~pgd", "distance")
    if not gap:
        return ""
    parted, fell = run.parting, run.collapse.epoch if run.collapse else None
    kernels = (
        "the kernels did not part" if parted is None else f"the kernels parted at {run.axis} {parted:.3g}"
    )
    robust = "robust accuracy not recorded"
    if fell is not None:
        robust = f"robust accuracy fell at {run.axis} {fell:.3g}"
    elif run.records_collapse:
        robust = "robust accuracy did not fall"
    order = f", {_order(parted, fell, run.axis)}" if parted is not None and fell is not None else ""
    return f"{kernels}, {robust}{order} (FGSM-to-PGD distance {number(max(gap.y))} at most)"


def _order(parted: float, fell: float, axis: str) -> str:
    lead = fell - parted
    return f"{abs(lead):.2g} {axis}s {'after' if lead > 0 else 'before'} the parting" if lead else "at once"


def _panel(run: Subject) -> LinePanel | None:
    curves: list[tuple[str, Curve]] = [
        (pair, run.kernel_curve(pair, "distance").positive())
        for pair in run.inputs_of("distance")
        if pair.count("~") == 1
    ]
    lines = tuple(line_of(run, pair, curve) for pair, curve in curves if curve)
    if not lines:
        return None
    marks = []
    if run.parting is not None:
        marks.append(Mark(run.parting, f"parted {run.parting:.3g}", run.place))
    if run.collapse is not None:
        marks.append(Mark(run.collapse.epoch, f"fell {run.collapse.epoch:.3g}", run.place))
    return LinePanel(
        title=run.label,
        x_axis=time_axis(run.axis),
        y_axis=Axis("kernel distance", log=True),
        lines=lines,
        marks=tuple(marks),
        colour=run.place,
    )
