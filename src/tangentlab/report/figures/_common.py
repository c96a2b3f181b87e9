"""What several figures share: time axes, and one sentence from what was found run by run."""

from __future__ import annotations

from collections.abc import Sequence

from tangentlab.report.figure import Axis, Finding, Line, Part, Span, State
from tangentlab.report.palette import inputs_name, style_of
from tangentlab.report.subject import Curve, Subject

_TIME = {"epoch": Axis("epoch"), "step": Axis("step (optimizer updates)")}


def time_axis(axis: str) -> Axis:
    """The x axis of a run that is recorded over epochs, or over steps only."""
    return _TIME[axis]


def by_axis(runs: Sequence[Subject]) -> list[tuple[str, list[Subject]]]:
    """Runs over epochs and runs over steps apart: they cannot share a panel."""
    groups = [(axis, [run for run in runs if run.axis == axis]) for axis in _TIME]
    return [(axis, group) for axis, group in groups if group]


def line_of(run: Subject, inputs: str, curve: Curve) -> Line:
    """A curve of one run on one kind of inputs: the run's colour, the inputs' line style."""
    return Line(inputs_name(inputs), curve.x, curve.y, run.place, style_of(inputs))


def spans_of(run: Subject, looks: Sequence[tuple[float, bool]], label: str) -> tuple[Span, ...]:
    """Where the looks (time, whether) say yes, each until the next, the last until the training's end."""
    ends = [time for time, _ in looks[1:]] + [max([looks[-1][0], *run.curve("train_loss").x])]
    spans: list[Span] = []
    for (start, there), end in zip(looks, ends, strict=True):
        if there and spans and spans[-1].end == start:
            spans[-1] = Span(spans[-1].start, end, label)
        elif there and end > start:
            spans.append(Span(start, end, label))
    return tuple(spans)


def all_inputs(runs: Sequence[Subject], metric: str) -> list[str]:
    """Kinds of inputs on which any run recorded a kernel metric."""
    return list(dict.fromkeys(inputs for run in runs for inputs in run.inputs_of(metric)))


def conclude(look_for: str, said: Sequence[tuple[Subject, str]], *, found: bool, missing: str) -> Finding:
    """Put one run's words after another's; without any, say what is missing."""
    if not said:
        return Finding(look_for, "not recorded", (), missing)
    state: State = "found" if found else "not found"
    return Finding(look_for, state, tuple(Part(run.label, run.place, text) for run, text in said))
