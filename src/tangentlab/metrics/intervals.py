"""Intervals: Wilson's for a proportion, Student's for a mean over seeds, the jackknife's for its functions.

Wilson (1927), "Probable inference, the law of succession, and statistical inference", eq. 2. Rao & Scott
(1992), "A simple method for the analysis of clustered binary data". Student (1908), "The probable error of a
mean".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

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
    _check_confidence(confidence)
    return _wilson(correct / n, n, NormalDist().inv_cdf((1 + confidence) / 2))


def clustered_wilson_interval(clusters: Sequence[Sequence[bool]], confidence: float = 0.95) -> Interval:
    """Wilson's interval where trials come in clusters that may agree, such as the runs of a seed.

    That of n/d trials with the same proportion p. Of m clusters, n trials in all and x_k successes in the
    n_k of cluster k, the design effect d is the variance of p between clusters,
    m/(m − 1) Σ_k (x_k − n_k p)² / n², over that of independent trials, p (1 − p)/(n − 1): at least 1, and 1
    where all trials agree. Where it is more, Student's quantile with m − 1 degrees of freedom stands for the
    normal one.

    Args:
        clusters: at least 2, of at least 1 trial each.
        confidence: in (0, 1).

    Raises:
        ConfigError: too few clusters or trials, confidence out of range.

    >>> clustered_wilson_interval([[True, False]] * 50) == wilson_interval(50, 100)
    True
    >>> low, high = clustered_wilson_interval([[True] * 2, [False] * 2] * 25)
    >>> round(low, 4), round(high, 4)
    (0.3627, 0.6373)
    """
    if len(clusters) < 2:
        raise ConfigError(f"m={len(clusters)} clusters; what lies between them takes at least 2")
    if not all(clusters):
        raise ConfigError("a cluster has no trial")
    _check_confidence(confidence)
    m, n, correct = len(clusters), sum(map(len, clusters)), sum(map(sum, clusters))
    between = m * (n - 1) * sum((n * sum(own) - len(own) * correct) ** 2 for own in clusters)
    by_chance = (m - 1) * n**2 * correct * (n - correct)
    if between <= by_chance:  # integers: clusters of one trial are independent trials, to the last digit
        return wilson_interval(correct, n, confidence)
    return _wilson(correct / n, n * by_chance / between, _student_quantile(m - 1, confidence))


def _wilson(p: float, n: float, quantile: float) -> Interval:
    shrink = 1 + quantile**2 / n
    middle = (p + quantile**2 / (2 * n)) / shrink
    half = quantile * (p * (1 - p) / n + quantile**2 / (4 * n**2)) ** 0.5 / shrink
    # At the ends the formula gives 0 and 1 up to rounding.
    return Interval(0.0 if p == 0 else middle - half, 1.0 if p == 1 else middle + half)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """x̄ ± t s/√n: the interval of the mean of independent values, such as one a seed.

    s is the sample standard deviation (n − 1) and t the two-sided Student quantile with n − 1 degrees of
    freedom: 12.7 for two values, 4.3 for three. Of accuracies the ends may lie outside [0, 1].

    Args:
        values: at least 2, finite.
        confidence: in (0, 1).

    Raises:
        ConfigError: too few values, one that is not finite, confidence out of range.

    >>> low, high = mean_interval([1.0, 2.0, 3.0])
    >>> round(low, 4), round(high, 4)
    (-0.4841, 4.4841)
    """
    n = len(values)
    if n < 2:
        raise ConfigError(f"n={n} values; an interval of their mean takes at least 2")
    for value in values:
        if not math.isfinite(value):
            raise ConfigError(f"the value {value} is not finite")
    _check_confidence(confidence)
    half = _student_quantile(n - 1, confidence) * stdev(values) / math.sqrt(n)
    mean = fmean(values)
    return Interval(mean - half, mean + half)


def jackknife(
    function: Callable[..., Tensor], *groups: Tensor, confidence: float = 0.95
) -> tuple[Tensor, Tensor, Tensor]:
    """A smooth function of means over independent groups: its value, and the ends of its interval.

    The mean of the pseudo-values g·f(x̄) − (g − 1)·f(x̄ without group i), less biased than f(x̄), and
    their Student interval (Tukey 1958; Efron & Tibshirani 1993, chapter 11).

    Args:
        function: of as many tensors as there are ``groups``; a tensor of any shape.
        groups: [g, ...] each, of one g ≥ 2: the function gets their means over the first axis, with and
            without the same group of all of them.
        confidence: in (0, 1).

    Raises:
        ConfigError: fewer than two groups, or not as many of all; confidence out of range.

    >>> x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> value, low, high = jackknife(lambda mean: mean.square(), x)  # 4, less the variance of the mean, 1/3
    >>> round(value.item(), 4), low.item() < value.item() < high.item()
    (3.6667, True)
    """
    g = len(groups[0])
    if g < 2 or any(len(group) != g for group in groups):
        raise ConfigError(f"groups of {', '.join(str(len(x)) for x in groups)}; the same number, at least 2")
    _check_confidence(confidence)
    sums = [group.sum(0) for group in groups]
    whole = function(*(total / g for total in sums))
    without = torch.stack(
        [
            function(*((total - group[i]) / (g - 1) for total, group in zip(sums, groups, strict=True)))
            for i in range(g)
        ]
    )
    pseudo = g * whole - (g - 1) * without
    half = _student_quantile(g - 1, confidence) * pseudo.std(0) / math.sqrt(g)
    value = pseudo.mean(0)
    return value, value - half, value + half


def _student_quantile(freedom: int, confidence: float) -> float:
    from scipy.special import stdtrit  # slow to import

    return float(stdtrit(freedom, (1 + confidence) / 2))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence} is out of range; choose between 0 and 1, such as 0.95")
