"""Figures for the page: plotly traces and layouts, in the colours of the light page.

The page turns each colour into its dark counterpart (``palette.light_to_dark``), so a specification is sent
once. Titles, legends, selectors, sliders and colour bars are the page's own HTML: they wrap on a phone and
can be reached by keyboard.
"""

from __future__ import annotations

import html
import math
from typing import Any

from tangentlab.report.figure import (
    Axis,
    Figure,
    LinePanel,
    MatrixPanel,
    Panel,
    Span,
    log_ticks,
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


def specifications(figure: Figure) -> list[list[Spec]]:
    """For each view, for each panel: {"data", "layout"} and, where a slider moves it, "frames"
    and which one is shown where."""
    return [[_panel(figure, panel) for panel in view.panels] for view in figure.views]


def _panel(figure: Figure, panel: Panel) -> Spec:
    return _lines(figure, panel) if isinstance(panel, LinePanel) else _matrix(figure, panel)


# --- lines -----------------------------------------------------------------------------------------------


def _lines(figure: Figure, panel: LinePanel) -> Spec:
    low, high = x_limits(figure, panel)
    y_range = list(y_limits(figure, panel))
    labelled = [span for span in panel.spans if span.end - span.start >= _ROOM_FOR_LABEL * (high - low)]
    rows = max(_label_rows(p) for p in figure.panels if isinstance(p, LinePanel))
    layout = _layout(panel.x_axis, panel.y_axis, top=8 + _ROW * rows)
    layout["xaxis"]["range"] = [low, high]
    if panel.y_axis.log:
        ticks = log_ticks(*y_range)
        # plotly draws powers larger than other labels.
        powers = {"dtick": 1, "exponentformat": "power", "tickfont": {"size": 10}}
        layout["yaxis"] |= (
            {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]} if ticks else powers
        )
        y_range = [math.log10(y) for y in y_range]
    layout["yaxis"]["range"] = y_range
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
    form = ".1%" if panel.y_axis.percent else ".3~g"
    data = [
        {
            "type": "scatter",
            "mode": "lines" if len(line.x) > 1 else "markers",
            "name": html.escape(line.name),
            "x": [_rounded(x) for x in line.x],
            "y": [_rounded(y) for y in line.y],
            "opacity": round(line.opacity, 2),
            "line": {"color": run_colour(line.colour), "width": 2, "dash": line.style},
            "marker": {"color": run_colour(line.colour), "size": 7},
            "hovertemplate": f"%{{y:{form}}}",
        }
        for line in panel.lines
    ]
    return {"data": data, "layout": layout, "time": panel.x_axis.label}


def _label_rows(panel: LinePanel) -> int:
    return bool(panel.spans) + sum(bool(mark.label) for mark in panel.marks)


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


def _rounded(value: float) -> float | None:
    """Four significant digits: what a screen can show, at half the bytes. JSON knows no NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
