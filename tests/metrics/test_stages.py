"""Stages of curves whose truth is known: found where they are, and not where they are not.

Noise is on the log velocity. Rates are over seeds; a bound is the rate that is promised plus three standard
errors of the binomial, so that a method that keeps its promise passes whatever the seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import threadpoolctl
import torch

from tangentlab.errors import ConfigError
from tangentlab.metrics import Stages, find_stages

Curve = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of small fits: threads would mostly wait for each other."""
    with threadpoolctl.threadpool_limits(1):
        yield


def at_least(rate: float, seeds: int) -> float:
    return rate - 3 * math.sqrt(rate * (1 - rate) / seeds)


def at_most(rate: float, seeds: int) -> float:
    return rate + 3 * math.sqrt(rate * (1 - rate) / seeds)


def noise(n: int, sigma: float, phi: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    e = rng.normal(size=n)
    for k in range(1, n):
        e[k] = phi * e[k - 1] + math.sqrt(1 - phi**2) * e[k]
    return sigma * e


def found(curve: Curve, n: int, sigma: float, *, phi: float = 0.0, seeds: int) -> list[Stages]:
    t = np.arange(1.0, n + 1)
    return [find_stages(t, np.exp(curve(t) + noise(n, sigma, phi, seed))) for seed in range(seeds)]


def covers(interval: tuple[float, float] | None, truth: float) -> bool:
    return interval is not None and interval[0] <= truth <= interval[1]


def fall(t: np.ndarray) -> np.ndarray:
    """Velocity decays 20-fold until 9.3, then stays."""
    return math.log(20) * np.maximum(9.3 - t, 0) / 9.3


def flat(t: np.ndarray) -> np.ndarray:
    return np.zeros_like(t)


@pytest.mark.parametrize("sigma", [0.02, 0.2])
def test_decline_then_lazy(sigma: float) -> None:
    results = found(fall, 30, sigma, seeds=50)
    claimed = [r for r in results if r.learning_end is not None]
    assert len(claimed) >= 45
    assert np.mean([covers(r.learning_end_interval, 9.3) for r in claimed]) >= at_least(0.9, len(claimed))
    assert np.median([r.learning_end for r in claimed]) == pytest.approx(9.3, abs=1.5)
    assert np.median([r.learning_ratio for r in claimed]) == pytest.approx(20 ** (8.3 / 9.3), rel=0.3)
    assert np.mean([r.third_start is not None for r in results]) <= at_most(0.05, 50)
    assert all(r.lazy == (r.learning_end, 30) for r in claimed if r.third_start is None)


def test_a_decay_to_a_floor_is_a_decline_then_lazy() -> None:
    # v = L (1 + exp((τ − t)/w)): no corner, asymptotes that meet at τ.
    results = found(lambda t: np.log1p(np.exp((9.3 - t) / 3)), 30, 0.05, seeds=20)
    assert np.mean([covers(r.learning_end_interval, 9.3) for r in results]) >= at_least(0.9, 20)
    assert not any(r.third_start for r in results)


@pytest.mark.parametrize("sigma", [0.05, 0.2])
@pytest.mark.parametrize(
    ("rise", "ratio"),
    [
        (lambda t: 1.5 * np.maximum(t - 20, 0) / 10, math.exp(1.5)),
        (lambda t: 1.0 * (t >= 20), math.exp(1.0)),
    ],
    ids=["hinge", "step"],
)
def test_decline_lazy_and_again(rise: Curve, ratio: float, sigma: float) -> None:
    results = found(lambda t: fall(t) + rise(t), 30, sigma, seeds=25)
    claimed = [r for r in results if r.third_start is not None]
    assert len(claimed) >= 20
    assert np.mean([covers(r.third_start_interval, 20) for r in claimed]) >= at_least(0.9, len(claimed))
    assert np.median([r.level_ratio for r in claimed]) == pytest.approx(ratio, rel=0.2)
    both = [r for r in claimed if r.learning_end is not None]
    assert np.mean([covers(r.learning_end_interval, 9.3) for r in both]) >= at_least(0.9, len(both))
    assert all(r.lazy == (r.learning_end, r.third_start) for r in both)
    assert all(r.third_start - r.learning_end >= 3 for r in both)
    assert np.mean([r.third_end is None for r in claimed]) >= 0.9


def test_a_burst_has_an_end() -> None:
    results = found(lambda t: fall(t) + 1.2 * ((t >= 16) & (t < 23)), 30, 0.1, seeds=10)
    assert all(r.third_start == pytest.approx(16, abs=1) for r in results)
    assert all(r.third_end == pytest.approx(23, abs=1) for r in results)
    assert "until epoch 23" in results[0].describe()


def test_again_without_a_decline() -> None:
    results = found(lambda t: 1.5 * (t >= 20), 30, 0.2, seeds=10)
    assert all(r.third_start == pytest.approx(20, abs=2) for r in results)
    assert all(r.learning_end is None and r.lazy == (1.0, r.third_start) for r in results)
    assert "no learning stage established" in results[0].describe()


def test_a_rise_below_half_as_fast_again_is_no_stage() -> None:
    results = found(lambda t: fall(t) + math.log(1.3) * (t >= 20), 30, 0.02, seeds=10)
    assert all(sum(p for m, p in r.probabilities.items() if "again" in m) > 0.95 for r in results)
    assert not any(r.third_start for r in results)
    assert all(r.third_probability < 0.05 for r in results)


@pytest.mark.parametrize(
    ("n", "sigma", "phi", "rate"),
    [(24, 0.3, 0.0, 0.05), (12, 0.6, 0.0, 0.05), (24, 0.2, 0.6, 0.05), (24, 0.6, 0.6, 0.10)],
)
def test_flat_noise_has_no_stages(n: int, sigma: float, phi: float, rate: float) -> None:
    results = found(flat, n, sigma, phi=phi, seeds=200)
    assert np.mean([r.third_start is not None for r in results]) <= rate
    assert np.mean([r.learning_end is not None for r in results]) <= rate
    assert np.mean([r.autocorrelation for r in results]) == pytest.approx(phi, abs=0.3)


def test_correlated_noise_after_a_decline_has_no_third_stage() -> None:
    results = found(fall, 24, 0.3, phi=0.6, seeds=100)
    assert np.mean([r.third_start is not None for r in results]) <= 0.1


@pytest.mark.parametrize(
    "decline",
    [
        lambda t: -3 * t / 40,
        lambda t: -np.log(t),
        lambda t: -np.log(t + 5),
        lambda t: -2 * np.log(t + 5),
    ],
    ids=["exponential", "power", "shifted power", "shifted square"],
)
@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_a_decline_that_never_settles_has_no_lazy_stage(decline: Curve, sigma: float) -> None:
    results = found(decline, 30, sigma, seeds=20)
    assert np.mean([r.lazy is not None for r in results]) <= at_most(0.05, 20)
    assert not any(r.third_start for r in results)
    likeliest = [max(r.probabilities, key=r.probabilities.get) for r in results]
    assert likeliest.count("declining") >= 15
    assert "still declining at epoch 30" in results[likeliest.index("declining")].describe()


@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_a_power_law_with_a_flat_tail_has_two_stages(sigma: float) -> None:
    results = found(lambda t: -np.log(np.minimum(t, 12)), 30, sigma, seeds=20)
    assert not any(r.third_start for r in results)
    assert np.mean([covers(r.learning_end_interval, 12) for r in results]) >= at_least(0.9, 20)


def test_units_change_nothing_but_units() -> None:
    t = np.arange(1.0, 41)
    v = np.exp(fall(t) + 1.0 * (t >= 28) + noise(40, 0.1, 0.0, 0))
    base, scaled = find_stages(t, v), find_stages(390 * t, 1e-7 * v)
    assert base.third_start is not None
    for name in ("learning_end", "third_start", "lazy", "learning_end_interval", "third_start_interval"):
        np.testing.assert_allclose(getattr(scaled, name), 390 * np.asarray(getattr(base, name)), rtol=1e-9)
    for name in ("learning_ratio", "level_ratio", "third_probability", "autocorrelation"):
        assert getattr(scaled, name) == pytest.approx(getattr(base, name), rel=1e-6)
    assert scaled.probabilities == pytest.approx(base.probabilities, rel=1e-6, abs=1e-12)


def test_a_wider_credibility_widens_the_intervals() -> None:
    t = np.arange(1.0, 41)
    v = np.exp(fall(t) + noise(40, 0.3, 0.0, 1))
    narrow, wide = (find_stages(t, v, credibility=c).learning_end_interval for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_too_few_points_conclude_nothing() -> None:
    stages = find_stages(range(7), [5, 3, 1, 1, 1, 9, 9])
    assert stages == Stages(points=7)
    assert stages.describe() == "Too few points to tell stages apart: 7, and at least 8 are needed."
    assert find_stages([], []).points == 0
    assert find_stages(range(8), [5, 3, 1, 1, 1, 9, 9, 9]).probabilities


def test_zeros_are_raised_to_the_smallest_positive_velocity() -> None:
    t = torch.arange(1, 31)
    v = torch.exp(torch.from_numpy(fall(t.double().numpy())))
    raised = v.clone()
    v[20], raised[20] = 0.0, v[v > 0].min()
    assert find_stages(t, v) == find_stages(t, raised)


def test_a_constant_velocity_is_flat() -> None:
    stages = find_stages(range(20), [0.3] * 20)
    assert stages.probabilities["flat"] == pytest.approx(1)
    assert stages.describe() == (
        "No stages: velocity is most likely flat (probability 1.00); no third stage (probability 0.00)."
    )


def test_the_sentence_says_it_all() -> None:
    t = np.arange(1.0, 41)
    stages = find_stages(100 * t, np.exp(fall(t) + 1.0 * (t >= 28) + noise(40, 0.05, 0.0, 0)))
    assert stages.describe("step") == (
        "Fast kernel learning until step 950 (90% interval 825 to 1050, probability 1.00), then a lazy stage "
        "until step 2800; a third stage from step 2800 (90% interval 2700 to 2900, probability 1.00), "
        "2.8 times as fast as the lazy one."
    )


@pytest.mark.parametrize(
    ("times", "velocity", "credibility", "message"),
    [
        (range(9), [1.0] * 8, 0.9, "times has 9 values for 8"),
        ([0, 1, 2, 2, 3, 4, 5, 6], [1.0] * 8, 0.9, "2 follows 2"),
        (range(8), [1.0] * 7 + [-1.0], 0.9, "velocity holds -1"),
        (range(8), [1.0] * 7 + [math.nan], 0.9, "velocity has 1 values of 8"),
        (range(8), [0.0] * 8, 0.9, "never moved"),
        (range(8), [1.0] * 8, 90, "credibility=90"),
    ],
)
def test_bad_curves_are_refused(times, velocity: list[float], credibility: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_stages(times, velocity, credibility=credibility)


def test_two_hundred_points_take_less_than_a_second() -> None:
    t = np.arange(1.0, 201)
    v = np.exp(fall(t) + noise(200, 0.2, 0.3, 0))
    start = time.process_time()
    find_stages(t, v)
    assert time.process_time() - start < 1
