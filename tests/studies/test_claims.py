"""Verdicts follow from where the interval lies."""

from __future__ import annotations

import pytest

from tangentlab.errors import ConfigError
from tangentlab.studies.claims import Claim, judge, ledger, of_source

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


def test_the_ledger_has_a_table_a_setting_and_a_row_a_claim() -> None:
    values = {0: 2.0, 1: 2.1, 2: 1.9}
    found = [judge(ABOVE, "here", values), judge(BELOW, "here", values), judge(ABOVE, "there", {})]
    studies = [{"study": "mine", "claims": [verdict.as_dict() for verdict in found]}]
    here, there = ledger(studies).split("\n\n**")
    rows = here.splitlines()
    assert rows[0] == "**mine** on here"
    assert rows[4] == "| It exceeds 1. | 2 [1.75, 2.25] | > 1 | 3 | supported |"
    assert rows[5].endswith("| < 1 | 3 | refuted |")
    assert there.splitlines()[-1] == "| It exceeds 1. | – | > 1 | 0 | inconclusive |"
    with pytest.raises(ConfigError, match="there is no claim"):
        ledger([])
    with pytest.raises(ConfigError, match="there is no claim"):
        ledger([of_source(study, "nobody's") for study in studies])
    assert ledger([of_source(study, "this proj") for study in studies]) == ledger(studies)
