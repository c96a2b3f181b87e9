"""Thresholds, alarms and areas against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tangentlab.errors import ConfigError
from tangentlab.metrics import alarm_threshold, detection_area, first_alarm


def test_the_threshold_keeps_the_false_alarms() -> None:
    draws = np.random.default_rng(0)
    quiet = [draws.normal(size=30) for _ in range(40)]
    for share in (0.0, 0.05, 0.1, 0.5):
        threshold = alarm_threshold(quiet, false_alarms=share)
        speaking = [first_alarm(range(30), scores, threshold) is not None for scores in quiet]
        assert sum(speaking) == round(share * 40)
        lower = np.nextafter(threshold, -np.inf)
        assert sum(first_alarm(range(30), scores, lower) is not None for scores in quiet) == sum(speaking) + 1


def test_an_alarm_is_the_first_score_above() -> None:
    assert first_alarm([5, 6, 9], [1.0, 1.0, 2.0], 1.0) == 9.0
    assert first_alarm([5, 6, 9], [1.0, 1.0, 2.0], 2.0) is None


def test_the_area_is_the_roc_curves() -> None:
    draws = np.random.default_rng(1)
    events, quiet = draws.integers(0, 6, 17) + 1.0, draws.integers(0, 6, 23) + 0.0
    expected = roc_auc_score([1] * 17 + [0] * 23, np.concatenate([events, quiet]))
    assert detection_area(list(events), list(quiet)) == pytest.approx(expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match=r"false_alarms=1.0 is out of range"):
        alarm_threshold([[1.0]], false_alarms=1.0)
    with pytest.raises(ConfigError, match="at least one run"):
        alarm_threshold([])
    with pytest.raises(ConfigError, match="0 and 1 were given"):
        detection_area([], [1.0])
    with pytest.raises(ConfigError, match="scores"):
        first_alarm([1, 2], [1.0, float("nan")], 0.5)
