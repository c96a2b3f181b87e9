"""All fits and weights of the segmented curves against loops over numpy.linalg.lstsq."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tangentlab.metrics import _segmented
from tangentlab.metrics._segmented import AGAIN, ALL_THREE, DECLINING, FLAT, LAZY, MODELS, weigh


def curve(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.uniform(0.5, 1.5, n))
    y = 2 * np.maximum(t[n // 3] - t, 0) / t[n // 3] + (np.arange(n) >= 2 * n // 3) + 0.3 * rng.normal(size=n)
    return t, y


def slow_shapes(t: np.ndarray) -> tuple[list, list, list]:
    """Unending falls, falls [(τ1, f)] by shape, rises [(τ2, τ3, g)] by shape."""
    n, at = len(t), lambda p: np.interp(p, np.arange(len(t)), t)
    quarters = [k / 4 for k in range(4 * n)]
    unending = [
        -t,
        -np.log(t),
        -np.log(t - t[0] + 0.1 * (t[-1] - t[0])),
        -np.log(t - t[0] + 0.3 * (t[-1] - t[0])),
    ]
    falls = []
    for clock, width in itertools.product([lambda s: s, np.log], [0, 0.25, 0.5]):
        shape = []
        for p in (p for p in quarters if 3 <= p <= n - 3):
            ahead = clock(at(p)) - clock(t)
            w = width * ahead[0]
            shape.append((p, w * np.log(1 + np.exp(ahead / w)) if width else np.clip(ahead, 0, None)))
        falls.append(shape)
    k = np.arange(n)
    hinges = [(p, None, np.clip(t - at(p), 0, None)) for p in quarters if 2 <= p <= n - 4]
    steps = [(p, None, 1.0 * (k >= p)) for p in range(3, n - 2)]
    bursts = [(p, q, 1.0 * ((k >= p) & (k < q))) for p in range(3, n - 2) for q in range(p + 3, n - 2)]
    return unending, falls, [shape for shape in (hinges, steps, bursts) if shape]


def slow_blocks(t: np.ndarray) -> list[tuple[str, list[list[np.ndarray]]]]:
    unending, falls, rises = slow_shapes(t)
    blocks = [(FLAT, [[]])]
    blocks += [(DECLINING, [[f]]) for f in unending]
    blocks += [(LAZY, [[f] for _, f in fall]) for fall in falls]
    blocks += [(AGAIN, [[g] for _, _, g in rise]) for rise in rises]
    for fall, rise in itertools.product(falls, rises):
        blocks.append(
            (ALL_THREE, [[f, g] for (p, f), (q, _, g) in itertools.product(fall, rise) if q - p >= 3])
        )
    return [block for block in blocks if block[1]]


@pytest.mark.parametrize(("n", "seed"), [(8, 0), (9, 1), (11, 2), (13, 3)])
def test_posterior_of_the_models_against_loops(n: int, seed: int) -> None:
    t, y = curve(n, seed)
    blocks = slow_blocks(t)
    fits: list[tuple[str, float, int, np.ndarray, float]] = []
    names = [model for model, _ in blocks]
    for model, candidates in blocks:
        prior = 1 / (len(set(names)) * names.count(model) * len(candidates))
        for regressors in candidates:
            A = np.stack([np.ones(n), *regressors], axis=1)
            coefficients, *_ = np.linalg.lstsq(A, y, rcond=None)
            if (coefficients[1:] > 0).all():
                fits.append((model, prior, A.shape[1], y - A @ coefficients, np.nan))
    best = min((e for *_, e, _ in fits), key=lambda e: e @ e)
    raw = (e := best)[1:] @ e[:-1] / (e @ e + n * 0.02**2)
    phi = np.clip(raw + 5 * (1 + raw) / n, 0, 0.9)
    n_eff = n * (1 - phi) / (1 + phi)
    weights = dict.fromkeys(MODELS, 0.0)
    for model, prior, k, e, _ in fits:
        bic = n_eff * np.log(e @ e / n + 0.02**2) + k * np.log(n_eff)
        weights[model] += prior * np.exp(-bic / 2)

    found = weigh(t, y)
    assert found.autocorrelation == pytest.approx(phi, abs=1e-9)
    for model, weight in weights.items():
        assert found.probability(found.of(model)) == pytest.approx(weight / sum(weights.values()), abs=1e-9)


def test_every_pair_is_the_least_squares_solution() -> None:
    t, y = curve(12, 4)
    checked = 0
    for block in _segmented._blocks(t, y - y.mean()):
        if block.model != ALL_THREE:
            continue
        for k in range(0, len(block.rss), 7):
            A = np.stack([np.ones(12), block.fall.rows[block.i[k]], block.rise.rows[block.j[k]]], axis=1)
            coefficients, *_ = np.linalg.lstsq(A, y, rcond=None)
            assert (block.a[k], block.c[k]) == pytest.approx(tuple(coefficients[1:]), abs=1e-9)
            if np.isfinite(block.rss[k]):
                residuals = y - A @ coefficients
                assert block.rss[k] == pytest.approx(residuals @ residuals, abs=1e-9)
                np.testing.assert_allclose(block.residuals(k, y - y.mean()), residuals, atol=1e-9)
                checked += 1
            else:
                assert (coefficients[1:] <= 1e-12).any()
    assert checked > 50


def test_change_points_leave_three_snapshots_to_every_stage() -> None:
    n = 14
    found = weigh(*curve(n, 5))
    three = found.of(ALL_THREE)
    end, start = found.learning_end[three], found.third_start[three]
    assert end.min() == 3
    assert (start - end).min() == 3
    assert np.nanmax(found.third_end[three]) == n - 3
    assert start.max() == n - 3
    assert np.isnan(found.third_start[found.of(LAZY)]).all()
    assert np.isnan(found.learning_end[found.of(AGAIN)]).all()
    assert found.weight.sum() == pytest.approx(1)


def test_long_curves_are_searched_on_a_coarser_grid() -> None:
    n = 500
    found = weigh(*curve(n, 6))
    ends = np.unique(found.learning_end[found.of(LAZY)])
    assert len(ends) == _segmented.GRID
    assert (ends == ends.round()).all()
    assert (ends[0], ends[-1]) == (3, n - 3)


def test_a_curve_that_starts_at_zero_has_no_power_law() -> None:
    t, y = curve(12, 7)
    with np.errstate(all="raise"):
        at_zero, later = weigh(t - t[0], y), weigh(t, y)
    assert len(at_zero.model) < len(later.model)
