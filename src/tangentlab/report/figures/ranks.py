"""How many directions the kernel uses: its entropy rank and its participation ratio."""

from __future__ import annotations

from collections.abc import Sequence

from tangentlab.report.figure import Axis, Figure, LinePanel, View
from tangentlab.report.figures._common import conclude, line_of, time_axis
from tangentlab.report.palette import inputs_name
from tangentlab.report.subject import Subject

_MEASURES = {"entropy_rank": "entropy rank", "participation_ratio": "participation ratio"}
# A rank that changed by less than this factor is not called a change.
_FACTOR = 1.5


def ranks(runs: Sequence[Subject]) -> Figure:
    """A view a measure, a panel a run, a line a kind of inputs."""
    views = tuple(
        View(label, tuple(_panel(run, metric) for run in runs if run.inputs_of(metric)))
        for metric, label in _MEASURES.items()
        if any(run.inputs_of(metric) for run in runs)
    )
    metric = next((m for m in _MEASURES if any(run.inputs_of(m) for run in runs)), "entropy_rank")
    ranked = [run for run in runs if run.inputs_of(metric)]
    return Figure(
        key="ranks",
        title="Rank of the kernel",
        caption="Entropy rank: the exponential of the entropy of the normalised eigenvalues. Participation "
        "ratio: (Σλ)²/Σλ². Both lie between 1 and the number of examples; they are taken "
        "per class kernel, then averaged.",
        finding=conclude(
            f"a rank that changes by a factor of {_FACTOR} or more between the first snapshot and the last",
            [(run, _sentence(run, metric)) for run in ranked],
            found=any(
                not 1 / _FACTOR < _change(run, inputs, metric) < _FACTOR
                for run in ranked
                for inputs in run.inputs_of(metric)
            ),
            missing="no run recorded a rank",
        ),
        views=views,
        selector="measure",
    )


def _panel(run: Subject, metric: str) -> LinePanel:
    return LinePanel(
        title=run.label,
        x_axis=time_axis(run.axis),
        y_axis=Axis(_MEASURES[metric]),
        lines=tuple(
            line_of(run, inputs, run.kernel_curve(inputs, metric)) for inputs in run.inputs_of(metric)
        ),
        colour=run.place,
    )


def _change(run: Subject, inputs: str, metric: str) -> float:
    y = run.kernel_curve(inputs, metric).y
    return y[-1] / y[0] if y[0] > 0 else 1.0


def _sentence(run: Subject, metric: str) -> str:
    changes = [
        f"{y[0]:.3g} to {y[-1]:.3g} on {inputs_name(inputs)}"
        for inputs in run.inputs_of(metric)
        if (y := run.kernel_curve(inputs, metric).y)
    ]
    return f"{_MEASURES[metric]} {', '.join(changes)}"
