"""Wilson's interval against its defining equation, tables and its coverage; Student's against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tangentlab.errors import ConfigError
from tangentlab.metrics import clustered_wilson_interval, mean_interval, wilson_interval


def test_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, 857–872, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_ends_solve_the_score_equation_and_mirror(case: tuple[int, int]) -> None:
    correct, n = case
    low, high = wilson_interval(correct, n)
    for p, end in ((low, 0), (high, n)):
        if correct != end:
            z = (correct / n - p) / math.sqrt(p * (1 - p) / n)
            assert abs(z) == pytest.approx(1.959963985, rel=1e-6)
    assert 0 <= low <= correct / n <= high <= 1
    assert wilson_interval(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_ends_are_exact_and_confidence_widens() -> None:
    assert wilson_interval(0, 7).low == 0.0
    assert wilson_interval(7, 7).high == 1.0
    narrow, wide = wilson_interval(30, 100, 0.9), wilson_interval(30, 100, 0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_coverage_of_ninety_five_percent() -> None:
    n, p = 200, 0.45
    pmf = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    covered = sum(
        w for k, w in enumerate(pmf) if wilson_interval(k, n).low <= p <= wilson_interval(k, n).high
    )
    assert 0.94 < covered < 0.96


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_clusters_of_one_trial_are_independent_trials(trials: list[bool]) -> None:
    found = clustered_wilson_interval([[trial] for trial in trials])
    assert found == wilson_interval(sum(trials), len(trials))


def test_clusters_that_agree_within_count_as_one_trial_each() -> None:
    clusters = [[True] * 7] * 300 + [[False] * 7] * 100
    # But for n − 1 of 2,800 trials and of 400, and Student's quantile.
    assert clustered_wilson_interval(clusters) == pytest.approx(wilson_interval(300, 400), abs=5e-4)
    assert clustered_wilson_interval([[True, False, False]] * 10) == wilson_interval(10, 30)
    assert clustered_wilson_interval([[True] * 4] * 5) == wilson_interval(20, 20)


@pytest.mark.parametrize("seeds", [5, 30])
def test_clusters_are_covered_where_independent_trials_would_not_be(seeds: int) -> None:
    random = np.random.default_rng(0)
    covered = {"clustered": 0, "independent": 0}
    for _ in range(1000):
        rates = random.beta(1.5, 0.5, size=seeds)
        clusters = [(random.random(8) < rate).tolist() for rate in rates]
        own = clustered_wilson_interval(clusters)
        independent = wilson_interval(sum(map(sum, clusters)), 8 * seeds)
        covered["clustered"] += own.low <= 0.75 <= own.high
        covered["independent"] += independent.low <= 0.75 <= independent.high
    assert 900 < covered["clustered"] < 970
    assert covered["independent"] < 760


def test_refusals_of_clusters() -> None:
    with pytest.raises(ConfigError, match="m=1 clusters"):
        clustered_wilson_interval([[True, False]])
    with pytest.raises(ConfigError, match="no trial"):
        clustered_wilson_interval([[True], []])
    with pytest.raises(ConfigError, match="confidence=2"):
        clustered_wilson_interval([[True], [False]], 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5, 0), "n=0"), ((6, 5), "correct=6 of n=5"), ((-1, 5), "correct=-1"), ((1, 5, 1.0), "confidence=1.0")],
)
def test_refusals(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wilson_interval(*arguments)


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = [0.31, 0.35, 0.29, 0.36]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert mean_interval(values, 0.9) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("values", "confidence", "message"),
    [
        ([1.0], 0.95, "n=1 values; an interval of their mean takes at least 2"),
        ([1.0, math.nan], 0.95, "the value nan is not finite"),
        ([1.0, 2.0], 1.0, "confidence=1.0 is out of range"),
    ],
)
def test_bad_values_of_a_mean(values: list[float], confidence: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mean_interval(values, confidence)
