"""Fill a short lease of a GPU: checks, then timings, then studies.

    python benchmarks/gpu.py pack ~/.cache/tangentlab/data/cifar-10-batches-py .gpu   # one part a call
    python benchmarks/gpu.py run results/gpu --data .gpu --minutes 9 [--stages checks kernels]
    python benchmarks/gpu.py run /tmp/smoke --smoke # anywhere: seconds, on the CPU and on digits

``run`` goes through the stages in order of worth, each written as JSON at once, and stops starting new ones
when the minutes are used up; a study goes on in the next call. Nothing is downloaded: the parts are unpacked
to where the studies look for CIFAR-10, unless it is there; other data sets are carried there as they are.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tangentlab import ntk
from tangentlab.data.catalogue import default_root
from tangentlab.models import PreActResNet18
from tangentlab.records import environment, read_values
from tangentlab.runs import evaluate, load_config, train_many
from tangentlab.studies import judge_study
from tangentlab.training import Batch, Memory, Network, PGDTraining

PART_BYTES = 50 * 2**20
SIDE = 50  # images to a side of a mosaic
SHAPE = (3, 32, 32)
ROOT = Path(__file__).parents[1]
STUDIES = {
    # Small ones first: what fails on a GPU alone shows in a minute.
    "transfer-tier0": "transfer --tier 0 --seeds 6",
    "overfitting-tier0": "overfitting --tier 0 --seeds 0 --only fgsm-0.28",
    "lazy-tier1": "lazy --tier 1 --seeds 7 8 9 --precision bf16",
    "cure-tier1": "cure --tier 1 --seeds 3 4 5 6 7",
    "overfitting-tier1": "overfitting --tier 1 --seeds 3 4 5 6 7",
    "cure-tier3": "cure --tier 3 --seeds 3 4 5 --precision bf16",
}
STAGES = ("checks", "errors", "kernels", "steps", "methods", *STUDIES)
METHODS = ("spectral", "lazy", "trades", "n_fgsm", "fgsm_pgi", "grad_align", "atta", "free")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("source", type=Path)
    packing.add_argument("folder", type=Path)
    running = commands.add_parser("run")
    running.add_argument("out", type=Path)
    running.add_argument("--data", type=Path, default=Path(".gpu"))
    running.add_argument("--minutes", type=float, default=9.0)
    running.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    running.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.source, options.folder)
    else:
        unpack(options.data, default_root() / "cifar-10-batches-py")
        run(options.out, minutes=options.minutes, chosen=options.stages, smoke=options.smoke)


# --- data ------------------------------------------------------------------------------------------------


def pack(source: Path, folder: Path) -> None:
    """Write CIFAR-10's files into FOLDER/part1, part2, ...; each small enough to carry.

    The images go into mosaics of lossless WebP, which takes 0.6 of their bytes where LZMA takes 0.8.
    """
    number, size = 1, 0
    for file in (*sorted(source.glob("*_batch*")), source / "batches.meta"):
        for name, content in _packed(file):
            if size and size + len(content) > PART_BYTES:
                number, size = number + 1, 0
            size += len(content)
            target = folder / f"part{number}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        print(file.name, f"part{number}", f"{size / 2**20:.1f} MiB", flush=True)


def _packed(file: Path) -> Iterator[tuple[str, bytes]]:
    """A batch as its mosaics and the rest of its dictionary; another file as it is."""
    content = pickle.loads(file.read_bytes(), encoding="latin1")
    if "data" not in content:
        yield f"{file.name}.meta", file.read_bytes()
        return
    images = content.pop("data").reshape(-1, *SHAPE)
    yield f"{file.name}.meta", pickle.dumps(content)
    for first in range(0, len(images), SIDE**2):
        tiles = np.zeros((SIDE**2, *SHAPE), dtype=np.uint8)
        tiles[: len(images) - first] = images[first : first + SIDE**2]
        mosaic = tiles.reshape(SIDE, SIDE, *SHAPE).transpose(0, 3, 1, 4, 2).reshape(SIDE * 32, SIDE * 32, 3)
        buffer = io.BytesIO()
        Image.fromarray(mosaic).save(buffer, "webp", lossless=True, quality=50)
        yield f"{file.name}.{first:05d}.webp", buffer.getvalue()


def unpack(folder: Path, target: Path) -> None:
    """Write CIFAR-10's files from the parts, where all of them are there and the files are not."""
    metas, parts = list(folder.glob("part*/*.meta")), len(list(folder.glob("part*")))
    ends = any(meta.parent.name == f"part{parts}" and meta.stem == "batches.meta" for meta in metas)
    if not ends or target.exists():
        return
    target.mkdir(parents=True)
    for meta in metas:
        content = pickle.loads(meta.read_bytes(), encoding="latin1")
        mosaics = sorted(folder.glob(f"part*/{meta.stem}.*.webp"), key=lambda path: path.name)
        if mosaics:
            images = np.concatenate([_tiles(path) for path in mosaics])
            content["data"] = images[: len(content["labels"])].reshape(-1, 3 * 32 * 32)
        (target / meta.stem).write_bytes(pickle.dumps(content, protocol=2))


def _tiles(path: Path) -> NDArray[np.uint8]:
    mosaic = np.asarray(Image.open(path))
    return mosaic.reshape(SIDE, 32, SIDE, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, *SHAPE)


# --- stages ----------------------------------------------------------------------------------------------


