"""Every segmented curve that a log velocity can follow: least squares over all change points, and evidence.

With y the log velocity, a candidate is y(t) = ℓ + a·f(t) + c·g(t) with a, c > 0:

- the fall f ends at a change point τ1: (τ1 − t)₊, a velocity that decays exponentially, or log(τ1/t)₊, a
  power law (where all times are positive). The corner may be rounded, as a decay towards a floor rounds it:
  w·log(1 + exp((τ1 − t)/w)); τ1 is then where the two asymptotes meet;
- the rise g starts at a change point τ2: a hinge (t − τ2)₊, a step 1[t ≥ τ2], or a burst 1[τ2 ≤ t < τ3].

Without τ1 the fall goes on to the end: exponential, power law, or a power law of the time since an origin.

Corners are searched on the snapshots and between them, steps on the snapshots (Lerman 1980; Bai &
Perron 2003). The normal equations of a pair (f, g) are 2×2 and made of sums over f, over g and over f·g, so
that all pairs cost one matrix product. A candidate's weight is exp(−BIC/2) (Kass & Raftery 1995, eq. 9);
change points are no parameters of it but averaged over, uniformly over models, then shapes, then positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Clock = Callable[[Array], Array]

MODELS = ("flat", "declining", "decline, lazy", "lazy, again", "decline, lazy, again")
FLAT, DECLINING, LAZY, AGAIN, ALL_THREE = MODELS

# Two points lie on any line; the third is the first that can contradict a stage.
MIN_SNAPSHOTS = 3

# At most so many positions of a change point, evenly spaced where there are more. A burst has one change
# point more, so its grid is coarser: 60 · 60 / 2 bursts with 200 ends of a fall are 350,000 candidates.
GRID = 200
BURST_GRID = 60

# Roundings w of the corner, in parts of the time from the start to τ1. v = L (1 + exp((τ1 − t)/w)) with a
# first velocity of 5 to 50 times the floor L has w = τ1/1.6 to τ1/4.
WIDTHS = (0.0, 0.25, 0.5)

# Origins of the unending power law before the first snapshot, in parts of the curve's length. Without them
# a shifted power law, that bends but never settles, passes for a lazy stage.
ORIGINS = (0.1, 0.3)

# Residuals look less correlated than the noise, by about (1 + φ)/n for each quantity fitted (Kendall 1954,
# for the mean): three coefficients and two change points.
FITTED = 5

# At 0.9, n points count as n/19; what looks more correlated is trend, not noise.
MAX_AUTOCORRELATION = 0.9

# Velocities closer than 2 % are taken as equal: no curve follows these shapes any better, and what is left of
# a curve without noise is misfit, which would pass for correlation.
NOISE_FLOOR = 0.02

# Corners lie between snapshots too, this many to a snapshot.
CORNERS = 4


@dataclass(frozen=True)
class Candidates:
    """One entry a candidate: model (index into MODELS), change points, log ratios, posterior weight.

    Change points are positions in units of snapshots (4.5: between the fifth and the sixth), NaN where there
    is none. ``fall`` and ``rise`` are the fitted logs of the stage's highest velocity over the lazy level.
    """

    model: NDArray[np.intp]
    learning_end: Array
    third_start: Array
    third_end: Array
    fall: Array
    rise: Array
    weight: Array
    autocorrelation: float

    def of(self, *models: str) -> Mask:
        """Mask of the candidates of these models."""
        return np.isin(self.model, [MODELS.index(model) for model in models])

    def probability(self, mask: Mask) -> float:
        """Posterior probability of these candidates together."""
        return min(1.0, float(self.weight[mask].sum()))


@dataclass(frozen=True)
class _Shape:
    """Regressors, one a row, scaled to a maximum of 1, and where each starts and ends (NaN: not in view)."""

    rows: Array
    start: Array
    end: Array


@dataclass(frozen=True)
class _Block:
    """The fits of all pairs of rows of two shapes; one row of zeros stands for a shape that is absent."""

    model: str
    coefficients: int
    fall: _Shape
    rise: _Shape
    i: NDArray[np.intp]
    j: NDArray[np.intp]
    a: Array
    c: Array
    rss: Array

    def residuals(self, k: int, y: Array) -> Array:
        fitted = self.a[k] * self.fall.rows[self.i[k]] + self.c[k] * self.rise.rows[self.j[k]]
        residuals: Array = y - (fitted - fitted.mean())
        return residuals


def weigh(t: Array, y: Array) -> Candidates:
    """Fit every candidate to the log velocity y [n] at times t [n], and weigh them all."""
    n = len(t)
    y = y - y.mean()
    blocks = _blocks(t, y)
    phi = _autocorrelation(blocks, y)
    n_eff = n * (1 - phi) / (1 + phi)

    names = [block.model for block in blocks]
    log_weights = []
    for block in blocks:
        variance = block.rss / n + NOISE_FLOOR**2
        log_prior = -np.log(len(set(names)) * names.count(block.model) * len(block.rss))
        bic = n_eff * np.log(variance) + block.coefficients * np.log(n_eff)
        log_weights.append(log_prior - bic / 2)
    log_weight = np.concatenate(log_weights)
    weight = np.exp(log_weight - log_weight.max())

    return Candidates(
        model=np.concatenate([np.full(len(b.rss), MODELS.index(b.model)) for b in blocks]),
        learning_end=np.concatenate([b.fall.end[b.i] for b in blocks]),
        third_start=np.concatenate([b.rise.start[b.j] for b in blocks]),
        third_end=np.concatenate([b.rise.end[b.j] for b in blocks]),
        fall=np.concatenate([b.a for b in blocks]),
        rise=np.concatenate([b.c for b in blocks]),
        weight=weight / weight.sum(),
        autocorrelation=phi,
    )


def _blocks(t: Array, y: Array) -> list[_Block]:
    n, length = len(t), t[-1] - t[0]
    clocks: list[Clock] = [lambda s: s]
    if t[0] > 0:
        clocks.append(np.log)
    shifted = [np.log(t - t[0] + origin * length) for origin in ORIGINS]

    none = _Shape(np.zeros((1, n)), np.array([np.nan]), np.array([np.nan]))
    falls = [_falls(t, clock, width) for clock in clocks for width in WIDTHS]
    rises = [shape for shape in (_hinges(t), _steps(n), _bursts(n)) if len(shape.rows)]
    blocks = [_fit(FLAT, none, none, y)]
    blocks += [_fit(DECLINING, _unending(x), none, y) for x in [clock(t) for clock in clocks] + shifted]
    blocks += [_fit(LAZY, fall, none, y) for fall in falls]
    blocks += [_fit(AGAIN, none, rise, y) for rise in rises]
    # One large matrix product a rise: many small ones leave the threads waiting for each other.
    every_fall = np.concatenate([fall.rows for fall in falls])
    for rise in rises:
        overlaps = np.split(every_fall @ rise.rows.T, len(falls))
        blocks += [_fit(ALL_THREE, f, rise, y, overlap) for f, overlap in zip(falls, overlaps, strict=True)]
    return [block for block in blocks if len(block.rss)]


def _fit(model: str, fall: _Shape, rise: _Shape, y: Array, overlap: Array | None = None) -> _Block:
    """Least squares of the centred y on a constant and one row of each shape, for all pairs of rows.

    ``overlap`` holds Σ f g of all pairs, by default none.
    """
    n = len(y)
    # NaN, a shape that is absent or not in view, leaves the lazy stage as long as it likes.
    too_short = rise.start[None, :] - fall.end[:, None] < MIN_SNAPSHOTS
    i, j = np.nonzero(~too_short)
    f1, f2, fy = (moment[i] for moment in _moments(fall.rows, y))
    g1, g2, gy = (moment[j] for moment in _moments(rise.rows, y))
    ff, gg, fg = f2 - f1**2 / n, g2 - g1**2 / n, -f1 * g1 / n
    if overlap is not None:
        fg = fg + overlap[i, j]
    # An absent shape is a zero row; 1 in its place of the matrix makes its coefficient 0.
    has_fall, has_rise = bool(fall.rows.any()), bool(rise.rows.any())
    ff, gg = ff if has_fall else np.ones_like(ff), gg if has_rise else np.ones_like(gg)
    determinant = ff * gg - fg**2
    a, c = (gg * fy - fg * gy) / determinant, (ff * gy - fg * fy) / determinant
    rss = np.maximum(y @ y - a * fy - c * gy, 0)
    # A fall that rises is no stage; the nearest fit that is allowed belongs to a simpler model.
    forbidden = ((a <= 0) & has_fall) | ((c <= 0) & has_rise)
    return _Block(model, 1 + has_fall + has_rise, fall, rise, i, j, a, c, np.where(forbidden, np.inf, rss))


def _moments(rows: Array, y: Array) -> tuple[Array, Array, Array]:
    """Σx, Σx² and Σxy of every row."""
    return rows.sum(1), np.einsum("ij,ij->i", rows, rows), np.einsum("ij,j->i", rows, y)


def _positions(first: int, last: int, per_snapshot: int, most: int) -> Array:
    """Positions first … last, evenly spaced, on whole snapshots where not all of them are taken."""
    count = per_snapshot * (last - first) + 1
    if count <= most:
        return np.linspace(first, last, max(count, 0))
    return np.unique(np.linspace(first, last, most).round())


def _falls(t: Array, clock: Clock, width: float) -> _Shape:
    n = len(t)
    end = _positions(MIN_SNAPSHOTS, n - MIN_SNAPSHOTS, CORNERS, GRID)
    ahead = clock(np.interp(end, np.arange(n), t))[:, None] - clock(t)
    w = width * ahead[:, :1]
    rows = w * np.logaddexp(0, ahead / w) if width else np.maximum(ahead, 0)
    return _Shape(rows / rows.max(axis=1, keepdims=True), np.zeros_like(end), end)


def _unending(x: Array) -> _Shape:
    return _Shape((x[-1:] - x)[None] / (x[-1] - x[0]), np.zeros(1), np.array([np.nan]))


def _hinges(t: Array) -> _Shape:
    n = len(t)
    # The corner's own snapshot is still lazy, so it comes one earlier than a step.
    start = _positions(MIN_SNAPSHOTS - 1, n - 1 - MIN_SNAPSHOTS, CORNERS, GRID)
    rows = np.maximum(t - np.interp(start, np.arange(n), t)[:, None], 0)
    return _Shape(rows / rows.max(axis=1, keepdims=True), start, np.full_like(start, np.nan))


def _steps(n: int) -> _Shape:
    start = _positions(MIN_SNAPSHOTS, n - MIN_SNAPSHOTS, 1, GRID)
    return _Shape((np.arange(n) >= start[:, None]).astype(float), start, np.full_like(start, np.nan))


def _bursts(n: int) -> _Shape:
    """Bursts that end in view, with at least three snapshots of the lazy level after them."""
    grid = _positions(MIN_SNAPSHOTS, n - MIN_SNAPSHOTS, 1, BURST_GRID)
    i, j = np.nonzero(grid[None, :] - grid[:, None] >= MIN_SNAPSHOTS)
    start, end = grid[i], grid[j]
    index = np.arange(n)
    return _Shape(((index >= start[:, None]) & (index < end[:, None])).astype(float), start, end)


def _autocorrelation(blocks: list[_Block], y: Array) -> float:
    """AR(1) coefficient φ of the residuals of the best of all fits, in [0, 0.9].

    Successive velocities are correlated (the kernel drifts), and the BIC of n independent points finds
    breaks in such noise; for a level they are worth n (1 − φ)/(1 + φ) independent points. The best of all
    fits, as anything simpler would count a trend that it misses as correlation.
    """
    best = min(blocks, key=lambda block: float(block.rss.min()))
    e = best.residuals(int(best.rss.argmin()), y)
    phi = float(e[1:] @ e[:-1]) / (float(e @ e) + len(y) * NOISE_FLOOR**2)
    return min(max(phi + FITTED * (1 + phi) / len(y), 0.0), MAX_AUTOCORRELATION)
