"""What a figure holds, whoever draws it: views of panels, and what to see in them.

A figure has one view or several (a view for each kind of inputs, say), a view has panels, a panel has lines,
a matrix, or dots in categories. Colours are places in the order of the runs, not hues: the renderers choose
those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["solid", "dash", "dot", "dashdot"]
Anchor = Literal["left", "right"]
State = Literal["found", "not found", "not recorded"]
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Axis:
    """An axis: its name with its unit, and its scale."""

    label: str
    log: bool = False
    percent: bool = False

    @property
    def unit(self) -> str:
        """The name without what stands in brackets."""
        return self.label.split(" (")[0]


@dataclass(frozen=True)
class Line:
    """A curve. ``colour`` is the place of its run, None if it is no run's; ``name`` its entry in the legend.

    ``low`` and ``high`` are the ends of an interval at each x, where there is one. A ``thin`` line is one
    seed of several, behind their mean. With ``labels`` it is points, of these names.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int | None
    style: Style = "solid"
    opacity: float = 1.0
    in_legend: bool = True
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    thin: bool = False
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Span:
    """A shaded stretch of the x axis."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A vertical mark at ``x``; without a label where many would crowd."""

    x: float
    label: str
    colour: int


@dataclass(frozen=True)
class Note:
    """A name written above a point."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class LinePanel:
    """Curves over training time or another number, or points."""

    title: str
    x_axis: Axis
    y_axis: Axis
    lines: tuple[Line, ...]
    spans: tuple[Span, ...] = ()
    marks: tuple[Mark, ...] = ()
    notes: tuple[Note, ...] = ()
    colour: int | None = None


@dataclass(frozen=True)
class MatrixPanel:
    """One matrix, or one a frame.

    ``frame_at[i]`` is the frame at the slider's i-th position, ``moments`` are the frames' times in ``unit``.
    """

    title: str
    x_axis: Axis
    y_axis: Axis
    x: tuple[float, ...]
    y: tuple[float, ...]
    frames: tuple[Matrix, ...]
    value: str
    colour: int | None = None
    row_zero_on_top: bool = False
    frame_at: tuple[int, ...] = (0,)
    moments: tuple[float, ...] = ()
    unit: str = ""


@dataclass(frozen=True)
class Dots:
    """Values of one name in one category, by seed; their mean, and its interval where there is one."""

    name: str
    category: int
    colour: int
    values: Mapping[str, float]
    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class DotPanel:
    """A row a category, the names beside each other in it; values lie along the x axis."""

    title: str
    x_axis: Axis
    y_axis: Axis
    categories: tuple[str, ...]
    dots: tuple[Dots, ...]
    colour: int | None = None


@dataclass(frozen=True)
class ForestRow:
    """A claim's effect against its threshold: values by seed, their mean and its interval."""

    label: str
    text: str
    values: Mapping[str, float]
    mean: float
    interval: tuple[float, float] | None
    threshold: float
    above: bool

    def place(self, value: float) -> float:
        """Where a value lies, in [-1, 1]: the threshold at 0, each row on its own scale."""
        shown = [*self.values.values(), self.mean, *(self.interval or ())]
        farthest = max(abs(x - self.threshold) for x in shown)
        return 0.94 * (value - self.threshold) / farthest if farthest else 0.0


@dataclass(frozen=True)
class ForestPanel:
    """Claims below each other. The page draws them in its table, so that only paper figures hold them."""

    title: str
    rows: tuple[ForestRow, ...]
    colour: int | None = None


Panel = LinePanel | MatrixPanel | DotPanel | ForestPanel


@dataclass(frozen=True)
class View:
    """Panels seen together; ``label`` is its button where a figure has several."""

    label: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Slider:
    """Positions in time that all matrices of a figure follow.

    ``axis`` is the time axis they lie on; None where runs over epochs stand beside runs over steps, and the
    positions count snapshots.
    """

    axis: Axis | None
    positions: tuple[float, ...]

    @property
    def label(self) -> str:
        return self.axis.unit if self.axis else "snapshot"


@dataclass(frozen=True)
class Part:
    """What is found in one run; ``colour`` is its place."""

    run: str
    colour: int
    text: str


