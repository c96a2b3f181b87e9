"""A run as the report sees it: its label and colour, its curves, and what is concluded from them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from tangentlab.metrics import (
    LASTING_EPOCHS,
    Collapse,
    Stages,
    catastrophic_overfitting,
    find_stages,
    parting_epoch,
)
from tangentlab.records import RunRecord

_KERNEL_NAME = re.compile(r"kernel/([^/]+)/([^/]+)/([^/]+)")
_KINDS = ("class", "trace")
_INPUTS = ("clean", "fgsm", "pgd")
_ONCE = "-once"  # ends the name of inputs that were crafted at the first snapshot and kept
_LONGEST_LABEL = 40


@dataclass(frozen=True)
class Curve:
    """Numbers over epochs or steps; false where nothing was recorded."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __bool__(self) -> bool:
        return bool(self.x)

    def positive(self) -> Curve:
        """Without what a logarithmic axis cannot show."""
        return self._where([y > 0 for y in self.y])

    def at_or_before(self, x: float) -> float:
        """The last value recorded until ``x``; the first one where there is none."""
        return next((y for t, y in zip(reversed(self.x), reversed(self.y), strict=True) if t <= x), self.y[0])

    def _where(self, keep: Sequence[bool]) -> Curve:
        pairs = [(x, y) for x, y, kept in zip(self.x, self.y, keep, strict=True) if kept]
        return Curve(tuple(x for x, _ in pairs), tuple(y for _, y in pairs))


@dataclass(frozen=True)
class Subject:
    """One run of the report; ``place`` gives its colour, ``label`` tells it from the others."""

    record: RunRecord
    place: int
    label: str

    @property
    def axis(self) -> str:
        return self.record.axis

    def curve(self, name: str) -> Curve:
        """The numbers recorded under ``name``, over time that increases.

        A foreign log may hold anything: what is no number is left out, as is an accuracy outside [0, 1] and
        a value below 0 of a quantity that has none; of two values at one moment the later counts.
        """
        most = 1.0 if name.endswith("_accuracy") else math.inf
        points = {
            float(x): float(y)
            for x, y in zip(*self.record.series(name), strict=True)
            if is_number(x) and is_number(y) and 0 <= y <= most
        }
        times = sorted(points)
        return Curve(tuple(times), tuple(points[x] for x in times))

    def kernel_curve(self, inputs: str, metric: str) -> Curve:
        """A kernel metric on one kind of inputs, of the class kernels where both kinds were recorded."""
        return self.curve(self.kernel_name(inputs, metric))

    def kernel_name(self, inputs: str, metric: str) -> str:
        """The full name under which a kernel metric was recorded; "" where it was not."""
        kinds = self._kernel_names.get((inputs, metric), [])
        kind = min(kinds, key=lambda k: _KINDS.index(k) if k in _KINDS else len(_KINDS), default=None)
        return "" if kind is None else f"kernel/{inputs}/{kind}/{metric}"

    def inputs_of(self, metric: str) -> list[str]:
        """Kinds of inputs (or pairs "a~b") on which a kernel metric was recorded, clean first."""
        return ordered_inputs(inputs for inputs, name in self._kernel_names if name == metric)

    @cached_property
    def _kernel_names(self) -> dict[tuple[str, str], list[str]]:
        names: dict[tuple[str, str], list[str]] = {}
        for match in filter(None, map(_KERNEL_NAME.fullmatch, self.record.names())):
            inputs, kind, metric = match.groups()
            names.setdefault((inputs, metric), []).append(kind)
        return names

    def series(self, name: str) -> list[tuple[float, Any]]:
        """(epoch or step, value) for values that are not numbers, such as matrices; as for a curve."""
        points = {float(x): value for x, value in zip(*self.record.series(name), strict=True) if is_number(x)}
        return sorted(points.items(), key=lambda point: point[0])

    def times_of(self, steps: Sequence[int]) -> tuple[float, ...]:
        """Where steps lie on the run's time axis; between records, interpolated."""
        if self.axis == "step":
            return tuple(float(step) for step in steps)
        known = {
            line["step"]: line["epoch"]
            for line in self.record.metrics
            if is_number(line.get("step")) and is_number(line.get("epoch"))
        }
        recorded = sorted(known)
        return tuple(float(t) for t in np.interp(steps, recorded, [known[step] for step in recorded]))

    # --- conclusions -------------------------------------------------------------------------------------

    @cached_property
    def collapse(self) -> Collapse | None:
        """Catastrophic overfitting on the validation split, as tangentlab.metrics defines it: the first that
        lasts, else the first."""
        fgsm, robust = self.curve("fgsm_accuracy"), self.curve("robust_accuracy")
        both = sorted(set(fgsm.x) & set(robust.x))
        if not both:
            return None
        curves = [[curve.at_or_before(x) for x in both] for curve in (fgsm, robust)]
        chance = 1 / (self.classes or 10)
        lasting, first = (
            catastrophic_overfitting(both, *curves, chance=chance, lasting=time) for time in (self.lasting, 0)
        )
        return lasting or first

    @property
    def lasting(self) -> float:
        """From when on a collapse is a lasting one: of a run that tells no epochs, three evaluations."""
        if self.axis == "epoch":
            return LASTING_EPOCHS
        times = self.curve("robust_accuracy").x
        return 2 * float(np.median(np.diff(times))) if len(times) > 1 else 0.0

    @property
    def classes(self) -> int | None:
        """Number of classes, as far as a specialization matrix tells it."""
        for inputs in self.inputs_of("specialization_matrix"):
            for _, value in self.series(self.kernel_name(inputs, "specialization_matrix")):
                return len(value) if isinstance(value, list) and value else None
        return None

    @cached_property
    def parting(self) -> float | None:
        """Where the kernels on FGSM and on PGD inputs parted."""
        gap = self.kernel_curve("fgsm~pgd", "distance")
        return parting_epoch(gap.x, gap.y) if gap else None

    @cached_property
    def stages(self) -> Stages | None:
        """Learning, lazy, again: from the velocity of the kernel on clean inputs."""
        velocity = self.velocity(self.velocity_inputs)
        return find_stages(velocity.x, velocity.y) if velocity else None

    @property
    def velocity_inputs(self) -> str:
        """The inputs whose velocity tells the stages: clean where recorded, else the first there are."""
        return next(iter(self.inputs_of("angle_velocity") or self.inputs_of("velocity")), "clean")

    def velocity(self, inputs: str) -> Curve:
        """Angle per step, or kernel distance per step where no angle was recorded; positive values."""
        angle = self.kernel_curve(inputs, "angle_velocity")
        return (angle or self.kernel_curve(inputs, "velocity")).positive()

    @cached_property
    def alarm(self) -> float | None:
        """When the alarm of catastrophic overfitting first spoke."""
        return next((time for time, raised in self.series("alarm/raised") if raised is True), None)

    @property
    def records_collapse(self) -> bool:
        """Whether the run carries what catastrophic overfitting is defined by."""
        return bool(self.curve("fgsm_accuracy")) and bool(self.curve("robust_accuracy"))


