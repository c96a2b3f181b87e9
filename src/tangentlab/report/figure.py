"""What a figure holds, whoever draws it: views of panels, and what to see in them.

A figure has one view or several (a view for each kind of inputs, say), a view has panels, a panel has lines
or a matrix. Colours are places in the order of the runs, not hues: the renderers choose those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["solid", "dash", "dot", "dashdot"]
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
    """A curve. ``colour`` is the place of its run; ``name`` its entry in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    style: Style = "solid"
    opacity: float = 1.0
    in_legend: bool = True


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
class LinePanel:
    """Curves over training time."""

    title: str
    x_axis: Axis
    y_axis: Axis
    lines: tuple[Line, ...]
    spans: tuple[Span, ...] = ()
    marks: tuple[Mark, ...] = ()
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


Panel = LinePanel | MatrixPanel


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
    """A figure of the report; ``views`` is empty where nothing of it was recorded."""

    key: str
    title: str
    caption: str
    finding: Finding
    views: tuple[View, ...] = ()
    selector: str = ""
    slider: Slider | None = None

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for view in self.views for panel in view.panels)


# --- scales that all panels of a figure share, so that they can be compared ------------------------------


def x_limits(figure: Figure, panel: LinePanel) -> tuple[float, float]:
    """First and last x of all panels with the same x axis."""
    panels = [p for p in figure.panels if isinstance(p, LinePanel) and p.x_axis == panel.x_axis]
    values = [x for p in panels for line in p.lines for x in line.x]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def y_limits(figure: Figure, panel: LinePanel) -> tuple[float, float]:
    """Range of all panels with the same y axis, with a little air."""
    panels = [p for p in figure.panels if isinstance(p, LinePanel) and p.y_axis == panel.y_axis]
    values = [y for p in panels for line in p.lines for y in line.y]
    if panel.y_axis.percent:
        return -0.02, 1.02
    if panel.y_axis.log:
        low, high = math.log10(min(values)), math.log10(max(values))
        air = 0.05 * (high - low) or 0.5
        return 10.0 ** (low - air), 10.0 ** (high + air)
    low, high = min(values), max(values)
    air = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - air, high + air


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


# --- legend ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """An entry of a figure's legend; ``colour`` is None where colours tell panels apart, not entries."""

    name: str
    colour: int | None
    style: Style


def legend(figure: Figure) -> list[Key]:
    """One entry a name; none where a single name would say nothing."""
    panels = [panel for panel in figure.panels if isinstance(panel, LinePanel)]
    lines = [line for panel in panels for line in panel.lines if line.in_legend]
    by_run = any(panel.colour is not None for panel in panels)
    keys = {line.name: Key(line.name, None if by_run else line.colour, line.style) for line in lines}
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
