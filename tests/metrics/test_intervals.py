"""Wilson's interval against its defining equation, tables and its coverage; Student's against SciPy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tangentlab.errors import ConfigError
from tangentlab.metrics import mean_interval, wilson_interval


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
