"""Stages of training, read off a velocity curve: fast kernel learning, a lazy stage, learning again.

Fort et al. (2020, arXiv 2010.15110) see two stages under standard training; the third, under adversarial
training, is what "Rethinking Adversarial Training with Neural Tangent Kernel" (arXiv 2312.02236) claims.
Whether a curve has them is decided here by the evidence of segmented curves, in ``_segmented``, with the
noise, its autocorrelation and the position of every change point accounted for.

A stage is claimed if the posterior probability that there is one, of three snapshots or more and at least 1.5
times the lazy level, is 0.95. Otherwise its fields are None; the probability says how open the question is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tangentlab.errors import ConfigError
from tangentlab.metrics._checks import Curve, as_curve, as_times
from tangentlab.metrics._segmented import (
    AGAIN,
    ALL_THREE,
    DECLINING,
    FLAT,
    LAZY,
    MODELS,
    Array,
    Candidates,
    weigh,
)
from tangentlab.metrics.intervals import Interval

# The richest model has three coefficients, two change points and a noise level; with fewer points than this
# it fits whatever it sees.
MIN_POINTS = 8

# One false claim in twenty where both answers were equally likely before.
CLAIM_PROBABILITY = 0.95

# A long curve makes any wiggle significant; half as fast again is the least that deserves to be called a
# stage, and about what the noise of a velocity over a small probe set comes to.
CLAIM_RATIO = 1.5


@dataclass(frozen=True)
class Stages:
    """What a velocity curve says about the stages of training; times in the unit of the curve.

    Attributes:
        points: snapshots of the curve; below 8 nothing is concluded and everything else is None or empty.
        end: the last time.
        credibility: of the intervals, which are widened by one snapshot on either side, as nothing is seen
            in between.
        learning_end: end of fast kernel learning (posterior median), and its interval.
        lazy: start and end of the lazy stage. It starts with the curve where a third stage but no learning
            stage is established.
        third_start: start of the third stage, and its interval; third_end: its end, None if not in view.
        learning_ratio: first velocity over the lazy level; level_ratio: highest velocity of the third stage
            over the lazy level (posterior medians).
        learning_probability: that there is a learning stage which ends in a lazy one, third_probability: that
            the kernel learns again after a lazy stage, lazy_probability: that either holds. A curve that is
            flat throughout has no stages. Each stage of at least 1.5 times the lazy level.
        probabilities: of the models "flat", "declining", "decline, lazy", "lazy, again" and "decline, lazy,
            again", whatever their ratios, given that one of them is true.
        autocorrelation: AR(1) coefficient of the residuals of the log velocity.
    """

    points: int
    end: float | None = None
    credibility: float = 0.9
    learning_end: float | None = None
    learning_end_interval: Interval | None = None
    learning_ratio: float | None = None
    lazy: Interval | None = None
    third_start: float | None = None
    third_start_interval: Interval | None = None
    third_end: float | None = None
    level_ratio: float | None = None
    learning_probability: float | None = None
    lazy_probability: float | None = None
    third_probability: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    autocorrelation: float | None = None

    def describe(self, unit: str = "epoch") -> str:
        """One sentence in plain English, with probabilities and intervals."""
        if not self.probabilities:
            return (
                f"Too few points to tell stages apart: {self.points}, and at least {MIN_POINTS} are needed."
            )
        sentence = f"{self._first(unit)}; {self._third(unit)}."
        return sentence[0].upper() + sentence[1:]

    def _first(self, unit: str) -> str:
        if self.learning_end is not None and self.lazy is not None:
            return (
                f"fast kernel learning until {unit} {_time(self.learning_end)} "
                f"({self._within(self.learning_end_interval)}probability {self.learning_probability:.2f}), "
                f"then a lazy stage until {unit} {_time(self.lazy.high)}"
            )
        if self.lazy is not None:
            return (
                f"a lazy stage until {unit} {_time(self.lazy.high)}, with no learning stage established "
                f"before it (probability {self.learning_probability:.2f})"
            )
        likeliest = max(self.probabilities, key=lambda model: self.probabilities[model])
        chance = f"(probability {self.probabilities[likeliest]:.2f})"
        if likeliest == FLAT:
            return f"no stages: velocity is most likely flat {chance}"
        if likeliest == DECLINING:
            return (
                f"velocity is most likely still declining at {unit} {_time(self.end)} {chance}, not lazy yet"
            )
        return f"no lazy stage is established (probability {self.lazy_probability:.2f})"

    def _third(self, unit: str) -> str:
        if self.third_start is None:
            return f"no third stage (probability {self.third_probability:.2f})"
        until = f", until {unit} {_time(self.third_end)}" if self.third_end is not None else ""
        return (
            f"a third stage from {unit} {_time(self.third_start)} ({self._within(self.third_start_interval)}"
            f"probability {self.third_probability:.2f}), {self.level_ratio:.1f} times as fast as the lazy "
            f"one{until}"
        )

    def _within(self, interval: Interval | None) -> str:
        if interval is None:
            return ""
        return f"{self.credibility:.0%} interval {_time(interval.low)} to {_time(interval.high)}, "


def find_stages(times: Curve, velocity: Curve, *, credibility: float = 0.9) -> Stages:
    """Segment a velocity curve into stages, or say that it has none.

    The log velocity is ℓ, plus a fall before τ1 and a rise from τ2 on, each with shapes of its own (see
    ``_segmented``), or declines to the end, or is flat. All change points are tried; models are weighed by
    BIC with n (1 − φ)/(1 + φ) points, φ the autocorrelation of the residuals.

    A learning rate that decays makes a velocity per step decline too: pass the angle per unit of summed
    learning rate beside it, and compare. A warm-up, or a drop of the learning rate halfway, follows none of
    these curves and leaves the question open: pass the part before or after it.

    Args:
        times: end points [n] of the intervals over which velocity was taken, in epochs or steps since the
            start of training, increasing. Power laws take that start as their origin.
        velocity: angle per step [n], not negative. Zeros, whose log is −∞, are raised to the smallest
            positive value: the kernel moved less than was resolved.
        credibility: of the intervals, in (0, 1).

    Returns:
        :class:`Stages`; with fewer than 8 points it concludes nothing and says so.

    Raises:
        ConfigError: lengths differ, values out of range, times that do not increase, no positive velocity.

    >>> epochs = list(range(1, 31))
    >>> decline_then_flat = [max(0.5 ** (t / 2), 0.03) for t in epochs]
    >>> print(find_stages(epochs, decline_then_flat).describe())
    Fast kernel learning until epoch 10.2 (90% interval 9 to 11.2, probability 1.00), \
