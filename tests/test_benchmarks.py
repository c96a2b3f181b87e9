"""The benchmarks run: what is meant for a GPU, in its smoke test."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tangentlab.records import read_configs, read_values

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAGES = ("checks", "errors", "kernels", "steps", "methods")


def test_the_gpu_lease_is_ready(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", "run", str(tmp_path), "--smoke", "--stages", *STAGES]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = {stage: json.loads((tmp_path / f"{stage}.json").read_text())["result"] for stage in STAGES}
    assert not [stage for stage, result in found.items() if "error" in result]
    assert found["checks"]["returncode"] == 0
    assert all(row["error"] < (1e-12 if row["dtype"] == "float64" else 1e-5) for row in found["errors"])
    assert found["methods"].pop("autoattack")[0]["n"] == 4
    assert {said.split(": ")[1] for said in found["methods"].values()} == {"finished"}


@pytest.mark.parametrize("missing", [[], ["part1"], ["part3"]])
def test_cifar_is_packed_in_parts_and_unpacked(tmp_path: Path, missing: list[str]) -> None:
    source, packed, unpacked = (tmp_path / name for name in ("source", "packed", "unpacked"))
    source.mkdir()
    draws = np.random.default_rng(0)
    images = {f"data_batch_{k}": draws.integers(0, 256, (6, 3072), dtype=np.uint8) for k in range(3)}
    for name, rows in images.items():
        (source / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(6))}))
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"]}))
    code = (
        "import gpu, pathlib, shutil, sys; gpu.PART_BYTES, gpu.SIDE = 30_000, 2;"
        "source, packed, unpacked = map(pathlib.Path, sys.argv[1:4]); gpu.pack(source, packed);"
        "[shutil.rmtree(packed / part) for part in sys.argv[4:]];"
        "gpu.unpack(packed, unpacked)"
    )
    words = [str(source), str(packed), str(unpacked), *missing]
    subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=BENCHMARKS)
    assert len(list(packed.iterdir())) == 3 - len(missing)
    if missing:
        assert not unpacked.exists()
        return
    for name, rows in images.items():
        content = pickle.loads((unpacked / name).read_bytes())
        assert (content["data"] == rows).all()
        assert content["labels"] == list(range(6))
    assert pickle.loads((unpacked / "batches.meta").read_bytes()) == {"label_names": ["a"]}


def test_a_study_under_way_is_kept_as_one_call_would_have_measured_it(tmp_path: Path) -> None:
    runs = ["fgsm-0.28-1", "spectral-0.34-1", "fgsm-0.28-0"]
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "config.yaml").write_text("{study: cure, tier: 0, precision: fp32, seeds: [0, 1, 2]}")
    (folder / "values.jsonl").write_text(
        "".join(json.dumps({"run": run, "seed": int(run[-1])}) + "\n" for run in runs)
    )
    (folder / "configs.jsonl").write_text(
        "".join(json.dumps({"run": run, "config": {"name": run}, "commit": "a"}) + "\n" for run in runs[:2])
    )
    there = {"command": "tangentlab study cure --out somewhere/else --tier 0", "torch": "2"}
    (folder / "study.json").write_text(json.dumps({"environment": there}))
    code = (
        "import findings, pathlib, sys; study, into = map(pathlib.Path, sys.argv[1:]);"
        "print(findings.take(study, into))"
    )
    words = [sys.executable, "-c", code, str(folder), str(tmp_path / "kept")]
    said = subprocess.run(words, check=True, cwd=BENCHMARKS, capture_output=True, text=True).stdout
    kept = tmp_path / "kept" / "cure-tier0"
    assert said == f"{kept}: seeds [0, 1], 3 values\n"
    assert [line["run"] for line in read_values(kept)] == [runs[2], runs[0], runs[1]]
    assert [*read_configs(kept).values()] == [
        {"run": run, "config": {"name": run}, "commit": "a"} for run in runs[:2]
    ]
    assert json.loads((kept / "study.json").read_text()) == {
        "environment": {"command": "tangentlab study cure --tier 0", "torch": "2"}
    }
