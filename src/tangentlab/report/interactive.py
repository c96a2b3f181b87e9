"""Figures for the page: plotly traces and layouts, in the colours of the light page.

The page turns each colour into its dark counterpart (``palette.light_to_dark``), so a specification is sent
once. Titles, legends, selectors, sliders and colour bars are the page's own HTML: they wrap on a phone and
can be reached by keyboard.
"""

from __future__ import annotations

import html
import math
import textwrap
from typing import Any

from tangentlab.report.figure import (
    Axis,
    DotPanel,
    Dots,
    Figure,
    ForestPanel,
    Line,
    LinePanel,
    MatrixPanel,
    Note,
    Panel,
    Span,
    dot_limits,
    dot_names,
    dot_rows,
    log_ticks,
    note_rows,
    value_limits,
    x_limits,
    y_limits,
)
from tangentlab.report.palette import LIGHT, SEQUENTIAL, run_colour

Spec = dict[str, Any]

_FONT = '"Helvetica Neue", "Segoe UI", "Liberation Sans", Arial, sans-serif'
# A stage narrower than this part of the axis has no room for its name.
_ROOM_FOR_LABEL = 0.16
_ROW = 15  # pixels that a row of labels above the plot takes
_NAME = 32  # letters of an axis's name that a narrow panel has room for
_POWERS = 7  # of ten that it has room for


def specifications(figure: Figure) -> list[list[Spec]]:
    """For each view, for each panel: {"data", "layout"} and, where a slider moves it, "frames"
    and which one is shown where."""
    return [[_panel(figure, panel) for panel in view.panels] for view in figure.views]


def dots_height(figure: Figure) -> int:
    """Pixels that a figure's rows of dots need."""
    rows = max((len(panel.categories) for panel in figure.panels if isinstance(panel, DotPanel)), default=0)
    return 70 + rows * (14 + 14 * max(map(len, dot_names(figure).values()), default=0))


def _panel(figure: Figure, panel: Panel) -> Spec:
    if isinstance(panel, LinePanel):
        return _lines(figure, panel)
    if isinstance(panel, DotPanel):
        return _dots(figure, panel)
    if isinstance(panel, ForestPanel):
        raise TypeError("the page draws claims in their table")
    return _matrix(figure, panel)


# --- lines -----------------------------------------------------------------------------------------------


def _lines(figure: Figure, panel: LinePanel) -> Spec:
    low, high = x_limits(figure, panel)
    labelled = [span for span in panel.spans if span.end - span.start >= _ROOM_FOR_LABEL * (high - low)]
    rows = max(_label_rows(figure, p) for p in figure.panels if isinstance(p, LinePanel))
    layout = _layout(panel.x_axis, panel.y_axis, top=8 + _ROW * rows)
    layout["xaxis"] |= _range(panel.x_axis, low, high)
    layout["yaxis"] |= _range(panel.y_axis, *y_limits(figure, panel))
    if any(line.labels for line in panel.lines):
        layout["hovermode"] = "closest"
    else:
        layout["hovermode"] = "x unified"
        layout["xaxis"] |= {"showspikes": False, "unifiedhovertitle": {"text": f"{panel.x_axis.unit} %{{x}}"}}
    layout["shapes"] = [_shaded(span) for span in panel.spans] + [
        {
            "type": "line", "xref": "x", "yref": "paper", "x0": mark.x, "x1": mark.x, "y0": 0, "y1": 1,
            "line": {"color": run_colour(mark.colour), "width": 1.5, "dash": "dot"},
        }
        for mark in panel.marks
    ]  # fmt: skip
    layout["annotations"] = [
        _label(span.label, (span.start + span.end) / 2, 0, LIGHT["muted"], "center") for span in labelled
    ]
    row = int(bool(labelled))
    for mark in sorted(panel.marks, key=lambda mark: mark.x):
        if mark.label:
            place = (mark.x - low) / (high - low)
            anchor = "left" if place < 0.25 else "right" if place > 0.75 else "center"
            layout["annotations"].append(_label(mark.label, mark.x, row, run_colour(mark.colour), anchor))
            row += 1
    for note, row, anchor in note_rows(figure, panel):
        x = math.log10(note.x) if panel.x_axis.log else note.x
        layout["annotations"].append(_label(note.text, x, row, LIGHT["ink"], anchor))
        layout["shapes"].append(_leader(note, y_limits(figure, panel)[1]))
    form = ".1%" if panel.y_axis.percent else ".3~g"
    data = [_band(line) for line in panel.lines if line.low and not line.labels] + [
        _points(line, panel.x_axis, form)
        if line.labels
        else {
            "type": "scatter",
            "mode": "lines" if len(line.x) > 1 else "markers",
            "name": html.escape(line.name),
            "x": [_rounded(x) for x in line.x],
            "y": [_rounded(y) for y in line.y],
            "opacity": 0.4 if line.thin else round(line.opacity, 2),
            "line": {"color": run_colour(line.colour), "width": 1 if line.thin else 2, "dash": line.style},
            "marker": {"color": run_colour(line.colour), "size": 4 if line.thin else 7},
            # A line that is no run's, such as a frontier, says nothing that its points do not.
            **(
                {"hoverinfo": "skip"}
                if line.thin or line.colour is None
                else {"hovertemplate": f"%{{y:{form}}}"}
            ),
        }
        for line in panel.lines
    ]
    return {"data": data, "layout": layout, "time": panel.x_axis.label}