def run(out: Path, *, minutes: float, chosen: Sequence[str], smoke: bool) -> None:
    """The chosen stages that the time allows."""
    device = torch.device("cpu" if smoke else "cuda")
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[], Any]] = {
        "checks": lambda: checks(smoke),
        "errors": lambda: errors(device, smoke),
        "kernels": lambda: [kernel_timing(device, w, n, smoke) for w, n in ((16, 128), (64, 32), (64, 128))],
        "steps": lambda: [step_timing(device, w, smoke) for w in (16, 64)],
        "methods": lambda: methods(smoke),
        **{name: partial(study, words, out / name, deadline, smoke) for name, words in STUDIES.items()},
    }
    for name in chosen:
        if time.monotonic() > deadline:
            print(name, "left for the next call")
            continue
        started = time.monotonic()
        try:
            found = stages[name]()
        except Exception as error:  # the next stage is worth its time all the same
            found = {"error": f"{type(error).__name__}: {error}"}
        result = {"environment": environment(), "seconds": time.monotonic() - started, "result": found}
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(name, f"{result['seconds']:.0f} s", json.dumps(found)[:600], flush=True)


def checks(smoke: bool) -> dict[str, Any]:
    """The tests that need a GPU (in the smoke test: some that need none)."""
    chosen = ["tests/test_randomness.py"] if smoke else ["-m", "gpu", "tests/kernels/test_ntk.py"]
    if not smoke:
        chosen += ["tests/training/test_methods.py", "tests/data"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfE", *chosen],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {"returncode": done.returncode, "tail": done.stdout[-2000:] + done.stderr[-500:]}


def errors(device: torch.device, smoke: bool) -> list[dict[str, Any]]:
    """Relative errors, in the Frobenius norm, of the device's kernels from those of the CPU in float64."""
    model, x, _ = problem(torch.device("cpu"), 2 if smoke else 16, 4 if smoke else 10)
    there = problem(device, 2 if smoke else 16, 4 if smoke else 10)[0]
    rows = []
    for kind in ("pseudo", "trace", "class", "full"):
        for statistics in ("running", "batch"):
            own: dict[str, Any] = {"kind": kind, "batchnorm": statistics}
            exact = ntk(model.double(), x.double(), **own)
            for dtype in (torch.float64, torch.float32):
                K = ntk(there.to(dtype), x.to(device, dtype), **own).cpu().double()
                error = float((K - exact).norm() / exact.norm())
                rows.append({**own, "dtype": str(dtype).removeprefix("torch."), "error": error})
    return rows


def kernel_timing(device: torch.device, width: int, n: int, smoke: bool) -> dict[str, Any]:
    """Seconds and peak memory of the class kernels of PreActResNet-18 on n images, fp32."""
    model, x, _ = problem(device, 2 if smoke else width, 4 if smoke else n)
    ntk(model, x[:2], kind="class")  # the structural check and the libraries' warm-up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(device, lambda: ntk(model, x, kind="class", memory="40GiB"), repeats=3)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"width": width, "n": n, "seconds": seconds, "peak_bytes": peak}


def step_timing(device: torch.device, width: int, smoke: bool) -> dict[str, Any]:
    """Examples a second of a PGD-10 training step, batch 128, fp32 and bf16, channels last."""
    model, x, y = problem(device, 2 if smoke else width, 8 if smoke else 128)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method = PGDTraining(8 / 255, 2 / 255, 1 if smoke else 10)
    draws = torch.Generator(device).manual_seed(0)

    def step() -> None:
        model.train()
        loss = method.loss(Network(model, model), Batch(x, y), memory=Memory(), generator=draws)
        loss.backward()  # type: ignore[no-untyped-call]

    found: dict[str, Any] = {"width": width}
    for name, enabled in (("fp32", False), ("bf16", True)):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            found[name] = len(x) / timed(device, step, repeats=5)[1]
    return found


def methods(smoke: bool) -> dict[str, Any]:
    """METHODS for some epochs of digits in bf16, and AutoAttack on the first."""
    words = "--precision=bf16 --probe.every=1 --evaluation.test_size=100 --threads=1"
    words += f" --training.epochs={1 if smoke else 3}"
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            Path(folder) / method: load_config("digits", [*words.split(), f"--method={method}"])
            for method in (METHODS[:2] if smoke else METHODS)
        }
        outcomes = train_many(runs, jobs=1 if smoke else 4)
        first = outcomes[0].folder
        lines = evaluate(first, attacks=("autoattack",), checkpoints=("last",), test_size=4 if smoke else 50)
        return {**{one.folder.name: str(one) for one in outcomes}, "autoattack": lines}


def study(words: str, out: Path, deadline: float, smoke: bool) -> dict[str, Any]:
    """A study; goes on where the last call stopped. A run leaves a GPU idle: as many at once as cores."""
    if smoke:
        words = "cure --tier 0 --seeds 0 --only fgsm-0.28"
    jobs = 1 if smoke else max(1, (os.cpu_count() or 1) - 1)
    command = [sys.executable, "-m", "tangentlab.cli", "study", *words.split()]
    process = subprocess.Popen([*command, "--jobs", str(jobs), "--out", str(out.resolve())], cwd=ROOT)
    try:
        process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:  # it stops and saves
        process.send_signal(signal.SIGINT)
        process.wait()
    values = read_values(out)
    runs = len({line["run"] for line in values})
    return {"returncode": process.returncode, "runs": runs, "claims": judge_study(out)["claims"]}


def problem(device: torch.device, width: int, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network and random images of CIFAR-10's shape."""
    torch.manual_seed(0)
    model = PreActResNet18(SHAPE, 10, width=width).to(device)
    return model, torch.rand(n, *SHAPE).to(device), torch.arange(n, device=device) % 10


def timed(device: torch.device, call: Callable[[], Any], *, repeats: int) -> tuple[float, float, float]:
    """Least, median and greatest seconds of ``repeats`` calls after one to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    seconds.sort()
    return seconds[0], seconds[len(seconds) // 2], seconds[-1]


if __name__ == "__main__":
    main()
