"""Figures for a paper: SVG and PDF by matplotlib, the same bytes each time.

A panel alone takes a column's width (3.25 in), more take the page's (6.75 in). Text stays text: fonts are
embedded in the PDF as TrueType and referred to in the SVG. A row a view, a column a panel.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tangentlab.files import write_atomic
from tangentlab.report.figure import (
    Axis,
    DotPanel,
    Figure,
    ForestPanel,
    Line,
    LinePanel,
    MatrixPanel,
    Panel,
    dot_limits,
    dot_names,
    dot_rows,
    legend,
    log_ticks,
    note_rows,
    stages_in,
    value_limits,
    x_limits,
    y_limits,
)
from tangentlab.report.palette import LIGHT, SEQUENTIAL, run_colour

_COLUMN, _PAGE = 3.25, 6.75
_MOST_COLUMNS, _MOST_ROWS = 4, 5
_LEFT, _BOTTOM, _MARK_ROW, _GAP, _CHARACTER = 0.44, 0.36, 0.1, 0.12, 0.05  # inches
_DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (4, 1.6)),
    "dot": (0, (1, 1.2)),
    "dashdot": (0, (4, 1.4, 1, 1.4)),
}
_STEPS = [1, 2, 5, 10]
_MAP = LinearSegmentedColormap.from_list("sequential", SEQUENTIAL)

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 6.5,
    "axes.titlesize": 6.5,
    "axes.titley": 1.0,  # else its place is searched for, at a third of the time
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
    room = max(map(_label_room, figure.panels))
    columns = min(3 if room else _MOST_COLUMNS, max(len(view.panels) for view in figure.views))
    rows = _rows(figure, columns)
    several = rows[0][0] != rows[-1][0]
    left = _GAP if room else _LEFT + (0.1 if several else 0)
    matrices = [panel for panel in figure.panels if isinstance(panel, MatrixPanel)]
    handles = _legend_handles(figure)
    # All in inches, set by hand: matplotlib's own layout engines give up where a panel is small.
    right = 0.52 if matrices else max(map(_text_room, figure.panels))
    width = _COLUMN if columns == 1 and room + right < 2 * _COLUMN / 3 else _PAGE
    panel_width = (width - right - room) / columns - left
    panel_height = (
        min(panel_width, 1.5) if matrices else max(_height(figure, panel) for panel in figure.panels)
    )
    top = 0.2 + _MARK_ROW * max(_mark_rows(figure, panel) for panel in figure.panels)
    row_height = top + panel_height + _BOTTOM
    legend_rows = math.ceil(len(handles) / _legend_columns(width))
    height = len(rows) * row_height + 0.14 * legend_rows + 0.04

    canvas = Canvas(figsize=(width, height))
    for row, (view, panels) in enumerate(rows):
        for column, panel in enumerate(panels):
            start = room + column * (left + panel_width) + left
            bottom = height - row * row_height - top - panel_height
            box = (start / width, bottom / height, panel_width / width, panel_height / height)
            axes = canvas.add_axes(box)
            title = _title(panel, panel_width + room)
            if isinstance(panel, DotPanel) and several:
                title = f"{view}: {title}"
            axes.set_title(title, loc="left", pad=3 + 72 * (top - 0.2), parse_math=False)
            if isinstance(panel, ForestPanel):
                _draw_forest(axes, panel)
                continue
            axes.set_xlabel(panel.x_axis.label, labelpad=1.5, parse_math=False)
            if isinstance(panel, DotPanel):
                _draw_dots(axes, figure, panel, labelled=column == 0)
                continue
            if isinstance(panel, LinePanel):
                _draw_lines(axes, figure, panel)
            else:
                image = _draw_matrix(axes, figure, panel)
            before = panels[column - 1]
            if column == 0 or isinstance(before, ForestPanel) or panel.y_axis != before.y_axis:
                prefix = f"{view}\n" if several and view != panel.y_axis.label else ""
                axes.set_ylabel(prefix + panel.y_axis.label, labelpad=1.5, parse_math=False)
    if matrices:
        place = (1 - 0.42 / width, 1 - (top + panel_height) / height, 0.08 / width, panel_height / height)
        canvas.colorbar(image, cax=canvas.add_axes(place), label=matrices[0].value)
    if handles:
        # matplotlib hides entries that begin with "_", and a run's name may.
        labels = [f"\u200b{label}" if label.startswith("_") else label for label in map(_label, handles)]
        entries = canvas.legend(
            handles,
            labels,
            loc="lower center",
            ncols=min(len(handles), _legend_columns(width)),
            frameon=False,
            borderaxespad=0.1,
            borderpad=0.1,
            labelspacing=0.3,
            handlelength=2.2,
            columnspacing=1.6,
        )
        for text in entries.get_texts():
            text.set_parse_math(False)  # a "$" in a run's name is a dollar
    return canvas


def _rows(figure: Figure, columns: int) -> list[tuple[str, tuple[Panel, ...]]]:
    """(view, panels) of each row: all views, or as many as a page holds."""
    rows: list[tuple[str, tuple[Panel, ...]]] = []
    for view in figure.views:
        starts = range(0, len(view.panels), columns)
        if rows and len(rows) + len(starts) > _MOST_ROWS:
            break
        rows += [(view.label, view.panels[start : start + columns]) for start in starts]
    return rows


def _title(panel: Panel, width: float) -> str:
    """The panel's title, cut to ``width`` inches, with the moment that a film is shown at."""
    moment = ""
    if isinstance(panel, MatrixPanel) and panel.moments:
        moment = f", {panel.unit} {panel.moments[panel.frame_at[-1]]:.3g}"
    room = int(72 * width / (0.6 * _STYLE["axes.titlesize"])) - len(moment)
    title = panel.title if len(panel.title) <= room else f"{panel.title[: max(room - 1, 1)]}…"
    return title + moment


