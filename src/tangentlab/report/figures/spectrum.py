"""The kernel's largest eigenvalues over time."""

from __future__ import annotations

from collections.abc import Sequence

from tangentlab.report.figure import Axis, Figure, Line, LinePanel, View
from tangentlab.report.figures._common import all_inputs, conclude, time_axis
from tangentlab.report.palette import inputs_name
from tangentlab.report.subject import Curve, Subject

_MOST_EIGENVALUES = 10
# Points of share by which the first eigenvalue must have moved to be called a change.
_CHANGE = 0.1


def spectrum(runs: Sequence[Subject]) -> Figure:
    """A view a kind of inputs, a panel a run, a line an eigenvalue: the larger, the stronger its colour."""
    curves = {(run.place, inputs): _eigenvalues(run, inputs) for run in runs for inputs in _inputs(run)}
    curves = {key: value for key, value in curves.items() if value}
    kinds = [
        kind for kind in all_inputs(runs, "top_eigenvalues") if any(inputs == kind for _, inputs in curves)
    ]
    views = tuple(
        View(
            inputs_name(inputs),
            tuple(_panel(run, curves[run.place, inputs]) for run in runs if (run.place, inputs) in curves),
        )
        for inputs in kinds
    )
    shares = [(run, inputs, _shares(curves[run.place, inputs])) for run in runs for inputs in kinds
              if (run.place, inputs) in curves]  # fmt: skip
    return Figure(
        key="spectrum",
        title="Spectrum over time",
        caption="The kernel's largest eigenvalues, averaged over the class kernels, on a logarithmic scale: "
        "the strongest line is the largest.",
        finding=conclude(
            "one eigenvalue far above the rest, and its share of those shown changing by 10 points or more",
            _sentences(runs, shares),
            found=any(abs(last - first) >= _CHANGE for _, _, (first, last) in shares),
            missing="no run recorded eigenvalues",
        ),
        views=views,
        selector="inputs",
    )


def _inputs(run: Subject) -> list[str]:
    return run.inputs_of("top_eigenvalues")


def _eigenvalues(run: Subject, inputs: str) -> list[Curve]:
    """One curve an eigenvalue, the largest first; only what a logarithmic axis can show."""
    series = [
        (t, values)
        for t, values in run.series(run.kernel_name(inputs, "top_eigenvalues"))
        if isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
    ]
    count = min(_MOST_EIGENVALUES, max((len(values) for _, values in series), default=0))
    curves = []
    for i in range(count):
        points = [(t, float(values[i])) for t, values in series if len(values) > i and values[i] > 0]
        curves.append(Curve(tuple(t for t, _ in points), tuple(value for _, value in points)))
    return [curve for curve in curves if curve]


def _panel(run: Subject, curves: Sequence[Curve]) -> LinePanel:
    fade = 0.8 / max(len(curves) - 1, 1)
    return LinePanel(
        title=run.label,
        x_axis=time_axis(run.axis),
        y_axis=Axis("eigenvalue", log=True),
        lines=tuple(
            Line(f"λ{i + 1}", curve.x, curve.y, run.place, opacity=1 - fade * i, in_legend=False)
            for i, curve in enumerate(curves)
        ),
        colour=run.place,
    )


def _shares(curves: Sequence[Curve]) -> tuple[float, float]:
    """The first eigenvalue's share of those shown, at the start and at the end."""
    first, last = curves[0].x[0], curves[0].x[-1]
    ends = [[dict(zip(curve.x, curve.y, strict=True)).get(t, 0.0) for curve in curves] for t in (first, last)]
    return ends[0][0] / sum(ends[0]), ends[1][0] / sum(ends[1])


def _sentences(
    runs: Sequence[Subject], shares: Sequence[tuple[Subject, str, tuple[float, float]]]
) -> list[tuple[Subject, str]]:
    said = []
    for run in runs:
        own = [
            f"{first:.0%} to {last:.0%} on {inputs_name(inputs)}"
            for subject, inputs, (first, last) in shares
            if subject is run
        ]
        if own:
            said.append((run, f"share of the largest {', '.join(own)}"))
    return said
