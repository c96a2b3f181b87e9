"""The ledgers in the documents are what the committed raw values give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tangentlab.files import finite
from tangentlab.records import read_configs, read_study
from tangentlab.runs import check_same
from tangentlab.studies import judge_study, ledger, of_source
from tangentlab.studies.claims import PAPER
from tangentlab.studies.study import load_study

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "results" / "studies").glob("*/config.yaml"))


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return [judge_study(folder) for folder in FOLDERS]


def between(document: str, command: str) -> str:
    text = (ROOT / document).read_text()
    return text.partition(f"<!-- {command} -->\n")[2].partition("<!-- end -->")[0].strip()


def test_the_findings_are_the_ledger(found: list[dict[str, Any]]) -> None:
    assert between("docs/findings.md", "tangentlab study all") == ledger(found)


def test_the_readme_has_the_papers_claims(found: list[dict[str, Any]]) -> None:
    command = f"tangentlab study all --source '{PAPER}'"
    assert between("README.md", command) == ledger([of_source(study, PAPER) for study in found])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_is_committed_is_judged_from_the_values(folder: Path) -> None:
    committed = dict(read_study(folder).verdicts)
    assert committed.pop("environment")["commit"]
    assert committed == finite(judge_study(folder))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_is_committed_was_trained_as_the_study_trains_now(folder: Path) -> None:
    there = read_study(folder)
    kept, setting = read_configs(folder), there.config
    assert kept.keys() == {line["run"] for line in there.values}
    first = load_study(setting["study"]).runs(setting["tier"], setting["seeds"][:1])
    for run, config in first.items():
        if run in kept:
            precision = setting.get("precision", "fp32")
            check_same(kept[run]["config"], replace(config, precision=precision), folder / run)