@dataclass(frozen=True)
class Finding:
    """What to look for, and whether it is there in these runs; without parts, ``missing`` says what lacks."""

    look_for: str
    state: State
    parts: tuple[Part, ...]
    missing: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure of the report; ``views`` is empty where nothing of it was recorded.

    An ``optional`` one is left out then: what it shows is not expected of a run.
    """

    key: str
    title: str
    caption: str
    finding: Finding | None = None
    views: tuple[View, ...] = ()
    selector: str = ""
    slider: Slider | None = None
    optional: bool = False

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for view in self.views for panel in view.panels)


# --- scales that all panels of a figure share, so that they can be compared ------------------------------


def x_limits(figure: Figure, panel: LinePanel) -> tuple[float, float]:
    """First and last x of all panels with the same x axis, with a little air around points."""
    panels = [p for p in figure.panels if isinstance(p, LinePanel) and p.x_axis == panel.x_axis]
    values = [x for p in panels for line in p.lines for x in line.x]
    if any(line.labels for p in panels for line in p.lines):
        return _limits(values, [], panel.x_axis)
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def y_limits(figure: Figure, panel: LinePanel) -> tuple[float, float]:
    """Range of all panels with the same y axis, with a little air; accuracies have all of [0, 1], unless they
    are points, whose differences count."""
    panels = [p for p in figure.panels if isinstance(p, LinePanel) and p.y_axis == panel.y_axis]
    lines = [line for p in panels for line in p.lines]
    values = [y for line in lines for y in line.y]
    curves = not any(line.labels for line in lines)
    if curves and panel.y_axis.percent and min(values) >= 0 and max(values) <= 1:
        return -0.02, 1.02
    return _limits(values, [y for line in lines for y in (*line.low, *line.high)], panel.y_axis)


def dot_limits(figure: Figure, panel: DotPanel) -> tuple[float, float]:
    """Range of all panels with the same x axis, with a little air."""
    dots = [d for p in figure.panels if isinstance(p, DotPanel) and p.x_axis == panel.x_axis for d in p.dots]
    values = [x for d in dots for x in (*d.values.values(), d.mean)]
    return _limits(values, [x for d in dots for x in d.interval or ()], panel.x_axis)


def _limits(values: Sequence[float], ends: Sequence[float], axis: Axis) -> tuple[float, float]:
    """All values, and of their intervals' ends what lies within once their range: two seeds' are endless.
    Of shares nothing beyond 0 and 1."""
    log = axis.log
    if axis.percent and min(values) >= 0 and max(values) <= 1:
        ends = [min(max(end, 0.0), 1.0) for end in ends]
    if log:
        values, ends = [math.log10(v) for v in values], [math.log10(e) for e in ends]
    low, high = min(values), max(values)
    span = high - low
    low, high = max(min([low, *ends]), low - span), min(max([high, *ends]), high + span)
    air = 0.05 * (high - low) or (0.5 if log else 0.05 * abs(high) or 0.5)
    low, high = low - air, high + air
    return (10.0**low, 10.0**high) if log else (low, high)


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks 1, 2, 5, 10 … of an axis below two decades, where powers of ten are too few; else none."""
    if high / low >= 100:
        return []
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def value_limits(figure: Figure) -> tuple[float, float]:
    """Smallest and largest entry of all matrices of a figure."""
    values = [
        value
        for panel in figure.panels
        if isinstance(panel, MatrixPanel)
        for frame in panel.frames
        for row in frame
        for value in row
        if math.isfinite(value)
    ]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low, low + 1.0)


# --- names above points ----------------------------------------------------------------------------------

_NOTE = 0.35  # of the panel's width, that a name may take


def note_rows(figure: Figure, panel: LinePanel) -> list[tuple[Note, int, Anchor]]:
    """(note, row above the panel, end of the name that lies over its point): names of near points lie above
    each other, the leftmost on top, so that no line down to a point crosses a name that begins left of it."""
    low, high = x_limits(figure, panel)
    if panel.x_axis.log:
        low, high = math.log(low), math.log(high)
    rows: list[float] = []  # of each the leftmost place that is taken
    found = []
    for note in sorted(panel.notes, key=lambda note: -note.x):
        x = math.log(note.x) if panel.x_axis.log else note.x
        place = (x - low) / (high - low)
        anchor: Anchor = "right" if place > 1 - _NOTE else "left"
        start, end = (place - _NOTE, place) if anchor == "right" else (place, place + _NOTE)
        row = next((row for row in range(len(rows)) if end <= min(rows[row:])), len(rows))
        rows[row : row + 1] = [start]
        found.append((note, row, anchor))
    return found


# --- rows of dots ----------------------------------------------------------------------------------------


def dot_names(figure: Figure) -> dict[str, list[str]]:
    """What lies beside each other in each category, in all panels of a figure alike."""
    names: dict[str, list[str]] = {}
    for panel in (panel for panel in figure.panels if isinstance(panel, DotPanel)):
        for dots in panel.dots:
            own = names.setdefault(panel.categories[dots.category], [])
            if dots.name not in own:
                own.append(dots.name)
    return names


def dot_rows(figure: Figure, panel: DotPanel) -> list[tuple[Dots, float, float]]:
    """(dots, row of the mean, row of the seeds a little below), around the category's number."""
    names = dot_names(figure)
    share = 0.75 / max(map(len, names.values()))
    rows = []
    for dots in panel.dots:
        own = names[panel.categories[dots.category]]
        middle = dots.category + share * (own.index(dots.name) + 0.5 - len(own) / 2)
        rows.append((dots, middle - 0.14 * share, middle + 0.18 * share))
    return rows


# --- legend ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """An entry of a figure's legend; ``colour`` is None where colours tell panels apart, not entries."""

    name: str
    colour: int | None
    style: Style | Literal["dots"]


def legend(figure: Figure) -> list[Key]:
    """One entry a name; none where a single name would say nothing."""
    panels = [panel for panel in figure.panels if isinstance(panel, LinePanel)]
    lines = [line for panel in panels for line in panel.lines if line.in_legend]
    by_run = any(panel.colour is not None for panel in panels)
    keys = {
        line.name: Key(line.name, None if by_run else line.colour, "dots" if line.labels else line.style)
        for line in lines
    }
    dots = [d for panel in figure.panels if isinstance(panel, DotPanel) for d in panel.dots]
    keys |= {d.name: Key(d.name, d.colour, "dots") for d in dots}
    return list(keys.values()) if len(keys) > 1 else []


def stages_in(figure: Figure) -> list[str]:
    """Names of the shaded stages, for the legend."""
    panels = [panel for panel in figure.panels if isinstance(panel, LinePanel)]
    return list(dict.fromkeys(span.label for panel in panels for span in panel.spans))


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spaced, first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def number(value: float) -> str:
    """A number for a sentence: three significant digits, no trailing zeros."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def listed(words: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *head, last = words
    return f"{', '.join(head)} and {last}" if head else last
