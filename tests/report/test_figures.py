"""What the figures say, against what was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from planted import Report

from tangentlab.metrics import kernel_distance
from tangentlab.records import Measurement, Run, read_run
from tangentlab.report import figures, write_report
from tangentlab.report.figure import (
    Axis,
    DotPanel,
    Dots,
    Figure,
    Line,
    LinePanel,
    MatrixPanel,
    Span,
    View,
    dot_limits,
    y_limits,
)
from tangentlab.report.subject import Subject, subjects
from tangentlab.report.table import what

# Records come every half epoch.
SNAPSHOT = 0.5


def _said(figure: Figure, run: str) -> str:
    return next(part.text for part in figure.finding.parts if part.run == run)


def _read(*folders: Path) -> list[Subject]:
    return subjects([read_run(folder) for folder in folders])


def test_accuracies_find_the_planted_collapse(report: Report) -> None:
    figure = figures.accuracies(report.subjects())
    assert figure.finding.state == "found"
    assert "collapse at epoch 11.2" in _said(figure, "fgsm") or "collapse at epoch 11.3" in _said(
        figure, "fgsm"
    )
    assert all("no collapse" in _said(figure, name) for name in ("standard", "pgd", "killed"))
    robust = figure.views[0].panels[-1]
    assert isinstance(robust, LinePanel)
    (mark,) = robust.marks
    assert mark.colour == 1
    assert abs(mark.x - planted.FGSM.collapse) <= SNAPSHOT
    assert [line.name for line in robust.lines] == ["standard", "fgsm", "pgd", "killed"]
    assert [len(line.x) for line in robust.lines] == [33, 33, 33, 13]  # the torn line is not read


@pytest.mark.parametrize(
    ("per_step", "zeros", "said"),
    [
        (None, 3, "collapse at step 4.5, PGD"),  # three evaluations
        (None, 2, "passing collapse at step 1.5, PGD"),
        (0.5, 4, "collapse at epoch 2.25, PGD"),  # one and a half epochs
        (0.5, 3, "passing collapse at epoch 0.75, PGD"),
    ],
)
def test_a_fall_that_lasts_is_told_before_one_that_does_not(
    per_step: float | None, zeros: int, said: str, tmp_path: Path
) -> None:
    with Run.create(tmp_path / "run") as run:
        for step, robust in enumerate([0.4, 0.4, 0.0, 0.4, 0.4, *[0.0] * zeros]):
            at = {} if per_step is None else {"epoch": step * per_step}
            run.write(Measurement(step, {**at, "fgsm_accuracy": 0.8, "robust_accuracy": robust}))
    told = figures.accuracies(_read(tmp_path / "run")).finding.parts[0].text
    assert told.startswith(said)


def test_gaps_find_the_planted_parting_before_the_fall(report: Report) -> None:
    figure = figures.gaps(report.subjects())
    panel = next(p for p in figure.panels if p.title == "fgsm")
    assert isinstance(panel, LinePanel)
    assert panel.y_axis.log
    parted, fell = panel.marks
    assert abs(parted.x - planted.FGSM.parting) <= SNAPSHOT
    assert abs(fell.x - planted.FGSM.collapse) <= SNAPSHOT
    assert f"parted at epoch {parted.x:.3g}" in _said(figure, "fgsm")
    assert f"{fell.x - parted.x:.2g} epochs after the parting" in _said(figure, "fgsm")
    assert "did not part" in _said(figure, "pgd")
    assert "did not fall" in _said(figure, "pgd")


def test_velocity_shades_the_planted_stages(report: Report) -> None:
    figure = figures.velocity(report.subjects())
    spans = {
        p.title: {span.label: span for span in p.spans} for p in figure.panels if isinstance(p, LinePanel)
    }
    assert set(spans["fgsm"]) == {"learning", "lazy", "again"}
    assert set(spans["pgd"]) == {"learning", "lazy"}
    assert spans["fgsm"]["lazy"].start == pytest.approx(planted.FGSM.lazy[0], abs=1)
    assert spans["fgsm"]["again"].start == pytest.approx(planted.FGSM.lazy[1], abs=1)
    assert "a third stage from epoch" in _said(figure, "fgsm")
    assert "no third stage" in _said(figure, "pgd")


def test_decisions_shade_the_cheap_phases(report: Report, tmp_path: Path) -> None:
    assert figures.decisions(report.subjects()).views == ()  # and no page speaks of it
    looks = [
        {"switch/phase": "full"},
        {"switch/phase": "full", "switch/velocity": 0.5, "switch/lazy_below": 0.1},
        {"switch/phase": "cheap", "switch/velocity": 0.05, "switch/reason": "it fell"},
        {"switch/phase": "cheap", "switch/robust_accuracy": 0.4, "switch/least_robust_accuracy": 0.3},
        {"switch/phase": "full", "switch/robust_accuracy": 0.2, "switch/reason": "it " + "broke " * 30},
        {"switch/phase": "idle"},
        {"switch/phase": "cheap", "switch/reason": "again"},
    ]
    with Run.create(
        tmp_path / "run", {"name": "mine", "method": "pgd", "switch": {"to": {"name": "atta"}}}
    ) as run:
        for step, look in enumerate(looks):
            run.write({"step": step, "epoch": step / 2, **look})
        run.write({"step": 8, "epoch": 4.0, "train_loss": 1.0})
    subject = subjects([read_run(tmp_path / "run")])
    figure = figures.decisions(subject)
    velocity, accuracy = figure.panels
    assert velocity.spans == accuracy.spans == (Span(1.0, 2.0, "cheap"), Span(3.0, 4.0, "cheap"))
    assert [mark.x for mark in velocity.marks] == [1.0, 2.0, 3.0]
    assert [line.name for line in velocity.lines] == ["velocity", "lazy below"]
    assert [line.name for line in accuracy.lines] == ["robust accuracy", "least allowed"]
    assert figure.finding.state == "found"
    said = figure.finding.parts[0].text
    assert said.startswith("to the cheaper method at epoch 1, as it fell; back at epoch 2, as it broke")
    assert len(said) < 250
    assert what(subject[0]) == "pgd → atta"
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "What the switch decided" in page
    assert "What the switch decided" not in report.html.read_text()


def test_the_alarm_is_drawn_beside_what_it_warns_of(report: Report, tmp_path: Path) -> None:
    assert figures.alarm(report.subjects()).views == ()
    shares = [0.9, 0.8, 0.9, 0.3, 0.2, 0.2, 0.9]
    raised = [False, False, False, False, True, True, False]
    with Run.create(tmp_path / "run", {"name": "mine", "method": "fgsm"}) as run:
        for step, (share, answer) in enumerate(zip(shares, raised, strict=True)):
            run.write(
                {
                    "step": step,
                    "epoch": step / 2,
                    "alarm/share": share,
                    "alarm/threshold": 0.5,
                    "alarm/raised": answer,
                    "fgsm_accuracy": 0.8,
                    "robust_accuracy": 0.6 if step < 6 else 0.0,
                }
            )
    subject = subjects([read_run(tmp_path / "run")])
    figure = figures.alarm(subject)
    (panel,) = figure.panels
    assert [line.name for line in panel.lines] == ["one look", "threshold"]
    assert panel.lines[0].y == tuple(shares)
    assert panel.spans == (Span(2.0, 3.0, "raised"),)
    assert [mark.x for mark in panel.marks] == [2.0, 2.75]
    assert figure.finding.state == "found"
    said = figure.finding.parts[0].text
    assert said == "the alarm spoke at epoch 2; robust accuracy fell at epoch 2.75, 0.75 epochs later"
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "The alarm spoke in mine at epoch 2." in page


def test_distances_are_those_of_the_kernels(report: Report) -> None:
    figure = figures.distances(report.subjects())
    assert [view.label for view in figure.views] == ["clean", "FGSM", "PGD"]
    panel = figure.views[2].panels[1]
    assert isinstance(panel, MatrixPanel)
    assert panel.title == "fgsm"
    assert panel.x == tuple(i / 2 for i in range(33))
    record = read_run(report.runs[1])
    steps = record.kernel_steps()
    i, j = 3, 25
    kernels = [record.kernels(steps[k])["pgd/class"] for k in (i, j)]
    assert panel.frames[0][i][j] == pytest.approx(float(kernel_distance(*kernels).mean()))


def test_snapshots_are_thinned_and_diverged_kernels_left_out(tmp_path: Path) -> None:
    with Run.create(tmp_path / "long") as run:
        for step in range(200):
            kernel = torch.eye(3) + step / 200
            if step > 180:
                kernel = kernel * torch.nan
            run.write(Measurement(step, {}, {"clean/trace": kernel}))
    (panel,) = figures.distances(_read(tmp_path / "long")).panels
    assert isinstance(panel, MatrixPanel)
    assert len(panel.x) < 80
    assert max(panel.x) <= 180
    assert np.isfinite(panel.frames[0]).all()


def test_ranks_and_spectrum_are_drawn_as_recorded(report: Report) -> None:
    runs = report.subjects()
    ranks = figures.ranks(runs)
    assert [view.label for view in ranks.views] == ["entropy rank", "participation ratio"]
    panel = ranks.views[0].panels[1]
    assert isinstance(panel, LinePanel)
    assert [line.style for line in panel.lines] == ["solid", "dash", "dot"]
    assert panel.lines[2].y == runs[1].curve("kernel/pgd/class/entropy_rank").y

    spectrum = figures.spectrum(runs)
    panel = spectrum.views[0].panels[0]
    assert isinstance(panel, LinePanel)
    assert len(panel.lines) == 6
    ends = [line.y[-1] for line in panel.lines]
    assert ends == sorted(ends, reverse=True)


def test_specialization_follows_one_slider(report: Report) -> None:
    figure = figures.specialization(report.subjects())
    assert figure.slider is not None
    assert figure.slider.label == "epoch"
    assert figure.slider.positions == tuple(i / 2 for i in range(33))
    panels = [p for p in figure.views[0].panels if isinstance(p, MatrixPanel)]
    assert [p.title for p in panels] == ["standard", "fgsm", "pgd", "killed"]
    assert panels[0].frame_at == tuple(range(33))
    assert panels[3].frame_at == (*range(13), *[12] * 20)  # stays at what the killed run last saw
    assert "4 of 4 class kernels align best with their own class at the end" in _said(figure, "pgd")


def test_specialization_of_epochs_and_steps_goes_by_snapshot(report: Report, tmp_path: Path) -> None:
    with Run.create(tmp_path / "steps") as run:
        for step in (0, 10, 20):
            run.write(
                Measurement(step, {"kernel/clean/class/specialization_matrix": [[2.0, 0.0], [0.0, 2.0]]})
            )
    figure = figures.specialization(_read(report.runs[0], tmp_path / "steps"))
    assert figure.slider is not None
    assert figure.slider.label == "snapshot"
    panel = next(p for p in figure.views[0].panels if p.title == "steps")
    assert isinstance(panel, MatrixPanel)
    assert panel.frame_at == (0, 1, *[2] * 31)


def test_many_classes_get_fewer_frames(tmp_path: Path) -> None:
    matrix = np.ones((100, 100)).tolist()
    with Run.create(tmp_path / "wide") as run:
        for step in range(12):
            run.write(Measurement(step, {"kernel/clean/class/specialization_matrix": matrix}))
    (panel,) = figures.specialization(_read(tmp_path / "wide")).panels
    assert isinstance(panel, MatrixPanel)
    assert len(panel.frames) == 6
    assert panel.moments[0] == 0
    assert panel.moments[-1] == 11


def test_movement_compares_inputs_crafted_anew_and_once(report: Report) -> None:
    figure = figures.movement(report.subjects())
    panel = figure.views[0].panels[1]
    assert isinstance(panel, LinePanel)
    anew, once = (line.y[-1] for line in panel.lines)
    assert f"({100 * (once / anew - 1):+.0f}%)" in _said(figure, "fgsm")


def test_what_is_not_recorded_is_said(tmp_path: Path) -> None:
    runs = _read(planted.write_empty(tmp_path / "empty"))
    for make in figures.FIGURES:
        figure = make(runs)
        assert figure.views == ()
        assert figure.finding.state == "not recorded"
        assert figure.finding.missing


def test_a_foreign_run_over_steps(tmp_path: Path) -> None:
    runs = _read(planted.write_foreign(tmp_path / "foreign"))
    figure = figures.velocity(runs)
    (panel,) = figure.panels
    assert isinstance(panel, LinePanel)
    assert panel.x_axis.unit == "step"
    assert figures.ranks(runs).finding.state == "found"
    assert figures.accuracies(runs).finding.state == "not recorded"


def test_values_of_a_foreign_log_that_mean_nothing_are_left_out(tmp_path: Path) -> None:
    with Run.create(tmp_path / "odd") as run:
        for step, accuracy in ((0, 0.1), (2, 45.0), (1, 0.3), (1, 0.4), (3, "high"), (4, True)):
            run.write({"step": step, "robust_accuracy": accuracy})
    (run_,) = _read(tmp_path / "odd")
    curve = run_.curve("robust_accuracy")
    assert (curve.x, curve.y) == ((0, 1), (0.1, 0.4))


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    def label(*plans: tuple[str, str, int]) -> list[str]:
        folders = [tmp_path / f"{name.strip()[:4]}{seed}" / folder for folder, name, seed in plans]
        for folder, (_, name, seed) in zip(folders, plans, strict=True):
            if not folder.exists():
                Run.create(folder, {"name": name, "seed": seed}).close()
        return [run.label for run in _read(*folders)]

    assert label(("a", "pgd", 0), ("b", "fgsm", 0)) == ["pgd", "fgsm"]
    assert label(("a", "pgd", 0), ("b", "pgd", 1)) == ["pgd (seed 0)", "pgd (seed 1)"]
    assert label(("a", "pgd", 0), ("b", "pgd", 0)) == ["pgd in a", "pgd in b"]
    assert label(("a", "pgd", 0), ("a", "pgd", 0)) == ["pgd #1", "pgd #2"]
    (long,) = label(("a", "x" * 99 + "\n\x00", 0))
    assert long.isprintable()
    assert len(long) == 40


def test_accuracies_have_all_of_their_range_but_as_points() -> None:
    def limits(*labels: str) -> tuple[float, float]:
        line = Line("some", [1.0, 2.0], [0.7, 0.75], 0, labels=labels)
        panel = LinePanel("", Axis("cost"), Axis("accuracy", percent=True), (line,))
        return y_limits(Figure("key", "", "", views=(View("", (panel,)),)), panel)

    assert limits() == (-0.02, 1.02)
    low, high = limits("one", "another")
    assert 0.69 < low < 0.7 < 0.75 < high < 0.76


def test_no_interval_shows_less_than_nothing_or_more_than_all() -> None:
    def limits(quantity: Axis) -> tuple[float, float]:
        dots = Dots("some", 0, 0, {"3": 0.1, "4": 0.9}, 0.5, (-0.6, 1.6))
        panel = DotPanel("", quantity, Axis("method"), ("pgd",), (dots,))
        return dot_limits(Figure("key", "", "", views=(View("", (panel,)),)), panel)

    assert limits(Axis("accuracy", percent=True)) == pytest.approx((-0.05, 1.05))
    assert limits(Axis("distance")) == pytest.approx((-0.6 - 0.11, 1.6 + 0.11))
