"""The table and the sentences at the top."""

from __future__ import annotations

from pathlib import Path

import planted
from planted import Report

from tangentlab.records import read_run
from tangentlab.report.subject import subjects
from tangentlab.report.summary import summary
from tangentlab.report.table import table


def test_evaluated_runs_show_test_accuracies_with_n_and_interval(report: Report) -> None:
    fgsm = table(report.subjects())[1]
    assert [cell.value for cell in fgsm.last] == ["91.7%", "83.3%", "3.1%"]
    assert fgsm.last[2].notes == ("1.7–5.4", "n 360")
    assert fgsm.last[2].settings == "PGD: eps 0.25, step_size 0.0625, num_steps 50, num_restarts 10"
    assert fgsm.state == "finished"
    assert fgsm.what == "fgsm · digits · small_cnn · seed 0"
    assert fgsm.cost == "80"
    assert fgsm.train_time == "8.0 s"
    assert fgsm.probe_share == "5%"
    assert fgsm.collapse.startswith("epoch 11.")


def test_a_killed_run_shows_how_far_it_came_and_validation_accuracies(report: Report) -> None:
    killed = table(report.subjects())[3]
    assert killed.state == "killed"
    assert killed.progress == "6 of 16 epochs"
    robust = report.subjects()[3].curve("robust_accuracy").y
    assert killed.best[2].value == f"{max(robust):.1%}"
    assert killed.last[2].value == f"{robust[-1]:.1%}"
    assert killed.last[2].notes == ("validation",)


def test_an_empty_run_and_a_foreign_one_have_rows(tmp_path: Path) -> None:
    folders = [planted.write_empty(tmp_path / "empty"), planted.write_foreign(tmp_path / "foreign")]
    runs = subjects([read_run(folder) for folder in folders])
    empty, foreign = table(runs)
    assert [cell.value for cell in empty.best] == ["–"] * 3
    assert empty.collapse == "not recorded"
    assert foreign.progress == "360 steps"
    assert summary(runs)[1].startswith("Catastrophic overfitting cannot be told")


def test_the_summary_says_collapse_parting_and_stages(report: Report) -> None:
    state, collapse, parting, stages = summary(report.subjects())
    assert state == "3 of 4 runs are finished; not finished: killed (killed, 6 of 16 epochs)."
    assert collapse.startswith("Catastrophic overfitting: fgsm at epoch 11.")
    assert collapse.endswith("the other 3 runs did not.")
    assert "parted in fgsm at epoch 9." in parting
    assert "before the fall" in parting
    assert stages == "The kernel became lazy in standard, fgsm, pgd and killed; it moved again in fgsm."
