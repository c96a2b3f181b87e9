"""Examples a second of adversarial training: ours, a plain loop, and torchattacks in the same loop.

    pip install --no-deps --target .peers-training torchattacks==3.5.1   # its own pins are of years ago
    python benchmarks/training/throughput.py run results/training/throughput.json --root DATA
    python benchmarks/training/throughput.py table results/training/throughput.json
    python benchmarks/training/throughput.py bounds results/training/bounds.json    # where a pass's time goes

PreActResNet-18 on CIFAR-10's augmented training images, batch 128, SGD; the plain loop is what the reference
repositories write: fp32, contiguous, the attack through loss.backward(). One process a measurement, engines
in turns, round after round; the table holds medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tangentlab.models import Normalize, PreActResNet18

EPS, STEP_SIZE = 8 / 255, 2 / 255
ENGINES = ("ours", "ours-fp32", "plain", "torchattacks")
METHODS = ("pgd", "fgsm_rs")
Step = Callable[[int], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path)
    run.add_argument("--root", help="folder of CIFAR-10; default: the cache folder")
    run.add_argument("--peer", type=Path, default=Path(".peers-training"), help="where torchattacks is")
    run.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    run.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    run.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    run.add_argument("--batch", type=int, default=128)
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--steps", type=int, default=3, help="timed steps of a process, after two that are not")
    run.add_argument("--rounds", type=int, default=3)
    commands.add_parser("table").add_argument("file", type=Path)
    bound = commands.add_parser("bounds")
    bound.add_argument("out", type=Path)
    bound.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    commands.add_parser("worker").add_argument("spec")
    options = parser.parse_args()
    if options.command == "worker":
        print(json.dumps(measure(json.loads(options.spec))))
    elif options.command == "table":
        print(table(json.loads(options.file.read_text())))
    elif options.command == "bounds":
        from tangentlab.records import environment

        torch.set_num_threads(2)
        found = {"environment": environment(), "peak": peak(), **{f"w{w}": bounds(w) for w in options.widths}}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Every engine in turn, a process each; the file is written again after each."""
    from tangentlab.records import environment

    data: dict[str, Any] = {"schema": 1, "environment": environment(), "rows": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for turn in range(options.rounds):
        for width in options.widths:
            for method in options.methods:
                for engine in options.engines:
                    spec = {
                        "engine": engine,
                        "method": method,
                        "width": width,
                        **{name: getattr(options, name) for name in ("root", "batch", "threads", "steps")},
                    }
                    places = [str(options.peer), os.environ.get("PYTHONPATH", "")]
                    done = subprocess.run(
                        [sys.executable, __file__, "worker", json.dumps(spec)],
                        capture_output=True,
                        text=True,
                        check=False,
                        env={
                            **os.environ,
                            "OMP_NUM_THREADS": str(options.threads),
                            "PYTHONPATH": os.pathsep.join(filter(None, places)),
                        },
                    )
                    row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
                    spec.pop("root")
                    data["rows"].append({"round": turn, **spec, **(row or {"error": done.stderr[-300:]})})
                    print(json.dumps(data["rows"][-1]), flush=True)
                    options.out.write_text(json.dumps(data, indent=1) + "\n")


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each timed step, and of a forward with its two kinds of backward in the same setting."""
    from tangentlab import data

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    split = data.load("cifar10", spec["root"]).train
    model = nn.Sequential(
        Normalize(torch.full((3,), 0.47), torch.full((3,), 0.25)),
        PreActResNet18((3, 32, 32), 10, width=spec["width"]),
    ).train()
    batches = data.Batches(
        split,
        batch_size=spec["batch"],
        seed=0,
        augmentation=data.Augmentation(crop=4, flip=True),
        device="cpu",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    make = {"ours": ours, "ours-fp32": ours, "plain": plain, "torchattacks": torchattacks}[spec["engine"]]
    step = make(spec, model, optimizer, batches)
    seconds = []
    for number in range(spec["steps"] + 2):
        started = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - started)
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[2:],
        "examples_per_second": spec["batch"] / statistics.median(seconds[2:]),
        **({"passes_seconds": passes(spec, model, batches)} if spec["engine"].startswith("ours") else {}),
    }


def peak() -> float:
    """GFLOP/s of a bf16 matrix product."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    return float(2 * 2048**3 / statistics.median([clocked(lambda: a @ a) for _ in range(20)]) / 1e9)


def bounds(width: int) -> dict[str, Any]:
    """A crafting pass in bf16: its seconds, the convolutions' GFLOP/s, each operator's share of the time."""
    model = PreActResNet18((3, 32, 32), 10, width=width).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = torch.rand(128, 3, 32, 32), torch.arange(128) % 10

    def once() -> None:
        leaf = x.clone().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(leaf), y)
        torch.autograd.grad(loss, leaf)

    seconds = statistics.median([clocked(once) for _ in range(7)][2:])
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(x)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        once()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: event.self_cpu_time_total / total for event in events[:10]}
    convolving = seconds * sum(share for name, share in shares.items() if "convolution" in name)
    rate = 2 * flops.get_total_flops() / convolving / 1e9  # the backward to the inputs takes as many
    return {"seconds": seconds, "convolution_gflops": rate, "shares": shares}


