"""One report on four runs, made once: standard, FGSM that collapses, PGD, and a PGD run killed on the way."""

from __future__ import annotations

import planted
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
