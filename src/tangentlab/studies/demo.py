"""The demo: one small network trained three ways on real images, its kernel watched, a report to read.

Shown: single-step adversarial training overfits catastrophically, the kernels on FGSM and on PGD inputs part
as it does, and the alarm speaks before; with PGD training nothing of this happens. One seed; two minutes at
most on two cores. How often over seeds: benchmarks/demo_seeds.py.
"""

from __future__ import annotations

from pathlib import Path

from tangentlab.records import RunRecord, read_run
from tangentlab.report import write_report
from tangentlab.runs import RunConfig, check_outcomes, load_config, train_many
from tangentlab.runs.hooks import Display

METHODS = ("standard", "fgsm", "pgd")


def demo_config(method: str, seed: int = 0) -> RunConfig:
    """The shipped digits configuration with one of :data:`METHODS`; all else is equal."""
    overrides = ["--method", method, "--name", method, "--seed", str(seed)]
    if method != "standard":
        overrides += ["--method.buffer_updates", "[loss]", "--alarm.every", "20"]
    return load_config("digits", overrides)


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    display: Display | None = None,
) -> tuple[list[RunRecord], Path]:
    """Train the three runs into out/runs/ and write out/report.html; returns the runs and the report.

    What ``out`` holds of them already is kept: finished runs as they are, the others go on.
    """
    runs = {out / "runs" / method: demo_config(method, seed) for method in METHODS}
    check_outcomes(train_many(runs, display=display))
    return [read_run(folder) for folder in runs], write_report(list(runs), out / "report.html")


def free_folder(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that does not exist yet."""
    number, free = 2, folder
    while free.exists():
        free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return free
