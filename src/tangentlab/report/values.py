"""Figures of a study's raw values, drawn as the study declares them: means over seeds with their intervals.

The interval is Student's over seeds, 95 %. Lines of one seed that a figure does not tell apart are averaged
first, so that seeds weigh the same. On a logarithmic scale both are taken of the logarithm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from tangentlab.errors import ConfigError, RunFolderError
from tangentlab.metrics import mean_interval
from tangentlab.report.figure import Axis, DotPanel, Dots, Figure, Line, LinePanel, Note, Style, View
from tangentlab.report.figures._common import time_axis
from tangentlab.report.palette import RUNS_LIGHT
from tangentlab.report.subject import clean_text, is_number

TIMES = ("epoch", "step")
QUANTITY = "y"

Values = Mapping[str, Any]
_STYLES: tuple[Style, ...] = ("solid", "dash", "dot", "dashdot")  # where colours repeat


@dataclass(frozen=True)
class Quantity:
    """A number among the raw values.

    Args:
        key: in the lines.
        label: of its axis, with its unit.
        name: where several are told apart; the label if empty.
        log, percent: its scale.
    """

    key: str
    label: str
    name: str = ""
    log: bool = False
    percent: bool = False

    @property
    def axis(self) -> Axis:
        return Axis(self.label, log=self.log, percent=self.percent)

    def __str__(self) -> str:
        return self.name or self.label


@dataclass(frozen=True)
class ValueFigure:
    """A figure of a study's raw values.

    Args:
        key: of its files, in a-z, 0-9 and "-".
        title, caption: say what is seen; how means and intervals are drawn is added.
        y: the quantities.
        x: "epoch", "step" or a quantity for curves, any other key for categories.
        point: against a quantity, the key whose every value is a point; "" for curves.
        frontier: of points, whether to draw the best at no more x, and to write their names.
        colour: key, a colour a value; "y", a colour a quantity, all on one axis.
        panels: likewise, a panel each; "" for one panel.
        views: likewise, a button each.
        where: key -> the value, or a tuple of values, that a line must have to be drawn.
        unless: likewise, of which it must have none.

    Raises:
        ConfigError: a key that cannot name a file, or quantities that are not told apart.
    """

    key: str
    title: str
    caption: str
    y: tuple[Quantity, ...]
    x: str | Quantity = "epoch"
    point: str = ""
    frontier: bool = False
    colour: str = "method"
    panels: str = ""
    views: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    unless: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9-]+", self.key):
            raise ConfigError(f"figure key {self.key!r} cannot name a file; use a-z, 0-9 and '-'")
        if self.point and not isinstance(self.x, Quantity):
            raise ConfigError(f"figure {self.key!r}: points need a quantity as x, not {self.x!r}")
        if self.frontier and not self.point:
            raise ConfigError(f"figure {self.key!r}: a frontier is one of points")
        if len(self.y) != 1 and [self.colour, self.panels, self.views].count(QUANTITY) != 1:
            raise ConfigError(
                f"figure {self.key!r} has {len(self.y)} quantities; one of colour, panels and views must be "
                f"{QUANTITY!r} to tell several apart"
            )
        if self.colour == QUANTITY and len({quantity.axis for quantity in self.y}) > 1:
            raise ConfigError(f"figure {self.key!r} has quantities of one axis with several labels or scales")


def read_figures(verdicts: Mapping[str, Any], path: Path) -> list[ValueFigure]:
    """The figures that a study.json declares, if any.

    Raises:
        RunFolderError: one of them is not what :class:`ValueFigure` writes.
    """
    try:
        figures = [_read_figure(entry) for entry in verdicts.get("figures", ())]
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{path}: its figures cannot be read: {error}") from error
    keys = [figure.key for figure in figures]
    if len(set(keys)) < len(keys):
        raise RunFolderError(f"{path}: two of its figures have one key, of {', '.join(keys)}")
    return figures


def read_derived(verdicts: Mapping[str, Any], path: Path) -> list[Values]:
    """The lines that a study.json derives from the raw values, if any.

    Raises:
        RunFolderError: they are no lines.
    """
    lines = verdicts.get("derived", [])
    if not isinstance(lines, list) or not all(isinstance(line, Mapping) for line in lines):
        raise RunFolderError(f"{path}: its derived values cannot be read")
    return lines


def _read_figure(entry: Mapping[str, Any]) -> ValueFigure:
    texts = {name: entry[name] for name in ("key", "title", "caption", "colour", "panels", "views")}
    texts["point"] = entry.get("point", "")
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("a name is no text")
    x = _read_quantity(entry["x"]) if isinstance(entry["x"], Mapping) else entry["x"]
    if not isinstance(x, (str, Quantity)):
        raise TypeError("a name is no text")
    return ValueFigure(
        **texts,
        x=x,
        y=tuple(map(_read_quantity, entry["y"])),
        frontier=bool(entry.get("frontier", False)),
        where=dict(entry["where"]),
        unless=dict(entry.get("unless", {})),
    )


def _read_quantity(entry: Mapping[str, Any]) -> Quantity:
    texts = {name: entry[name] for name in ("key", "label", "name")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("a name is no text")
    return Quantity(**texts, log=bool(entry["log"]), percent=bool(entry["percent"]))


def value_figure(declared: ValueFigure, lines: Sequence[Values]) -> Figure:
    """What the declared figure shows of the raw values."""
    kept = [
        line
        for line in lines
        if all(_meets(line, *asked) for asked in declared.where.items())
        and not any(_meets(line, *asked) for asked in declared.unless.items())
    ]
    places = _places(lines, kept, declared.colour)
    views = []
    for label, of_view, quantities in _split(kept, declared.views, declared.y):
        rows = [] if isinstance(declared.x, Quantity) else _rows(of_view, declared.x, quantities)
        drawn = (
            _panel(declared, name or _title(declared, label, left), of_panel, left, rows, places)
            for name, of_panel, left in _split(of_view, declared.panels, quantities)
        )
        panels = tuple(panel for panel in drawn if panel is not None)
        if panels:
            views.append(View(label, panels))
    curves = isinstance(declared.x, Quantity) or declared.x in TIMES
    said = [declared.caption, _POINTS if declared.point else _CURVES if curves else _DOTS]
    if declared.frontier:
        said.append(_FRONTIER)
    if any(quantity.log for quantity in declared.y):
        said.append(_GEOMETRIC)
    return Figure(
        key=f"values-{declared.key}",  # apart from the figures on runs
        title=declared.title,
        caption=" ".join(said),
        views=tuple(views),
        selector="quantity" if declared.views == QUANTITY else _plain(declared.views),
    )


_CURVES = "Lines: mean over seeds; shaded: its 95 % Student interval; thin: single seeds."
_POINTS = "Diamonds and bars: mean over seeds and its 95 % Student interval."
_FRONTIER = "Dashed: the best that is to be had at no more; its points are named."
_DOTS = "Circles: single seeds; diamonds and bars: their mean and its 95 % Student interval."
_GEOMETRIC = "On a logarithmic scale the mean is the geometric one."


def _title(declared: ValueFigure, view: str, quantities: Sequence[Quantity]) -> str:
    """Of a view's only panel; its button says the view."""
    return view if declared.views == QUANTITY else quantities[0].label