def _draw_lines(axes: Axes, figure: Figure, panel: LinePanel) -> None:
    for span in panel.spans:
        axes.axvspan(span.start, span.end, color=LIGHT[span.label], alpha=0.25, linewidth=0)
    for line in panel.lines:
        colour = run_colour(line.colour)
        if line.labels:
            _draw_points(axes, line, named=not panel.notes)
            continue
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(
            line.x,
            line.y,
            color=colour,
            linestyle=_DASHES[line.style],
            linewidth=0.5 if line.thin else None,
            marker="o" if len(line.x) == 1 else None,
            markersize=1.5 if line.thin else 2.5,
            alpha=0.4 if line.thin else line.opacity,
        )
    if panel.x_axis.log:
        axes.set_xscale("log")
    axes.set_xlim(x_limits(figure, panel))
    _set_scale(axes, panel.y_axis, y_limits(figure, panel))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if not panel.x_axis.log:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    for note, row, anchor in note_rows(figure, panel):
        top = y_limits(figure, panel)[1]
        axes.vlines(note.x, note.y, top, LIGHT["muted"], linewidth=0.4, linestyle=_DASHES["dot"])
        _write_above(axes, note.text, note.x, row, anchor, LIGHT["ink"])
    low, high = axes.get_xlim()
    row = 0
    for mark in sorted(panel.marks, key=lambda mark: mark.x):
        axes.axvline(mark.x, color=run_colour(mark.colour), linestyle=(0, (1, 1.5)), linewidth=0.9)
        if mark.label:
            place = (mark.x - low) / (high - low)
            side = "left" if place < 0.3 else "right" if place > 0.7 else "center"
            _write_above(axes, mark.label, mark.x, row, side, run_colour(mark.colour))
            row += 1


def _write_above(axes: Axes, text: str, x: float, row: int, anchor: str, colour: str) -> None:
    axes.annotate(
        text,
        (x, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 1.5 + 72 * _MARK_ROW * row),
        textcoords="offset points",
        ha=anchor,
        fontsize=5.5,
        color=colour,
        parse_math=False,
    )


def _draw_points(axes: Axes, line: Line, *, named: bool) -> None:
    colour = run_colour(line.colour)
    axes.plot(line.x, line.y, color=colour, linestyle="none", marker="D", markersize=2.6)
    if line.low:
        axes.vlines(line.x, line.low, line.high, color=colour, linewidth=0.6)
    for x, y, label in zip(line.x, line.y, line.labels, strict=True) if named else ():
        axes.annotate(
            label,
            (x, y),
            xytext=(2.5, 1),
            textcoords="offset points",
            fontsize=4,
            color=LIGHT["muted"],
            parse_math=False,
        )


def _mark_rows(figure: Figure, panel: Panel) -> int:
    if not isinstance(panel, LinePanel):
        return 0
    marks = sum(bool(mark.label) for mark in panel.marks)
    return max(marks, *(row + 1 for _, row, _ in note_rows(figure, panel)), 0)


