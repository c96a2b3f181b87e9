"""The page and the files beside it: whole, reproducible, and deaf to what run folders try to say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import planted
import plotly.graph_objects as go
import pytest
from planted import Report

from tangentlab.errors import RunFolderError
from tangentlab.records import Measurement, Run
from tangentlab.report import write_report
from tangentlab.report.figures import FIGURES
from tangentlab.report.interactive import specifications
from tangentlab.report.paper import write_paper_figure

KEYS = ("accuracies", "gaps", "velocity", "distances", "ranks", "spectrum", "specialization", "movement")
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>${7*7}{{7*7}}%{x}$_$"


def test_every_figure_lies_beside_the_page(report: Report) -> None:
    folder = report.html.parent / "figures"
    assert {path.name for path in folder.iterdir()} == {
        f"{key}.{kind}" for key in KEYS for kind in ("svg", "pdf")
    }
    html = report.html.read_text()
    for key in KEYS:
        ElementTree.parse(folder / f"{key}.svg")
        pdf = (folder / f"{key}.pdf").read_bytes()
        assert b"/CIDFontType2" in pdf or b"/TrueType" in pdf  # TrueType, embedded
        assert b"/FontFile2" in pdf
        assert f'href="figures/{key}.svg"' in html


def test_paper_figures_reproduce_byte_for_byte(report: Report, tmp_path: Path) -> None:
    for make in FIGURES:
        if make.__name__ in ("gaps", "specialization"):
            write_paper_figure(make(report.subjects()), tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (report.html.parent / "figures" / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_plotly_accepts_every_specification(report: Report) -> None:
    for make in FIGURES:
        for view in specifications(make(report.subjects())):
            for spec in view:
                go.Figure(data=spec["data"], layout=spec["layout"])


def test_the_page_asks_for_nothing(report: Report) -> None:
    html = report.html.read_text()
    page = re.sub(r"<script>/\*\*\n\* plotly.*?</script>", "", html, flags=re.DOTALL)
    assert html.count("* plotly.js v") == 1
    assert len(page) < 1_500_000
    assert not re.search(r"https?://", page)
    assert all(
        link.startswith(("#", "figures/", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)', page)
    )
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_names_from_a_run_folder_stay_text(tmp_path: Path) -> None:
    with Run.create(
        tmp_path / "evil", {"name": EVIL, "method": {"name": EVIL}, "note": "</pre>" + EVIL}
    ) as run:
        for step in range(10):
            values = {
                f"kernel/{EVIL.replace('/', '')}/class/entropy_rank": 2.0 + step,
                "kernel/clean/class/entropy_rank": 2.0,
                "kernel/clean/class/top_eigenvalues": [2.0, "1", None],
                "kernel/clean/class/specialization_matrix": [[1.0], [2.0, 3.0]],
                "robust_accuracy": 0.1,
            }
            run.write(Measurement(step, values))
        run.write_status(state="failed", step=9, message=EVIL + "\ud800")
    html = write_report([tmp_path / "evil"], tmp_path / "report.html").read_text()
    assert "<script>alert" not in html
    assert "<img" not in html.split("* plotly.js v")[0]
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    assert "<" not in data[1]
    json.loads(data[1])
    for svg in (tmp_path / "figures").glob("*.svg"):
        ElementTree.parse(svg)


def test_runs_that_hold_little_make_a_page(tmp_path: Path) -> None:
    folders = [
        planted.write_foreign(tmp_path / "foreign"),
        planted.write_empty(tmp_path / "empty"),
        planted.write(tmp_path / "bare", planted.Plan("bare", "pgd", kernels=False)),
    ]
    html = write_report(folders, tmp_path / "out" / "report.html").read_text()
    assert "No run kept two snapshots" in html
    assert not (tmp_path / "out" / "figures" / "distances.svg").exists()


def test_a_report_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="none was given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(RunFolderError, match="not a folder"):
        write_report([tmp_path / "absent"], tmp_path / "report.html")


def test_importing_the_room_loads_no_plotting() -> None:
    heavy = ("plotly", "matplotlib", "jinja2")
    code = f"import sys, tangentlab.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