def _points(line: Line, x_axis: Axis, form: str) -> Spec:
    """Points with their names, and their intervals upright."""
    colour = run_colour(line.colour)
    ends = zip(line.y, line.low or line.y, line.high or line.y, strict=True)
    above, below = zip(*((high - y, y - low) for y, low, high in ends), strict=True)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": html.escape(line.name),
        "x": [_rounded(x) for x in line.x],
        "y": [_rounded(y) for y in line.y],
        "text": [html.escape(label) for label in line.labels],
        "marker": {"color": colour, "size": 8, "symbol": "diamond"},
        "error_y": {
            "type": "data", "symmetric": False, "array": [_rounded(y) for y in above],
            "arrayminus": [_rounded(y) for y in below], "color": colour, "thickness": 1, "width": 0,
        },
        "hovertemplate": f"%{{text}}<br>%{{y:{form}}}, {html.escape(x_axis.unit)} %{{x:.3~g}}<extra></extra>",
    }  # fmt: skip


def _band(line: Line) -> Spec:
    """The interval around a line, as one shape."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": html.escape(line.name),
        "x": [_rounded(x) for x in (*line.x, *reversed(line.x))],
        "y": [_rounded(y) for y in (*line.high, *reversed(line.low))],
        "fill": "toself",
        "fillcolor": run_colour(line.colour),
        "line": {"color": run_colour(line.colour), "width": 0},
        "opacity": 0.14,
        "hoverinfo": "skip",
    }


def _label_rows(figure: Figure, panel: LinePanel) -> int:
    marks = bool(panel.spans) + sum(bool(mark.label) for mark in panel.marks)
    return max(marks, *(row + 1 for _, row, _ in note_rows(figure, panel)), 0)


def _shaded(span: Span) -> Spec:
    return {
        "type": "rect", "xref": "x", "yref": "paper", "x0": span.start, "x1": span.end, "y0": 0, "y1": 1,
        "fillcolor": LIGHT[span.label], "opacity": 0.28, "layer": "below", "line": {"width": 0},
    }  # fmt: skip


def _label(text: str, x: float, row: int, colour: str, anchor: str) -> Spec:
    return {
        "text": html.escape(text), "x": x, "xref": "x", "y": 1, "yref": "paper", "xanchor": anchor,
        "yanchor": "bottom", "yshift": _ROW * row, "showarrow": False, "font": {"size": 11, "color": colour},
    }  # fmt: skip


def _leader(note: Note, top: float) -> Spec:
    """From a point up to its name."""
    return {
        "type": "line", "xref": "x", "yref": "y", "x0": note.x, "x1": note.x, "y0": note.y, "y1": top,
        "line": {"color": LIGHT["muted"], "width": 1, "dash": "dot"}, "layer": "below",
    }  # fmt: skip


# --- dots ------------------------------------------------------------------------------------------------


def _dots(figure: Figure, panel: DotPanel) -> Spec:
    layout = _layout(panel.x_axis, panel.y_axis, top=8)
    layout["xaxis"] |= _range(panel.x_axis, *dot_limits(figure, panel))
    # A narrow panel has no room for a long name, and plotly cuts it off.
    layout["xaxis"]["title"]["text"] = "<br>".join(textwrap.wrap(panel.x_axis.label, _NAME))
    layout["xaxis"]["automargin"] = True
    layout["xaxis"] |= {"tickangle": 0, "nticks": 5 if _narrow(figure) else 6}
    if panel.x_axis.percent:
        layout["xaxis"]["tickformat"] = ".3~%"
    rows = len(panel.categories)
    layout["yaxis"] |= {
        "range": [rows - 0.5, -0.5],
        "tickvals": list(range(rows)),
        "ticktext": [html.escape(category) for category in panel.categories],
        "automargin": True,
        "showgrid": False,
        "ticks": "",
    }
    layout["hovermode"] = "closest"
    layout["shapes"] = [
        {
            "type": "line", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": row + 0.5, "y1": row + 0.5,
            "line": {"color": LIGHT["line"], "width": 1},
        }
        for row in range(rows - 1)
    ]  # fmt: skip
    form = "%{x:.1%}" if panel.x_axis.percent else "%{x:.3~g}"
    data: list[Spec] = []
    placed = dot_rows(figure, panel)
    for name in dict.fromkeys(dots.name for dots in panel.dots):
        own = [(dots, row, below) for dots, row, below in placed if dots.name == name]
        colour = run_colour(own[0][0].colour)
        seeds = [(d, below, seed, value) for d, _, below in own for seed, value in d.values.items()]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": html.escape(name),
                "x": [_rounded(value) for *_, value in seeds],
                "y": [_rounded(row) for _, row, *_ in seeds],
                "text": [_hover(panel, dots, f"seed {seed}") for dots, _, seed, _ in seeds],
                "marker": {"symbol": "circle-open", "size": 6, "color": colour},
                "opacity": 0.7,
                "hovertemplate": f"%{{text}}<br>{form}<extra></extra>",
            }
        )
        ends = [(dots.mean, *(dots.interval or (dots.mean, dots.mean))) for dots, *_ in own]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": html.escape(name),
                "x": [_rounded(dots.mean) for dots, *_ in own],
                "y": [_rounded(row) for _, row, _ in own],
                "text": [_hover(panel, dots, "mean") for dots, *_ in own],
                "marker": {"symbol": "diamond", "size": 8, "color": colour},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [_rounded(high - mean) for mean, _, high in ends],
                    "arrayminus": [_rounded(mean - low) for mean, low, _ in ends],
                    "color": colour,
                    "thickness": 2,
                    "width": 0,
                },
                "hovertemplate": f"%{{text}}<br>{form}<extra></extra>",
            }
        )
    return {"data": data, "layout": layout}


def _narrow(figure: Figure) -> bool:
    """Whether more than two panels stand beside each other."""
    return max(len(view.panels) for view in figure.views) > 2


def _hover(panel: DotPanel, dots: Dots, what: str) -> str:
    return html.escape(f"{dots.name}, {panel.categories[dots.category]}, {what}")


# --- matrices --------------------------------------------------------------------------------------------


def _matrix(figure: Figure, panel: MatrixPanel) -> Spec:
    low, high = value_limits(figure)
    layout = _layout(panel.x_axis, panel.y_axis, top=6)
    for name in ("xaxis", "yaxis"):
        layout[name] |= {"showgrid": False, "constrain": "domain", "ticks": ""}
    layout["yaxis"] |= {"scaleanchor": "x"}
    if panel.row_zero_on_top:
        layout["yaxis"]["autorange"] = "reversed"
        if len(panel.x) <= 12:
            layout["xaxis"]["dtick"] = layout["yaxis"]["dtick"] = 1
    frames = [[[_rounded(value) for value in row] for row in frame] for frame in panel.frames]
    x_name, y_name = panel.x_axis.label, panel.y_axis.label
    trace = {
        "type": "heatmap",
        "x": [_rounded(x) for x in panel.x],
        "y": [_rounded(y) for y in panel.y],
        "z": frames[panel.frame_at[-1]],
        "zmin": _rounded(low),
        "zmax": _rounded(high),
        "colorscale": [[i / (len(SEQUENTIAL) - 1), colour] for i, colour in enumerate(SEQUENTIAL)],
        "showscale": False,
        "hovertemplate": f"{x_name} %{{x}}<br>{y_name} %{{y}}<br>{panel.value} %{{z:.3g}}<extra></extra>",
    }
    spec: Spec = {"data": [trace], "layout": layout}
    if len(frames) > 1:
        spec |= {"frames": frames, "frameAt": panel.frame_at, "unit": panel.unit}
        spec["moments"] = [_rounded(t) for t in panel.moments]
    return spec


# --- both ------------------------------------------------------------------------------------------------


def _layout(x_axis: Axis, y_axis: Axis, *, top: int) -> Spec:
    return {
        "template": {},
        "autosize": True,
        "showlegend": False,
        "margin": {"l": 58, "r": 12, "t": top, "b": 42},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": _FONT, "size": 12, "color": LIGHT["muted"]},
        "hoverlabel": {"font": {"family": _FONT, "size": 12}},
        "xaxis": _axis(x_axis),
        "yaxis": _axis(y_axis),
    }


def _axis(axis: Axis) -> Spec:
    spec: Spec = {
        "title": {"text": axis.label, "standoff": 6, "font": {"size": 12, "color": LIGHT["muted"]}},
        "gridcolor": LIGHT["line"],
        "linecolor": LIGHT["line"],
        "zeroline": False,
        "showline": True,
        "nticks": 6,
    }
    if axis.log:
        spec |= {"type": "log"}
    if axis.percent:
        spec |= {"tickformat": ".0%"}
    return spec


def _range(axis: Axis, low: float, high: float) -> Spec:
    """The axis's limits, and ticks that a narrow panel has room for where it is logarithmic."""
    if not axis.log:
        return {"range": [low, high]}
    spec: Spec = {"range": [math.log10(low), math.log10(high)]}
    if ticks := log_ticks(low, high):
        return spec | {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    # plotly draws powers larger than other labels.
    every = math.ceil(math.log10(high / low) / _POWERS)
    return spec | {"dtick": every, "exponentformat": "power", "tickfont": {"size": 10}}


def _rounded(value: float) -> float | None:
    """Four significant digits: what a screen can show, at half the bytes. JSON knows no NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
