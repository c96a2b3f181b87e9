"""Figures for a paper: SVG and PDF by matplotlib, the same bytes each time.

A panel alone takes a column's width (3.25 in), more take the page's (6.75 in). Text stays text: fonts are
embedded in the PDF as TrueType and referred to in the SVG. A row a view, a column a panel.
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tangentlab.records import write_atomic
from tangentlab.report.figure import (
    Axis,
    Figure,
    LinePanel,
    MatrixPanel,
    Panel,
    legend,
    stages_in,
    value_limits,
    x_limits,
    y_limits,
)
from tangentlab.report.palette import LIGHT, SEQUENTIAL, run_colour

_COLUMN, _PAGE = 3.25, 6.75
_MOST_COLUMNS = 4
_DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (4, 1.6)),
    "dot": (0, (1, 1.2)),
    "dashdot": (0, (4, 1.4, 1, 1.4)),
}
_MAP = LinearSegmentedColormap.from_list("sequential", SEQUENTIAL)

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 6.5,
    "axes.titlesize": 6.5,
    "axes.labelsize": 6.5,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "axes.linewidth": 0.5,
    "axes.edgecolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "ytick.minor.width": 0.3,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "ytick.minor.size": 1.2,
    "lines.linewidth": 1.0,
    "grid.linewidth": 0.4,
    "grid.color": LIGHT["line"],
    "text.parse_math": False,  # a "$" in a run's name is a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "tangentlab",
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}


def write_paper_figure(figure: Figure, folder: Path) -> None:
    """Write ``folder``/KEY.svg and KEY.pdf; a figure without data has neither."""
    # "default" first: a reader's own matplotlibrc shall not show.
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # A run may be named in a script that the font lacks: the SVG's reader has one, the PDF shows boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        canvas = _draw(figure)
        for suffix, metadata in (("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=suffix, metadata=metadata)
            write_atomic(folder / f"{figure.key}.{suffix}", buffer.getvalue())


def _draw(figure: Figure) -> Canvas:
    columns = min(_MOST_COLUMNS, max(len(view.panels) for view in figure.views))
    heights = [math.ceil(len(view.panels) / columns) for view in figure.views]
    width = _COLUMN if columns == 1 else _PAGE
    height = sum(heights) * max(1.35, min(1.9, width / columns + 0.15)) + 0.35
    canvas = Canvas(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04))
    grid = canvas.add_gridspec(sum(heights), columns)
    row, matrices = 0, []
    for view, rows in zip(figure.views, heights, strict=True):
        for place, panel in enumerate(view.panels):
            axes = canvas.add_subplot(grid[row + place // columns, place % columns])
            axes.set_title(_title(figure, view.label, panel), loc="left", pad=3 + _mark_rows(panel) * 6.5)
            if isinstance(panel, LinePanel):
                _draw_lines(axes, figure, panel)
            else:
                matrices.append((axes, _draw_matrix(axes, figure, panel), panel))
            first = place % columns == 0 or panel.y_axis != view.panels[place - 1].y_axis
            axes.set_ylabel(panel.y_axis.label if first else "")
        row += rows
    if matrices:
        axes, image, panel = matrices[-1]
        canvas.colorbar(
            image, ax=[axes for axes, _, _ in matrices], label=panel.value, aspect=40, fraction=0.03
        )
    _add_legend(canvas, figure)
    return canvas


def _title(figure: Figure, view: str, panel: Panel) -> str:
    moment = ""
    if isinstance(panel, MatrixPanel) and panel.moments:
        moment = f"{panel.unit} {panel.moments[panel.frame_at[-1]]:.3g}"
    return ", ".join(filter(None, (panel.title, view if len(figure.views) > 1 else "", moment)))


def _draw_lines(axes: Axes, figure: Figure, panel: LinePanel) -> None:
    for span in panel.spans:
        axes.axvspan(span.start, span.end, color=LIGHT[span.label], alpha=0.25, linewidth=0)
    for line in panel.lines:
        axes.plot(
            line.x,
            line.y,
            color=run_colour(line.colour),
            linestyle=_DASHES[line.style],
            marker="o" if len(line.x) == 1 else None,
            markersize=2.5,
            alpha=line.opacity,
        )
    _set_scale(axes, panel.y_axis)
    axes.set_xlim(x_limits(figure, panel))
    axes.set_ylim(y_limits(figure, panel))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel(panel.x_axis.label)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    low, high = axes.get_xlim()
    row = 0
    for mark in sorted(panel.marks, key=lambda mark: mark.x):
        axes.axvline(mark.x, color=run_colour(mark.colour), linestyle=(0, (1, 1.5)), linewidth=0.9)
        if mark.label:
            place = (mark.x - low) / (high - low)
            axes.annotate(
                mark.label,
                (mark.x, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 1.5 + 6.5 * row),
                textcoords="offset points",
                ha="left" if place < 0.3 else "right" if place > 0.7 else "center",
                fontsize=5.5,
                color=run_colour(mark.colour),
            )
            row += 1


def _mark_rows(panel: Panel) -> int:
    return sum(bool(mark.label) for mark in panel.marks) if isinstance(panel, LinePanel) else 0


def _draw_matrix(axes: Axes, figure: Figure, panel: MatrixPanel) -> Any:
    low, high = value_limits(figure)
    image = axes.pcolormesh(
        panel.x,
        panel.y,
        panel.frames[panel.frame_at[-1]],
        shading="nearest",
        cmap=_MAP,
        vmin=low,
        vmax=high,
        rasterized=True,  # a hundred snapshots are ten thousand rectangles
    )
    axes.set_aspect("equal")
    axes.set_xlabel(panel.x_axis.label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=panel.row_zero_on_top))
    if panel.row_zero_on_top:
        axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return image


def _set_scale(axes: Axes, axis: Axis) -> None:
    if axis.log:
        axes.set_yscale("log")
    if axis.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _add_legend(canvas: Canvas, figure: Figure) -> None:
    handles: list[Any] = [
        Line2D(
            [],
            [],
            color=LIGHT["ink"] if key.colour is None else run_colour(key.colour),
            linestyle=_DASHES[key.style],
            label=key.name,
        )
        for key in legend(figure)
    ]
    handles += [
        Patch(color=LIGHT[stage], alpha=0.25, linewidth=0, label=stage) for stage in stages_in(figure)
    ]
    if handles:
        # matplotlib hides entries that begin with "_", and a run's name may.
        labels = [f"\u200b{label}" if label.startswith("_") else label for label in map(_label, handles)]
        canvas.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(len(handles), 2 if canvas.get_figwidth() < _PAGE else 6),
            frameon=False,
            handlelength=2.2,
            columnspacing=1.6,
        )


def _label(handle: Any) -> str:
    return str(handle.get_label())