def clocked(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _fast(spec: dict[str, Any]) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if spec["engine"] == "ours" else nullcontext()


def passes(spec: dict[str, Any], model: nn.Module, batches: Any) -> dict[str, float]:
    """Seconds of the network alone: a forward and backward to the inputs, a forward and full backward."""
    x, y, _ = batches.batch(0)
    frozen = [p.requires_grad_(False) for p in model.parameters()]

    def once() -> float:
        leaf = x.clone().requires_grad_(not next(model.parameters()).requires_grad)
        started = time.perf_counter()
        with _fast(spec):
            loss = F.cross_entropy(model(leaf), y)
        loss.backward()
        return time.perf_counter() - started

    to_inputs = statistics.median([once() for _ in range(5)][1:])
    for p in frozen:
        p.requires_grad_(True)
    return {"input": to_inputs, "full": statistics.median([once() for _ in range(5)][1:])}


def ours(spec: dict[str, Any], model: nn.Module, optimizer: Any, batches: Any) -> Step:
    """The training loop of the package, with the settings of its configurations."""
    from tangentlab.training import Batch as TrainingBatch
    from tangentlab.training import FGSMRSTraining, PGDTraining, Step, TrainingState, train

    if spec["engine"] == "ours":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method = PGDTraining(EPS, STEP_SIZE, 10) if spec["method"] == "pgd" else FGSMRSTraining(EPS)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), **optimizer.defaults | {"fused": True}))
    make = Step(model, lambda: _fast(spec), lambda loss: loss.backward())

    def step(number: int) -> None:
        train(
            state,
            controller=lambda _: method,
            batch=lambda k: TrainingBatch(*batches.batch(k)[:2]),
            learning_rate=lambda _: 0.01,
            steps=number + 1,
            seed=0,
            make=make,
        )

    return step


def plain(spec: dict[str, Any], model: nn.Module, optimizer: Any, batches: Any) -> Step:
    """As the reference repositories write it."""
    pgd = spec["method"] == "pgd"

    def attack(x: Tensor, y: Tensor) -> Tensor:
        delta = torch.zeros_like(x).uniform_(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
        for _ in range(10 if pgd else 1):
            delta.requires_grad_(True)
            F.cross_entropy(model(x + delta), y).backward()
            gradient = delta.grad.detach()  # type: ignore[union-attr]
            size = STEP_SIZE if pgd else 1.25 * EPS
            delta = (delta.detach() + size * gradient.sign()).clamp(-EPS, EPS)
            delta = (x + delta).clamp(0, 1) - x
        return x + delta

    return _step(attack, model, optimizer, batches)


def torchattacks(spec: dict[str, Any], model: nn.Module, optimizer: Any, batches: Any) -> Step:
    """torchattacks' PGD, and its FFGSM for FGSM-RS, in the plain loop."""
    import torchattacks as peer  # type: ignore[import-not-found]

    attack = (
        peer.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=10, random_start=True)
        if spec["method"] == "pgd"
        else peer.FFGSM(model, eps=EPS, alpha=1.25 * EPS)
    )
    attack.set_model_training_mode(model_training=True, batchnorm_training=True, dropout_training=True)
    return _step(attack, model, optimizer, batches)


def _step(attack: Callable[[Tensor, Tensor], Tensor], model: nn.Module, optimizer: Any, batches: Any) -> Step:
    def step(number: int) -> None:
        x, y, _ = batches.batch(number)
        x_adv = attack(x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        optimizer.step()

    return step


def table(data: dict[str, Any]) -> str:
    """Markdown: medians over rounds."""
    place = data["environment"]
    lines = [
        f"torch {place['torch']}, {data['rows'][0]['threads']} threads, batch {data['rows'][0]['batch']}, "
        f"commit `{place['commit'][:12]}`.",
        "",
        "| width | method | engine | examples/s | beside plain | step over passes | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((row["width"], row["method"], row["engine"]) for row in data["rows"])
    for width, method, engine in keys:
        rows = [r for r in data["rows"] if (r["width"], r["method"], r["engine"]) == (width, method, engine)]
        good = [r for r in rows if "seconds" in r]
        if not good:
            lines.append(f"| {width} | {method} | {engine} | failed: {rows[0]['error'][-80:]!r} | | | |")
            continue
        rate = statistics.median(r["examples_per_second"] for r in good)
        pairs = [
            r["examples_per_second"] / p["examples_per_second"]
            for r in good
            for p in data["rows"]
            if (p["round"], p["width"], p["method"], p["engine"]) == (r["round"], width, method, "plain")
            and "seconds" in p
        ]
        beside = f"{statistics.median(pairs):.2f}" if pairs else ""
        over = ""
        if "passes_seconds" in good[0]:
            steps = 10 if method == "pgd" else 1
            over = "{:.2f}".format(
                statistics.median(
                    statistics.median(r["seconds"])
                    / (steps * r["passes_seconds"]["input"] + r["passes_seconds"]["full"])
                    for r in good
                )
            )
        lines.append(f"| {width} | {method} | {engine} | {rate:.1f} | {beside} | {over} | {len(good)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
