"""Fill a short lease of a GPU: checks, then timings, then training runs, each written as JSON at once.

    python benchmarks/gpu.py pack ~/.cache/tangentlab/data/cifar-10-batches-py .gpu   # one part a call
    python benchmarks/gpu.py run results/gpu --data .gpu --minutes 9
    python benchmarks/gpu.py run /tmp/smoke --smoke # anywhere: seconds, on the CPU and on digits

``run`` goes through the stages in order of worth and stops starting new ones when the minutes are used up;
training resumes in the next call. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import lzma
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab import ntk
from tangentlab.models import PreActResNet18
from tangentlab.records import environment, read_run
from tangentlab.training import Batch, Memory, Network, PGDTraining

CIFAR = "cifar-10-batches-py"
PART_BYTES = 60 * 2**20
ROOT = Path(__file__).parents[1]


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
    running.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.source, options.folder)
    else:
        run(options.out, options.data, minutes=options.minutes, smoke=options.smoke)


def pack(source: Path, folder: Path) -> None:
    """Write CIFAR-10's files, compressed, into FOLDER/part1, part2, ...; each small enough to carry."""
    number, size = 1, 0
    for file in sorted(source.iterdir()):
        data = lzma.compress(file.read_bytes(), preset=1)
        if size and size + len(data) > PART_BYTES:
            number, size = number + 1, 0
        size += len(data)
        target = folder / f"part{number}" / f"{file.name}.xz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        print(target, f"{len(data) / 2**20:.1f} MiB")


def unpack(folder: Path) -> Path:
    """The data's root: what the parts hold, decompressed once."""
    root = folder / "data"
    (root / CIFAR).mkdir(parents=True, exist_ok=True)
    for packed in folder.glob("part*/*.xz"):
        target = root / CIFAR / packed.stem
        if not target.exists():
            target.write_bytes(lzma.decompress(packed.read_bytes()))
    return root


def run(out: Path, data: Path, *, minutes: float, smoke: bool) -> None:
    """Every stage that the time allows, most valuable first."""
    device = torch.device("cpu" if smoke else "cuda")
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    stages: list[tuple[str, Callable[[], Any]]] = [
        ("checks", lambda: checks(smoke)),
        (
            "kernels",
            lambda: [kernel_timing(device, w, n, smoke) for w, n in ((16, 128), (64, 32), (64, 128))],
        ),
        ("steps", lambda: [step_timing(device, w, smoke) for w in (16, 64)]),
        ("n_fgsm", lambda: training("n_fgsm", out, data, deadline, smoke)),
        ("pgd", lambda: training("pgd", out, data, deadline, smoke)),
        ("n_fgsm-autoattack", lambda: autoattack("n_fgsm", out, deadline, smoke)),
        ("pgd-autoattack", lambda: autoattack("pgd", out, deadline, smoke)),
    ]
    for name, stage in stages:
        if time.monotonic() > deadline:
            print(name, "left for the next call")
            continue
        started = time.monotonic()
        try:
            found = stage()
        except Exception as error:  # the next stage is worth its time all the same
            found = {"error": f"{type(error).__name__}: {error}"}
        result = {"environment": environment(), "seconds": time.monotonic() - started, "result": found}
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(found)[:400], flush=True)


def checks(smoke: bool) -> dict[str, Any]:
    """The tests that need a GPU (in the smoke test: one that needs none)."""
    chosen = ["tests/test_randomness.py"] if smoke else ["-m", "gpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {"returncode": done.returncode, "tail": done.stdout[-2000:]}


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
    """Examples a second of a PGD-10 training step, batch 128, fp32 and bf16."""
    model, x, y = problem(device, 2 if smoke else width, 8 if smoke else 128)
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


def training(method: str, out: Path, data: Path, deadline: float, smoke: bool) -> dict[str, Any]:
    """PreActResNet-18 on CIFAR-10 with N-FGSM or PGD-10, in bf16, 30 epochs for both (de Jorge et al. 2022);
    goes on where the last call stopped."""
    words = [
        "--precision",
        "bf16",
        "--channels_last",
        "true",
        "--evaluation.every",
        "5",
        "--probe.every",
        "5",
    ]
    if smoke:
        name = "digits"
        words += ["--method", method, "--training.epochs", "1", "--evaluation.test_num_steps", "1"]
    else:
        name = {"n_fgsm": "cifar10-n-fgsm", "pgd": "cifar10"}[method]
        words += [
            "--training.epochs",
            "30",
            "--training.schedule",
            "cyclic",
            "--training.learning_rate",
            "0.2",
        ]
        words += ["--data.padding", "zero", "--data.root", str(unpack(data))]
    folder = (out / method).resolve()
    tangentlab(["train", name, "--out", str(folder), "--resume", *words], deadline)
    return read_run(folder).status


def autoattack(method: str, out: Path, deadline: float, smoke: bool) -> list[dict[str, Any]]:
    """AutoAttack on all test points (in the smoke test: on four) of the run's best and last checkpoints."""
    folder = (out / method).resolve()
    size = ["--test_size", "4"] if smoke else []
    tangentlab(["evaluate", str(folder), "--attacks", "autoattack", *size], deadline)
    return [line for line in read_run(folder).evaluations if line["attack"] == "autoattack"]


def tangentlab(words: list[str], deadline: float) -> None:
    """Run the command until it ends or the time is up; it then stops and saves."""
    process = subprocess.Popen([sys.executable, "-m", "tangentlab.cli", *words], cwd=ROOT)
    try:
        process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()


def problem(device: torch.device, width: int, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network and random images of CIFAR-10's shape."""
    torch.manual_seed(0)
    model = PreActResNet18((3, 32, 32), 10, width=width).to(device)
    return model, torch.rand(n, 3, 32, 32, device=device), torch.arange(n, device=device) % 10


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
