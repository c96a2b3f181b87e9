"""Which class kernel serves which class: the specialization matrix over time, and its scalar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tangentlab.report.figure import Axis, Figure, Line, LinePanel, Matrix, MatrixPanel, Slider, View, evenly
from tangentlab.report.figures._common import all_inputs, by_axis, conclude, time_axis
from tangentlab.report.palette import inputs_name
from tangentlab.report.subject import Subject

# Bounds the page: 60 frames of 10 × 10, or 6 of 100 × 100, a map.
_MOST_FRAMES, _MOST_CELLS = 60, 60_000


@dataclass(frozen=True)
class _Film:
    """The recorded matrices of one run on one kind of inputs."""

    run: Subject
    inputs: str
    times: tuple[float, ...]
    frames: tuple[Matrix, ...]


def specialization(runs: Sequence[Subject]) -> Figure:
    """A view a kind of inputs: a matrix a run, all at the slider's moment, and the scalar of all runs."""
    films = [
        film
        for run in runs
        for inputs in run.inputs_of("specialization_matrix")
        if (film := _film(run, inputs)) is not None
    ]
    slider = _slider(films)
    kinds = list(dict.fromkeys([film.inputs for film in films] + all_inputs(runs, "specialization")))
    shown = [film for film in films if film.inputs == kinds[0]]
    views = (
        View(
            inputs_name(inputs),
            (
                *(_matrix(film, slider) for film in films if film.inputs == inputs and slider),
                *_scalars(runs, inputs),
            ),
        )
        for inputs in kinds
    )
    return Figure(
        key="specialization",
        title="Kernel specialization",
        caption="Row: the class kernel; column: the class whose labels it is compared with (Shan & Bordelon "
        "2021). A column's mean is 1; ones everywhere mean that no class kernel has a class of its own. The "
        "scalar is the diagonal's mean: 1 without specialization, the number of classes when complete.",
        finding=conclude(
            "a bright diagonal, class kernels that each align with their own class",
            [(film.run, _sentence(film)) for film in shown],
            found=any(_on_diagonal(film.frames[-1]) > len(film.frames[-1]) / 2 for film in shown),
            missing="no run recorded a specialization matrix",
        ),
        views=tuple(view for view in views if view.panels),
        selector="inputs",
        slider=slider,
    )


def _film(run: Subject, inputs: str) -> _Film | None:
    series = run.series(run.kernel_name(inputs, "specialization_matrix"))
    kept = [(t, frame) for t, value in series if (frame := _square(value)) is not None]
    kept = [(t, frame) for t, frame in kept if len(frame) == len(kept[-1][1])]
    if not kept:
        return None
    cells = len(kept[0][1]) ** 2
    kept = [kept[i] for i in evenly(len(kept), max(2, min(_MOST_FRAMES, _MOST_CELLS // cells)))]
    return _Film(run, inputs, tuple(t for t, _ in kept), tuple(frame for _, frame in kept))


def _square(value: object) -> Matrix | None:
    """A [C, C] nested list as a matrix; anything else that a foreign log may hold is None."""
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return None
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        return None
    return tuple(tuple(row) for row in array.tolist())


def _slider(films: Sequence[_Film]) -> Slider | None:
    """All moments of all films; runs over epochs beside runs over steps go by the snapshot's number."""
    axes = {film.run.axis for film in films}
    if not axes:
        return None
    if len(axes) == 1:
        moments = sorted({t for film in films for t in film.times})
        kept = evenly(len(moments), _MOST_FRAMES)
        return Slider(time_axis(axes.pop()), tuple(moments[i] for i in kept))
    longest = max(len(film.times) for film in films)
    return Slider(None, tuple(float(i + 1) for i in range(longest)))


def _matrix(film: _Film, slider: Slider) -> MatrixPanel:
    last = len(film.times) - 1
    if slider.axis == time_axis(film.run.axis):
        places = np.searchsorted(film.times, slider.positions, side="right") - 1
    else:
        places = np.asarray(slider.positions) - 1
    classes = tuple(float(i) for i in range(len(film.frames[0])))
    return MatrixPanel(
        title=film.run.label,
        x_axis=Axis("class of the labels"),
        y_axis=Axis("class kernel"),
        x=classes,
        y=classes,
        frames=film.frames,
        value="specialization",
        colour=film.run.place,
        row_zero_on_top=True,
        frame_at=tuple(int(place) for place in places.clip(0, last)),
        moments=film.times,
        unit=film.run.axis,
    )


def _scalars(runs: Sequence[Subject], inputs: str) -> list[LinePanel]:
    panels = []
    for axis, group in by_axis(runs):
        curves = [(run, run.kernel_curve(inputs, "specialization")) for run in group]
        lines = tuple(Line(run.label, curve.x, curve.y, run.place) for run, curve in curves if curve)
        if lines:
            panels.append(LinePanel("scalar over time", time_axis(axis), Axis("specialization"), lines))
    return panels


def _on_diagonal(frame: Matrix) -> int:
    return sum(row[i] >= max(row) for i, row in enumerate(frame))


def _sentence(film: _Film) -> str:
    first, last = film.frames[0], film.frames[-1]
    return (
        f"{_on_diagonal(last)} of {len(last)} class kernels align best with their own "
        f"class at the end, {_on_diagonal(first)} at the start"
    )
