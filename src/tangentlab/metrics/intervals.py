"""Wilson's interval for a proportion, such as an accuracy on n test points.

Wilson (1927), "Probable inference, the law of succession, and statistical inference", eq. 2.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

from tangentlab.errors import ConfigError


class Interval(NamedTuple):
    """Both ends, in the unit of what they bound."""

    low: float
    high: float


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> Interval:
    """The proportions p with |correct/n − p| ≤ z √(p (1 − p)/n), z the two-sided normal quantile.

    Unlike p̂ ± z √(p̂ (1 − p̂)/n) it stays in [0, 1] and does not shrink to a point at 0 or n correct.

    Args:
        correct: successes, 0 to n.
        n: trials, at least 1.
        confidence: in (0, 1).

    Raises:
        ConfigError: a value out of range.

    >>> low, high = wilson_interval(100, 200)
    >>> round(low, 4), round(high, 4)
    (0.4314, 0.5686)
    """
    if n < 1:
        raise ConfigError(f"n={n} trials; an interval takes at least 1")
    if not 0 <= correct <= n:
        raise ConfigError(f"correct={correct} of n={n} trials; choose from 0 to {n}")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence} is out of range; choose between 0 and 1, such as 0.95")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, shrink = correct / n, 1 + z**2 / n
    middle = (p + z**2 / (2 * n)) / shrink
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / shrink
    # At the ends the formula gives 0 and 1 up to rounding.
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == n else middle + half
    return Interval(low, high)
