"""The figures of the report, in the order of the page: each a function from the runs to what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tangentlab.report.figure import Figure
from tangentlab.report.figures.accuracies import accuracies
from tangentlab.report.figures.alarm import alarm
from tangentlab.report.figures.decisions import decisions
from tangentlab.report.figures.distances import distances
from tangentlab.report.figures.gaps import gaps
from tangentlab.report.figures.movement import movement
from tangentlab.report.figures.ranks import ranks
from tangentlab.report.figures.specialization import specialization
from tangentlab.report.figures.spectrum import spectrum
from tangentlab.report.figures.velocity import velocity
from tangentlab.report.subject import Subject

FIGURES: tuple[Callable[[Sequence[Subject]], Figure], ...] = (
    accuracies,
    gaps,
    alarm,
    velocity,
    decisions,
    distances,
    ranks,
    spectrum,
    specialization,
    movement,
)