def subjects(records: Sequence[RunRecord]) -> list[Subject]:
    """The runs in order, each with a label of its own: its name, with seed, folder or number where needed."""
    labels = [clean_text(record.name) for record in records]
    seeds = [clean_text(str(record.config.get("seed", "?"))) for record in records]
    folders = [clean_text(record.folder.resolve().name) for record in records]
    for more in (
        [f" (seed {seed})" for seed in seeds],
        [f" in {folder}" for folder in folders],
        [f" #{place + 1}" for place in range(len(records))],
    ):
        seen = Counter(labels)
        named = [
            label + suffix if seen[label] > 1 else label for label, suffix in zip(labels, more, strict=True)
        ]
        # A suffix that tells nothing apart stays away.
        labels = named if len(set(named)) > len(set(labels)) else labels
    return [Subject(record, place, labels[place]) for place, record in enumerate(records)]


def ordered_inputs(names: Iterable[str]) -> list[str]:
    """Kinds of inputs, clean first.

    Inputs crafted once stay away: they tell the kernel's movement from its inputs', nothing else.
    """
    kept = {name for name in names if not name.endswith(_ONCE)}
    return sorted(kept, key=lambda name: (_INPUTS.index(name) if name in _INPUTS else len(_INPUTS), name))


def clean_text(text: str, longest: int = _LONGEST_LABEL) -> str:
    """One printable line of bounded length: names come from files, and SVG knows no control characters."""
    line = "".join(c if c.isprintable() else " " for c in text).strip() or "unnamed"
    return line if len(line) <= longest else line[: longest - 1] + "…"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