def _panel(
    declared: ValueFigure,
    title: str,
    lines: Sequence[Values],
    quantities: Sequence[Quantity],
    rows: Sequence[Any],
    places: Mapping[Any, int],
) -> LinePanel | DotPanel | None:
    axis = quantities[0].axis
    if declared.colour == QUANTITY:
        parts = [(place, clean_text(str(q)), lines, q) for place, q in enumerate(quantities)]
    else:
        coloured = _by(lines, declared.colour).items()
        parts = [(places[value], _text(value), own, quantities[0]) for value, own in coloured]
    x = declared.x
    if isinstance(x, str) and x not in TIMES:
        dots = tuple(d for part in parts for d in _dots(*part, x, rows))
        return DotPanel(title, axis, Axis(_plain(x)), tuple(map(_text, rows)), dots) if dots else None
    key, x_axis = (x.key, x.axis) if isinstance(x, Quantity) else (x, time_axis(x))
    if isinstance(x, Quantity) and declared.point:
        points = [p for part in parts if (p := _points(*part, x, declared.point)) is not None]
        best = _frontier(points) if declared.frontier else ()
        front = [_steps(best)] if len(best) > 1 else []
        return LinePanel(title, x_axis, axis, (*front, *points), notes=tuple(best)) if points else None
    curves = tuple(line for part in parts for line in _curves(*part, key))
    return LinePanel(title, x_axis, axis, curves) if curves else None