then a lazy stage until epoch 30; no third stage (probability 0.00).
    """
    if not 0 < credibility < 1:
        raise ConfigError(f"credibility={credibility} is out of range; choose between 0 and 1, such as 0.9")
    v = as_curve(velocity, "velocity")
    t = as_times(times, "times", len(v))
    if bool((v < 0).any()):
        raise ConfigError(f"velocity holds {v.min():g}; velocities are not negative")
    if len(v) < MIN_POINTS:
        return Stages(points=len(v), credibility=credibility)
    if not v.any():
        raise ConfigError(f"velocity holds no positive value in {len(v)}; the kernel never moved")
    return _conclude(t, weigh(t, np.log(np.maximum(v, v[v > 0].min()))), credibility)


def _conclude(t: Array, found: Candidates, credibility: float) -> Stages:
    learned = found.of(LAZY, ALL_THREE) & (found.fall >= np.log(CLAIM_RATIO))
    again = found.of(AGAIN, ALL_THREE) & (found.rise >= np.log(CLAIM_RATIO))
    learning = found.probability(learned) >= CLAIM_PROBABILITY
    third = found.probability(again) >= CLAIM_PROBABILITY

    # Both change points from one joint posterior, so that the lazy stage between them keeps its length.
    both = learned & again
    learning_end = third_start = third_end = learning_ratio = level_ratio = None
    learning_interval = third_interval = None
    if learning:
        mask = both if third else learned
        learning_end, learning_interval = _locate(
            t, found.learning_end[mask], found.weight[mask], credibility
        )
        learning_ratio = float(np.exp(_quantile(found.fall[mask], found.weight[mask], 0.5)))
    if third:
        mask = both if learning else again
        third_start, third_interval = _locate(t, found.third_start[mask], found.weight[mask], credibility)
        level_ratio = float(np.exp(_quantile(found.rise[mask], found.weight[mask], 0.5)))
        # Halfway down the posterior, so that a burst has an end only if most of the evidence sees one.
        stop = _quantile(np.nan_to_num(found.third_end[mask], nan=np.inf), found.weight[mask], 0.5)
        third_end = _at(t, stop) if np.isfinite(stop) else None
    lazy = None
    if learning or third:
        lazy = Interval(
            float(t[0]) if learning_end is None else learning_end,
            float(t[-1]) if third_start is None else third_start,
        )
    return Stages(
        points=len(t),
        end=float(t[-1]),
        credibility=credibility,
        learning_end=learning_end,
        learning_end_interval=learning_interval,
        learning_ratio=learning_ratio,
        lazy=lazy,
        third_start=third_start,
        third_start_interval=third_interval,
        third_end=third_end,
        level_ratio=level_ratio,
        learning_probability=found.probability(learned),
        lazy_probability=found.probability(learned | again),
        third_probability=found.probability(again),
        probabilities={model: found.probability(found.of(model)) for model in MODELS},
        autocorrelation=found.autocorrelation,
    )


def _locate(t: Array, positions: Array, weight: Array, credibility: float) -> tuple[float, Interval]:
    """Posterior median and central interval of a change point, in time."""
    tail = (1 - credibility) / 2
    low, middle, high = (_quantile(positions, weight, q) for q in (tail, 0.5, 1 - tail))
    return _at(t, middle), Interval(_at(t, low - 1), _at(t, high + 1))


def _quantile(values: Array, weight: Array, q: float) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weight[order])
    k = int(np.searchsorted(cumulative, q * cumulative[-1]))
    return float(values[order[k]])


def _at(t: Array, position: float) -> float:
    return float(np.interp(position, np.arange(len(t)), t))


def _time(t: float | None) -> str:
    """Three digits, all of them from 1000 on."""
    if t is None:
        return "?"
    return f"{t:.0f}" if abs(t) >= 1000 else f"{t:.3g}"
