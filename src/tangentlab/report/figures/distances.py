"""Kernel distance between every two snapshots of a run: a snapshot × snapshot map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch

from tangentlab.metrics import distance_matrix
from tangentlab.report.figure import Figure, Matrix, MatrixPanel, View, evenly, number
from tangentlab.report.figures._common import conclude, time_axis
from tangentlab.report.palette import inputs_name
from tangentlab.report.subject import Subject, ordered_inputs

# Keeps a map's share of the page below 100 kB and one run's kernels of one kind in memory.
_MOST_SNAPSHOTS = 80
# A last third of training that covers less than this part of the way from first to last has settled.
_SETTLED = 0.25


def distances(runs: Sequence[Subject]) -> Figure:
    """A view a kind of inputs, a map a run."""
    panels = [(inputs, run, panel) for run in runs for inputs, panel in _maps(run)]
    kinds = list(dict.fromkeys(inputs for inputs, _, _ in panels))
    views = tuple(
        View(inputs_name(inputs), tuple(panel for kind, _, panel in panels if kind == inputs))
        for inputs in kinds
    )
    first = [(run, panel) for kind, run, panel in panels if kind == kinds[0]]
    return Figure(
        key="distances",
        title="Kernel distance between snapshots",
        caption="Each point compares the kernels at two moments of one run: 0 where they agree up to scale. "
        "A block along the diagonal is a stretch in which the kernel hardly moved, an edge a change of "
        "kernel. The scale is the same in all maps.",
        finding=conclude(
            "a block in the upper right corner, a kernel that has settled",
            [(run, _sentence(run, panel)) for run, panel in first],
            found=any(_late(panel) <= _SETTLED * panel.frames[0][0][-1] for _, panel in first),
            missing="no run kept two snapshots of its kernels",
        ),
        views=views,
        selector="inputs",
    )


def _maps(run: Subject) -> list[tuple[str, MatrixPanel]]:
    steps = run.record.kernel_steps()
    if len(steps) < 2:
        return []
    steps = [steps[place] for place in evenly(len(steps), _MOST_SNAPSHOTS)]
    names = list(run.record.kernels(steps[-1]))
    chosen = {name.split("/")[0]: name for name in sorted(names, reverse=True)}  # class before trace
    return [
        (inputs, panel) for inputs in ordered_inputs(chosen) if (panel := _map(run, chosen[inputs], steps))
    ]


def _map(run: Subject, name: str, steps: Sequence[int]) -> MatrixPanel | None:
    # One kind of inputs at a time: all of them together may be four times the memory.
    found = [(step, kernel) for step in steps if _usable(kernel := run.record.kernels(step).get(name))]
    found = [(step, kernel) for step, kernel in found if kernel.shape == found[-1][1].shape]
    if len(found) < 2:
        return None
    matrix = distance_matrix(torch.stack([kernel for _, kernel in found]))
    times = run.times_of([step for step, _ in found])
    axis = time_axis(run.axis)
    frame: Matrix = tuple(tuple(row) for row in matrix.double().tolist())
    return MatrixPanel(
        title=run.label,
        x_axis=axis,
        y_axis=axis,
        x=times,
        y=times,
        frames=(frame,),
        value="kernel distance",
        colour=run.place,
    )


def _usable(kernel: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether a distance to it exists: a run that diverged leaves kernels of NaN or of zeros."""
    if kernel is None or kernel.ndim < 2 or not kernel.isfinite().all():
        return False
    return bool((kernel.abs().amax(dim=(-2, -1)) > 0).all())


def _late(panel: MatrixPanel) -> float:
    """Distance covered in the last third of the snapshots."""
    frame = panel.frames[0]
    return frame[2 * len(frame) // 3][-1]


def _sentence(run: Subject, panel: MatrixPanel) -> str:
    frame = panel.frames[0]
    jumps = [frame[i][i + 1] for i in range(len(frame) - 1)]
    sharpest = max(range(len(jumps)), key=jumps.__getitem__)
    when = f"{run.axis} {panel.x[sharpest]:.3g} to {panel.x[sharpest + 1]:.3g}"
    return (
        f"distance {number(frame[0][-1])} from first to last, over the last third "
        f"{number(_late(panel))}; largest between neighbours {number(jumps[sharpest])}, {when}"
    )
