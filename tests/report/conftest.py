"""Reports made once: on four runs (standard, FGSM that collapses, PGD, a PGD run killed on the way), and on a
study's values.
"""

from __future__ import annotations

from pathlib import Path

import planted
import planted_study
import pytest

from tangentlab.report import write_report


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> planted.Report:
    folder = tmp_path_factory.mktemp("report")
    runs = [planted.write(folder / plan.name, plan) for plan in (planted.STANDARD, planted.FGSM, planted.PGD)]
    killed = planted.Plan("killed", "pgd", seed=3)
    runs.append(planted.write(folder / "killed", killed, finish=False, until=6))
    with open(runs[-1] / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 121, "epo')  # the kill came in the middle of a line
    return planted.Report(write_report(runs, folder / "out" / "report.html"), runs)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of which the values were kept and the runs were not."""
    folder = planted_study.write(tmp_path_factory.mktemp("studies") / "gap")
    write_report([folder], folder / "report.html")
    return folder
