"""The examples run as they stand, and show what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tangentlab.records import read_run

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_writes_a_run_and_a_report(name: str, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / name, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    record = read_run(tmp_path / "run")
    assert record.series("kernel/clean/class/velocity")[1]
    assert (tmp_path / "run" / "report.html").stat().st_size > 1e6


def test_the_probes_part_of_a_foreign_loop_is_ten_lines() -> None:
    text = (EXAMPLES / "probe_in_your_loop.py").read_text()
    assert [n for n in range(1, 20) if f"# {n}\n" in text] == list(range(1, 11))