def _draw_dots(axes: Axes, figure: Figure, panel: DotPanel, *, labelled: bool) -> None:
    limits = dot_limits(figure, panel)
    if panel.x_axis.log:
        axes.set_xscale("log")
        if ticks := log_ticks(*limits):
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
    if panel.x_axis.percent:
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
    axes.set_xlim(limits)
    for dots, *rows in dot_rows(figure, panel):
        seeds = list(dots.values.values())
        _draw_seeds(axes, rows, seeds, dots.mean, dots.interval, run_colour(dots.colour))
    _set_rows(axes, panel.categories if labelled else [""] * len(panel.categories))
    axes.hlines(
        [row + 0.5 for row in range(len(panel.categories) - 1)], *limits, LIGHT["line"], linewidth=0.4
    )
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _draw_forest(axes: Axes, panel: ForestPanel) -> None:
    for i, row in enumerate(panel.rows):
        axes.barh(i, 1 if row.above else -1, height=0.9, color=LIGHT["line"], alpha=0.6, linewidth=0)
        ends = row.interval and (row.place(row.interval[0]), row.place(row.interval[1]))
        seeds = [row.place(value) for value in row.values.values()]
        _draw_seeds(axes, (i - 0.14, i + 0.18), seeds, row.place(row.mean), ends, run_colour(0))
        axes.annotate(
            row.text,
            (1, i),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
            parse_math=False,
        )
    axes.axvline(0, color=LIGHT["muted"], linewidth=0.8, zorder=1)
    axes.set_xlim(-1, 1)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    _set_rows(axes, [row.label for row in panel.rows])


def _draw_seeds(
    axes: Axes,
    rows: Sequence[float],
    seeds: Sequence[float],
    mean: float,
    interval: tuple[float, float] | None,
    colour: str,
) -> None:
    """The mean with its interval, and a circle a seed."""
    if interval:
        axes.hlines(rows[0], *interval, colour, linewidth=1.2)
    axes.plot(seeds, [rows[1]] * len(seeds), "o", markersize=2.2, mfc="none", mec=colour, mew=0.5, alpha=0.8)
    axes.plot(mean, rows[0], "D", markersize=2.6, color=colour, linewidth=0)


def _set_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.tick_params(axis="y", length=0)


def _height(figure: Figure, panel: Panel) -> float:
    if isinstance(panel, ForestPanel):
        return 0.17 * len(panel.rows)
    if isinstance(panel, DotPanel):
        return len(panel.categories) * (0.08 + 0.08 * max(map(len, dot_names(figure).values())))
    return 1.25


def _label_room(panel: Panel) -> float:
    """For the names of rows, left of the first panel."""
    if isinstance(panel, LinePanel | MatrixPanel):
        return 0.0
    labels = panel.categories if isinstance(panel, DotPanel) else [row.label for row in panel.rows]
    return _CHARACTER * max(map(len, labels))


def _text_room(panel: Panel) -> float:
    """For the numbers of a forest, right of it."""
    if isinstance(panel, ForestPanel):
        return _CHARACTER * max(len(row.text) for row in panel.rows)
    return 0.08


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
    axes.set_aspect("equal", anchor="NW")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=panel.row_zero_on_top))
    if panel.row_zero_on_top:
        axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return image


def _set_scale(axes: Axes, axis: Axis, limits: tuple[float, float]) -> None:
    if axis.log:
        axes.set_yscale("log")
        ticks = log_ticks(*limits)
        if ticks:
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_yticks([], minor=True)
    axes.set_ylim(limits)
    if axis.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _legend_columns(width: float) -> int:
    return 2 if width < _PAGE else 6


def _legend_handles(figure: Figure) -> list[Any]:
    lines = [
        Line2D(
            [],
            [],
            color=LIGHT["ink"] if key.colour is None else run_colour(key.colour),
            linestyle="none" if key.style == "dots" else _DASHES[key.style],
            marker="D" if key.style == "dots" else None,
            markersize=2.6,
            label=key.name,
        )
        for key in legend(figure)
    ]
    stages = [Patch(color=LIGHT[stage], alpha=0.25, linewidth=0, label=stage) for stage in stages_in(figure)]
    return [*lines, *stages]


def _label(handle: Any) -> str:
    return str(handle.get_label())