def _curves(place: int, name: str, lines: Sequence[Values], quantity: Quantity, x: str) -> list[Line]:
    """The mean over seeds where all of them were measured, behind it each seed."""
    style = _STYLES[place // len(RUNS_LIGHT) % len(_STYLES)]
    seeds = [curve for own in _by(lines, "seed").values() if (curve := _curve(own, x, quantity))]
    if len(seeds) < 2:
        return [Line(name, tuple(curve), tuple(curve.values()), place, style) for curve in seeds]
    common = sorted(set.intersection(*(set(curve) for curve in seeds)))
    drawn = [
        Line(name, tuple(curve), tuple(curve.values()), place, style, in_legend=not common, thin=True)
        for curve in seeds
    ]
    if common:
        over_seeds = [[curve[time] for curve in seeds] for time in common]
        means = tuple(_mean(values, quantity) for values in over_seeds)
        low, high = zip(*(_interval(values, quantity) for values in over_seeds), strict=True)
        drawn.append(Line(name, tuple(common), means, place, style, low=low, high=high))
    return drawn


def _curve(lines: Sequence[Values], x: str, quantity: Quantity) -> dict[float, float]:
    """One seed's time -> value; times that differ by rounding alone are one."""
    times: dict[float, list[Values]] = {}
    for line in lines:
        if is_number(time := line.get(x)):
            times.setdefault(float(f"{time:.9g}"), []).append(line)
    found = {time: _numbers(own, quantity) for time, own in sorted(times.items())}
    return {time: _mean(numbers, quantity) for time, numbers in found.items() if numbers}


def _points(
    place: int, name: str, lines: Sequence[Values], quantity: Quantity, x: Quantity, point: str
) -> Line | None:
    """A point a value of that key, at its means over seeds."""
    found = []
    for value, own in _by(lines, point).items():
        both = [line for line in own if _numbers([line], x) and _numbers([line], quantity)]
        xs, ys = (
            [_mean(_numbers(of_seed, axis), axis) for of_seed in _by(both, "seed").values()]
            for axis in (x, quantity)
        )
        if ys:
            low, high = _interval(ys, quantity) if len(ys) > 1 else (ys[0], ys[0])
            found.append((_mean(xs, x), _mean(ys, quantity), low, high, _text(value)))
    if not found:
        return None
    at, heights, low_ends, high_ends, labels = zip(*found, strict=True)
    return Line(name, at, heights, place, low=low_ends, high=high_ends, labels=labels)


def _frontier(points: Iterable[Line]) -> list[Note]:
    """Of all points those that no other one of at most their x lies above, in the order of x."""
    best: list[Note] = []
    named = (Note(*one) for line in points for one in zip(line.x, line.y, line.labels, strict=True))
    for note in sorted(named, key=lambda note: (note.x, -note.y)):
        if not best or note.y > best[-1].y:
            best.append(note)
    return best


def _steps(best: Sequence[Note]) -> Line:
    """What is to be had at each x."""
    corners = [(left.y, right.x) for left, right in pairwise(best)]
    x = [best[0].x, *(x for _, right in corners for x in (right, right))]
    y = [y for left, _ in corners for y in (left, left)] + [best[-1].y]
    return Line("frontier", x, y, None, "dash")


def _dots(
    place: int, name: str, lines: Sequence[Values], quantity: Quantity, x: str, rows: Sequence[Any]
) -> list[Dots]:
    """A mean over seeds, with each seed, in every category."""
    drawn = []
    for category, own in _by(lines, x).items():
        found = {str(seed): _numbers(of_seed, quantity) for seed, of_seed in _by(own, "seed").items()}
        seeds = {seed: _mean(numbers, quantity) for seed, numbers in found.items() if numbers}
        values = list(seeds.values())
        if values:
            interval = _interval(values, quantity) if len(values) > 1 else None
            row = rows.index(category)
            drawn.append(Dots(name, row, place, seeds, _mean(values, quantity), interval))
    return drawn


def _rows(lines: Sequence[Values], x: str, quantities: Sequence[Quantity]) -> list[Any]:
    """Categories of a view, the same in all its panels so that they can be read across."""
    measured = [line for line in lines if any(_numbers([line], quantity) for quantity in quantities)]
    return list(_by(measured, x))


def _places(lines: Sequence[Values], kept: Sequence[Values], key: str) -> dict[Any, int]:
    """A colour a value, as in other figures; where two that are drawn would share one, by themselves."""
    places = {value: place % len(RUNS_LIGHT) for place, value in enumerate(_by(lines, key))}
    drawn = _by(kept, key)
    if len({places[value] for value in drawn}) == len(drawn):
        return places
    return {value: place for place, value in enumerate(drawn)}


# --- lines of values -------------------------------------------------------------------------------------


def _split(
    lines: Sequence[Values], key: str, quantities: tuple[Quantity, ...]
) -> list[tuple[str, Sequence[Values], tuple[Quantity, ...]]]:
    """(name, lines, quantities) of each part that a key, or the quantities, make."""
    if key == QUANTITY:
        return [(str(quantity), lines, (quantity,)) for quantity in quantities]
    if not key:
        return [("", lines, quantities)]
    return [(_text(value), own, quantities) for value, own in _by(lines, key).items()]


def _meets(line: Values, key: str, asked: Any) -> bool:
    """Whether the line has the value, or one of the values, there."""
    return line.get(key) in asked if isinstance(asked, (tuple, list)) else line.get(key) == asked


def _by(lines: Sequence[Values], key: str) -> dict[Any, list[Values]]:
    """Lines by a key's value: numbers ascending, else in the order that they were measured."""
    groups: dict[Any, list[Values]] = {}
    for line in lines:
        if isinstance(value := line.get(key), (str, int, float)):
            groups.setdefault(value, []).append(line)
    return dict(sorted(groups.items())) if all(is_number(value) for value in groups) else groups


def _numbers(lines: Sequence[Values], quantity: Quantity) -> list[float]:
    """The numbers that the quantity's scale can show."""
    found = (line.get(quantity.key) for line in lines)
    return [float(y) for y in found if is_number(y) and (y > 0 or not quantity.log)]


def _mean(values: Sequence[float], quantity: Quantity) -> float:
    return math.exp(fmean(map(math.log, values))) if quantity.log else fmean(values)


def _interval(values: Sequence[float], quantity: Quantity) -> tuple[float, float]:
    low, high = mean_interval([math.log(value) for value in values] if quantity.log else values)
    return (math.exp(low), math.exp(high)) if quantity.log else (low, high)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else clean_text(str(value))


def _plain(key: str) -> str:
    return clean_text(key.replace("_", " ")) if key else ""
