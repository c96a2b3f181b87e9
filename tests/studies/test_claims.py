"""Verdicts follow from where the interval lies."""

from __future__ import annotations

import pytest

from tangentlab.errors import ConfigError
from tangentlab.studies.claims import Claim, judge, ledger

ABOVE = Claim("test/above", "It exceeds 1.", "effect", 1.0)
BELOW = Claim("test/below", "It stays below 1.", "effect", 1.0, above=False)


@pytest.mark.parametrize(
    ("values", "above", "below"),
    [
        ([2.0, 2.1, 1.9], "supported", "refuted"),
        ([0.2, 0.1, 0.3], "refuted", "supported"),
        ([2.0, 0.1, 1.9], "inconclusive", "inconclusive"),
        ([2.0, 2.0], "inconclusive", "inconclusive"),  # too few seeds
        ([2.0], "inconclusive", "inconclusive"),
        ([], "inconclusive", "inconclusive"),
    ],
)
def test_the_interval_decides(values: list[float], above: str, below: str) -> None:
    by_seed = dict(enumerate(values))
    assert judge(ABOVE, "here", by_seed).verdict == above
    assert judge(BELOW, "here", by_seed).verdict == below


def test_the_interval_is_students() -> None:
    found = judge(ABOVE, "here", {2: 3.0, 0: 1.0, 1: 2.0})
    assert found.effect == 2.0
    assert found.interval == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert list(found.values) == [0, 1, 2]


def test_the_ledger_has_a_row_a_claim() -> None:
    values = {0: 2.0, 1: 2.1, 2: 1.9}
    studies = [{"claims": [judge(claim, "here", values).as_dict()]} for claim in (ABOVE, BELOW)]
    rows = ledger(studies).splitlines()
    assert rows[2] == "| It exceeds 1. | here | 2 [1.75, 2.25] | > 1 | 3 | supported |"
    assert rows[3].endswith("| < 1 | 3 | refuted |")
    with pytest.raises(ConfigError, match="there is no study"):
        ledger([])
