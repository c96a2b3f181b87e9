"""The examples run as they stand, and show what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tangentlab.records import read_run

EXAMPLES = Path(__file__).parents[1] / "examples"


KERNEL, SPECTRUM = "kernel_of_your_model.py", "spectrum_of_a_large_model.py"
SWITCH = "lazy_switch_in_your_loop.py"
ALARM = "overfitting_alarm_in_your_loop.py"
RUNS = sorted({path.name for path in EXAMPLES.glob("*.py")} - {KERNEL, SPECTRUM, SWITCH, ALARM})


def ran(name: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernel_of_your_model_shows_its_plan(tmp_path: Path) -> None:
    output = ran(KERNEL, cwd=tmp_path)
    assert "kernel of" in output
    assert "route" in output


def test_the_spectrum_of_somebody_elses_model(tmp_path: Path) -> None:
    output = ran(SPECTRUM, "--small", cwd=tmp_path)
    found = {
        line.split()[0]: float(line.split()[1].rstrip(","))
        for line in output.splitlines()[1:]
        if line.startswith(("eigenvalue", "trace"))
    }
    assert found["trace"] / 40 < found["eigenvalue"] < found["trace"]  # Θ is 40 × 40


@pytest.mark.parametrize("name", RUNS)
def test_an_example_writes_a_run_and_a_report(name: str, tmp_path: Path) -> None:
    ran(name, str(tmp_path / "run"), cwd=tmp_path)
    record = read_run(tmp_path / "run")
    assert record.series("kernel/clean/class/velocity")[1]
    assert (tmp_path / "run" / "report.html").stat().st_size > 1e6


def test_the_switch_in_a_foreign_loop_turns_and_says_why(tmp_path: Path) -> None:
    output = ran(SWITCH, cwd=tmp_path)
    assert "cheap, as the kernel's velocity fell below" in output
    robust, steps = re.search(r"robust accuracy ([\d.]+)%; (\d+) attack steps", output).groups()
    assert float(robust) > 40  # of ten classes
    assert int(steps) < 9000
    text = (EXAMPLES / SWITCH).read_text()
    assert [n for n in range(1, 20) if f"# {n}\n" in text] == list(range(1, 7))


def test_the_alarm_in_a_foreign_loop_speaks_and_is_heeded(tmp_path: Path) -> None:
    output = ran(ALARM, cwd=tmp_path)
    alone, heeded = (float(x) for x in re.findall(r"(?:alone|alarm): robust accuracy ([\d.]+)%", output))
    assert heeded > alone
    twice = [int(x) for x in re.findall(r"(\d+) of 1400 steps took two gradients", output)]
    assert twice[0] == 0
    assert 0 < twice[1] < 1000
    assert "the network before it" in output
    text = (EXAMPLES / ALARM).read_text()
    assert [n for n in range(1, 20) if f"# {n}\n" in text] == list(range(1, 7))


def test_the_probes_part_of_a_foreign_loop_is_ten_lines() -> None:
    text = (EXAMPLES / "probe_in_your_loop.py").read_text()
    assert [n for n in range(1, 20) if f"# {n}\n" in text] == list(range(1, 11))
