"""How well a curve warns of an event: thresholds, leads, false alarms, and the area under the ROC curve.

A run's curve speaks at the first time that it exceeds a threshold. A threshold is set on runs without the
event alone, so that it knows nothing of the outcome that it is to warn of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tangentlab.errors import ConfigError
from tangentlab.metrics._checks import Curve, as_curve, as_times


def first_alarm(times: Curve, scores: Curve, threshold: float) -> float | None:
    """The first time whose score exceeds the threshold; None where none does.

    >>> first_alarm([1, 2, 3], [0.1, 0.5, 0.2], 0.4)
    2.0
    """
    values = as_curve(scores, "scores")
    above = np.flatnonzero(values > threshold)
    return float(as_times(times, "times", len(values))[above[0]]) if len(above) else None


def alarm_threshold(quiet: Sequence[Curve], *, false_alarms: float = 0.05) -> float:
    """The least threshold that at most that share of the runs without the event ever exceeds.

    Args:
        quiet: the scores [T] of each such run.
        false_alarms: in [0, 1).

    Raises:
        ConfigError: no run, or ``false_alarms`` out of range.

    >>> alarm_threshold([[0.1, 0.3], [0.2, 0.1], [0.9, 0.0]], false_alarms=0.34)
    0.3
    """
    if not 0 <= false_alarms < 1:
        raise ConfigError(f"false_alarms={false_alarms} is out of range [0, 1)")
    if not quiet:
        raise ConfigError("a threshold needs at least one run without the event; none was given")
    highest = sorted(float(as_curve(scores, "scores").max()) for scores in quiet)
    allowed = math.floor(false_alarms * len(highest) + 1e-9)
    return highest[len(highest) - 1 - allowed]


def detection_area(events: Sequence[float], quiet: Sequence[float]) -> float:
    """The area under the ROC curve: how often an event's score lies above a quiet run's, ties counting half.

    Raises:
        ConfigError: one of the two is empty.

    >>> detection_area([3.0, 2.0], [1.0, 2.0])
    0.875
    """
    if not len(events) or not len(quiet):
        raise ConfigError(f"an area needs scores of both kinds; {len(events)} and {len(quiet)} were given")
    a, b = np.asarray(events, dtype=float)[:, None], np.asarray(quiet, dtype=float)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())
