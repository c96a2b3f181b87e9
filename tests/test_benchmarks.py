"""The benchmarks run: what is meant for a GPU, in its smoke test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_gpu_lease_is_ready(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", "run", str(tmp_path), "--smoke"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    runs = ("n_fgsm", "pgd")
    for stage in ("checks", "kernels", "steps", *runs, *(f"{run}-autoattack" for run in runs)):
        result = json.loads((tmp_path / f"{stage}.json").read_text())["result"]
        assert "error" not in result, stage
        if stage in runs:
            assert result["state"] == "finished"
    assert {line["n"] for line in result} == {4}


def test_cifar_is_packed_in_parts_and_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "cifar-10-batches-py"
    source.mkdir()
    for k in range(3):
        (source / f"data_batch_{k}").write_bytes(bytes([k]) * 1000)
    code = (
        "import gpu, pathlib, sys; gpu.PART_BYTES = 150; root = pathlib.Path(sys.argv[1]);"
        "gpu.pack(root / gpu.CIFAR, root / 'packed'); print(gpu.unpack(root / 'packed'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=BENCHMARKS)
    assert len(list((tmp_path / "packed").glob("part*"))) > 1
    for file in source.iterdir():
        assert (tmp_path / "packed" / "data" / source.name / file.name).read_bytes() == file.read_bytes()
