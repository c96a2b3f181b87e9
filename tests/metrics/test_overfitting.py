"""Collapses that are, that are not, and when; kernels that part."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tangentlab.errors import ConfigError
from tangentlab.metrics import PARTING_DISTANCE, catastrophic_overfitting, parting_epoch

EPOCHS = [1, 2, 3, 4, 5]
ROBUST = [0.20, 0.30, 0.40, 0.10, 0.00]
FGSM = [0.25, 0.38, 0.50, 0.80, 0.95]


def test_a_collapse_is_dated_between_evaluations() -> None:
    collapse = catastrophic_overfitting(EPOCHS, FGSM, ROBUST)
    assert collapse is not None
    assert collapse.epoch == pytest.approx(3 + (0.4 - 0.2) / (0.4 - 0.1))
    assert (collapse.best_epoch, collapse.best_robust_accuracy) == (3.0, 0.4)
    assert (collapse.robust_accuracy, collapse.fgsm_accuracy) == (0.10, 0.80)


def test_epochs_may_be_any_clock() -> None:
    collapse = catastrophic_overfitting([100 * e + 7 for e in EPOCHS], FGSM, ROBUST)
    assert collapse is not None
    assert collapse.epoch == pytest.approx(100 * (3 + 2 / 3) + 7)


@pytest.mark.parametrize(
    ("fgsm", "robust", "why"),
    [
        ([0.25, 0.38, 0.50, 0.55, 0.56], [0.2, 0.3, 0.4, 0.36, 0.21], "fell by less than half"),
        ([0.25, 0.38, 0.50, 0.49, 0.40], ROBUST, "FGSM accuracy fell too: the network came apart"),
        ([0.25, 0.38, 0.10, 0.15, 0.20], [0.2, 0.3, 0.05, 0.05, 0.0], "FGSM leads by no more than 0.2"),
        ([0.11, 0.12, 0.30, 0.60, 0.90], [0.1, 0.12, 0.05, 0.03, 0.0], "never learned"),
        (FGSM, [0.2, 0.3, 0.4, 0.41, 0.42], "no fall"),
    ],
)
def test_what_is_no_collapse(fgsm: list[float], robust: list[float], why: str) -> None:
    assert catastrophic_overfitting(EPOCHS, fgsm, robust) is None, why


def test_every_threshold_decides() -> None:
    def found(robust_end: float, fgsm_end: float, chance: float = 0.1) -> bool:
        return catastrophic_overfitting([1, 2], [0.5, fgsm_end], [0.4, robust_end], chance=chance) is not None

    assert found(0.20, 0.5)
    assert not found(0.21, 0.5)  # half of the best
    assert not found(0.10, 0.49)  # FGSM at the time of the best
    assert catastrophic_overfitting([1, 2], [0.3, 0.3], [0.25, 0.11]) is None  # lead 0.19
    assert found(0.1, 0.9, chance=0.34)
    assert not found(0.1, 0.9, chance=0.36)  # best 0.4 exceeds chance by less than 0.05


def test_the_best_so_far_counts_not_the_best_to_come() -> None:
    # Collapses from 0.3, recovers, reaches 0.5 later.
    collapse = catastrophic_overfitting(EPOCHS, [0.4, 0.9, 0.6, 0.7, 0.8], [0.3, 0.0, 0.4, 0.45, 0.5])
    assert collapse is not None
    assert collapse.best_epoch == 1.0
    assert collapse.epoch == pytest.approx(1.5)


def test_dated_to_the_last_crossing_when_an_earlier_fall_recovered() -> None:
    # Epoch 2: FGSM fell as well. Epoch 3 is back above half; epochs 4 and 5 are below, FGSM leads at 5 only.
    collapse = catastrophic_overfitting(EPOCHS, [0.5, 0.1, 0.5, 0.3, 0.9], [0.4, 0.1, 0.3, 0.1, 0.05])
    assert collapse is not None
    assert collapse.epoch == pytest.approx(3.5)
    assert collapse.robust_accuracy == 0.05


@pytest.mark.parametrize(
    ("end", "until"),
    [([0.1, 0.0, 0.2], 5), ([0.1, 0.3], 3.5), ([0.1, 0.1, 0.3, 0.1], 4.5)],  # 0.2 is half
)
def test_a_collapse_lasts_until_more_than_half_of_the_best_is_back(end: list[float], until: float) -> None:
    robust = [0.3, 0.4, *end]
    fgsm = [0.5, *[0.9] * (len(robust) - 1)]
    collapse = catastrophic_overfitting(range(1, len(robust) + 1), fgsm, robust)
    assert collapse is not None
    assert collapse.lasted == pytest.approx(until - (2 + 2 / 3))


def test_how_long_a_collapse_lasts_does_not_depend_on_how_often_it_is_seen() -> None:
    times = np.linspace(0, 10, 81)
    robust = np.interp(times, [0, 2, 2.5, 3.0, 3.5, 10], [0.3, 0.4, 0.1, 0.1, 0.4, 0.4])
    for every in (1, 2, 4):
        collapse = catastrophic_overfitting(times[::every], [0.9] * len(times[::every]), robust[::every])
        assert collapse is not None
        assert collapse.lasted == pytest.approx(5 / 6)


def test_what_did_not_last_is_passed_over_where_that_is_asked_for() -> None:
    robust = [0.4, 0.1, 0.4, 0.4, 0.4, 0.1, 0.1, 0.0]
    found = [catastrophic_overfitting(range(8), [0.9] * 8, robust, lasting=time) for time in (0, 1, 3)]
    assert [collapse and collapse.epoch for collapse in found[:2]] == pytest.approx([2 / 3, 4 + 2 / 3])
    assert found[2] is None


def test_no_evaluations_no_collapse() -> None:
    assert catastrophic_overfitting([], [], []) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [0.5], [0.4, 0.1]), "fgsm_accuracy has 1 values for 2"),
        (([1], [0.5, 0.5], [0.4, 0.1]), "epochs has 1 values for 2"),
        (([2, 1], [0.5, 0.5], [0.4, 0.1]), "1 follows 2"),
        (([1, 2], [50, 60], [0.4, 0.1]), "fgsm_accuracy holds 50"),
        (([1, 2], [0.5, 0.5], [0.4, math.nan]), "robust_accuracy has 1 values of 2"),
    ],
)
def test_bad_curves_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        catastrophic_overfitting(*arguments)
    with pytest.raises(ConfigError, match="chance=1.5"):
        catastrophic_overfitting([1], [0.5], [0.5], chance=1.5)


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ([0, 0, 0, 0.08, 0.1, 0.1, 0.1], 3.5),
        ([0, 0.08, 0.08, 0, 0.08, 0.1, 0.1], 4.5),  # two above are not three
        ([0, 0.08, 0.08, 0.08, 0, 0, 0], 1.5),  # three are
        ([0, 0, 0, 0, 0, 0.08, 0.08], 5.5),  # two that last to the end are
        ([0, 0, 0, 0, 0, 0, 0.16], 6.25),
        ([0.08, 0.08, 0.08, 0, 0, 0, 0], 1.0),
        ([0.08, 0, 0, 0, 0, 0, 0], None),
        ([0.04] * 7, None),
    ],
)
def test_kernels_part_for_good(distances: list[float], expected: float | None) -> None:
    parted = parting_epoch(range(1, 8), distances, threshold=0.04)
    assert parted == (None if expected is None else pytest.approx(expected))


def test_default_threshold_and_refusals() -> None:
    assert parting_epoch([0, 1], [0, 2 * PARTING_DISTANCE]) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="threshold=0"):
        parting_epoch([0, 1], [0, 1], threshold=0)
    with pytest.raises(ConfigError, match="distances holds -0.1"):
        parting_epoch([0, 1], [-0.1, 1])
    with pytest.raises(ConfigError, match="epochs has 1 values"):
        parting_epoch([0], [0, 1])
