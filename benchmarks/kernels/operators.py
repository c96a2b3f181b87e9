"""Products with the kernel of PreActResNet-18, matrix-free: time, memory, the top eigenvalue; and its sketch.

    python benchmarks/kernels/operators.py run results/kernels/operators.json [--peers .peers]
    python benchmarks/kernels/operators.py table results/kernels/operators.json

Every row is a process of its own. A product is timed in turn with a forward and two backwards of the network.
curvlinops composes its Jacobian with the adjoint; it has no kernel with batch statistics.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import clocked, memory, reset_peak
from torch import Tensor
from torch.nn import functional as F

from tangentlab.models import PreActResNet18

Spec = dict[str, Any]
IMAGES, CLASSES = 256, 10
MEMORY = {16: "1GiB", 64: "4GiB"}
SKETCHED, FEATURES, TRAINED = 128, (16, 64, 256), 40
ROWS: list[Spec] = [
    *(
        {"row": "product", "width": width, "batchnorm": batchnorm, "engine": engine}
        for width in MEMORY
        for batchnorm in ("running", "batch")
        for engine in ("ours", "curvlinops")
        if (batchnorm, engine) != ("batch", "curvlinops")
    ),
    *({"row": "eigenvalue", "width": width, "batchnorm": "batch"} for width in MEMORY),
    *({"row": "sketch", "width": width} for width in MEMORY),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path)
    run.add_argument("--peers", type=Path, default=Path(".peers"))
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--calls", type=int, default=5)
    run.add_argument("--widths", type=int, nargs="+", choices=MEMORY, default=list(MEMORY))
    commands.add_parser("table").add_argument("file", type=Path)
    commands.add_parser("worker").add_argument("spec")
    options = parser.parse_args()
    if options.command == "table":
        print(table(json.loads(options.file.read_text())))
    elif options.command == "worker":
        worker(json.loads(options.spec))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Every row, written as it comes."""
    from tangentlab.records import environment

    data: Spec = {"schema": 1, "environment": {**environment(), "threads": options.threads}, "rows": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        if row["width"] not in options.widths:
            continue
        theirs = row.get("engine", "ours") != "ours"
        python = options.peers / "torch" / "bin" / "python" if theirs else Path(sys.executable)
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            spec = {**row, "threads": options.threads, "calls": options.calls, "answer": str(answer)}
            done = subprocess.run(
                [python, __file__, "worker", json.dumps(spec)], capture_output=True, text=True
            )
            found = json.loads(answer.read_text()) if answer.exists() else {"failed": done.stderr[-300:]}
        data["rows"].append({**row, **found})
        options.out.write_text(json.dumps(data, indent=1) + "\n")
        print(json.dumps(data["rows"][-1]), file=sys.stderr)


def worker(spec: Spec) -> None:
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    model = PreActResNet18((3, 32, 32), CLASSES, width=spec["width"]).eval()
    found = {"product": product, "eigenvalue": eigenvalue, "sketch": sketch}[spec["row"]](spec, model)
    Path(spec["answer"]).write_text(json.dumps(found))


def product(spec: Spec, model: torch.nn.Module) -> Spec:
    """Seconds of a product and, in turn, of a forward with two backwards; growth of the memory."""
    from tangentlab.modes import batchnorm

    x, v = torch.rand(IMAGES, 3, 32, 32), torch.randn(IMAGES * CLASSES)
    parameters, cotangent = list(model.parameters()), torch.randn(IMAGES, CLASSES)

    def base() -> None:
        with batchnorm(model, statistics=spec["batchnorm"]):
            output = model(x)
            for last in (False, True):
                torch.autograd.grad(output, parameters, cotangent, retain_graph=not last)

    base()
    before = memory("VmRSS")
    reset_peak()
    call = {"ours": _ours, "curvlinops": _curvlinops}[spec["engine"]](spec, model, x)
    call(v)
    growth = memory("VmHWM") - before
    pairs = [(clocked(base)[1], clocked(lambda: call(v))[1]) for _ in range(spec["calls"])]
    return {
        "growth_bytes": growth,
        "base_seconds": [pair[0] for pair in pairs],
        "product_seconds": [pair[1] for pair in pairs],
    }


def _ours(spec: Spec, model: torch.nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    from tangentlab import NTKOperator

    op = NTKOperator(model, x, batchnorm=spec["batchnorm"], memory=MEMORY[spec["width"]])
    return lambda v: op @ v


def _curvlinops(_spec: Spec, model: torch.nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    package = importlib.import_module("curvlinops")
    data = [(x, torch.zeros(len(x)))]
    J = package.JacobianLinearOperator(model, list(model.parameters()), data, check_deterministic=False)
    JT = J.adjoint()
    return lambda v: J @ (JT @ v)


def eigenvalue(spec: Spec, model: torch.nn.Module) -> Spec:
    """The largest eigenvalue, its residual below 0.3 %, and to a ten-thousandth for its error."""
    from tangentlab import NTKOperator, top_eigenpairs

    x = torch.rand(IMAGES, 3, 32, 32)
    before = memory("VmRSS")
    reset_peak()
    op = NTKOperator(model, x, batchnorm=spec["batchnorm"], memory=MEMORY[spec["width"]])
    found, seconds = clocked(lambda: top_eigenpairs(op, 1, tolerance=0.003))
    growth = memory("VmHWM") - before
    true = top_eigenpairs(op, 1, tolerance=1e-4)
    return {
        "value": float(found.values[0]),
        "error": float(found.values[0] / true.values[0]) - 1,
        "products": found.products,
        "seconds": seconds,
        "growth_bytes": growth,
    }


def sketch(spec: Spec, model: torch.nn.Module) -> Spec:
    """Sketched class kernels beside exact ones, before and after some more steps of training."""
    from tangentlab import metrics, ntk
    from tangentlab.kernels import sketched_ntk

    g = torch.Generator().manual_seed(1)
    # Classes that differ in their mean image, so that there is something to learn.
    means = torch.rand(CLASSES, 3, 32, 32, generator=g)
    y = torch.arange(SKETCHED) % CLASSES
    x = (0.5 * means[y] + 0.5 * torch.rand(SKETCHED, 3, 32, 32, generator=g)).clamp(0, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def train(steps: int) -> None:
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()

    train(TRAINED // 2)
    first, exact_seconds = clocked(lambda: ntk(model, x, kind="class"))
    drawn: dict[int, list[Tensor]] = {}
    seconds: dict[int, float] = {}
    for features in FEATURES:
        groups, seconds[features] = clocked(partial(sketched_ntk, model, x, features=features))
        drawn[features] = [groups]
    train(TRAINED // 2)
    second = ntk(model, x, kind="class")
    rank = float(metrics.entropy_rank(first).mean())
    distance = float(metrics.kernel_distance(first, second).mean())
    found: Spec = {"exact_seconds": exact_seconds, "entropy_rank": rank, "distance": distance, "sketches": []}
    for features in FEATURES:
        drawn[features].append(sketched_ntk(model, x, features=features))
        own, *ends = metrics.jackknife(lambda K: metrics.entropy_rank(K).mean(), drawn[features][0])
        moved = metrics.jackknife(lambda K, L: metrics.kernel_distance(K, L).mean(), *drawn[features])
        found["sketches"].append(
            {
                "features": features,
                "seconds": seconds[features],
                "entropy_rank": [float(own), *map(float, ends)],
                "distance": [float(value) for value in moved],
            }
        )
    return found


def table(data: Spec) -> str:
    """Markdown: products, eigenvalues, sketches."""
    lines = [
        "| width | statistics | engine | product, s | over a forward and two backwards | memory growth, GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in (row for row in data["rows"] if row["row"] == "product"):
        cells = [row["width"], row["batchnorm"], row["engine"]]
        if "failed" in row:
            cells += [row["failed"].splitlines()[-1], "–", "–"]
        else:
            ratios = [p / b for p, b in zip(row["product_seconds"], row["base_seconds"], strict=True)]
            cells += [f"{median(row['product_seconds']):.2f}", f"{median(ratios):.2f}"]
            cells += [f"{row['growth_bytes'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| width | λ₁ of the batch kernel | its error | products | seconds | memory growth, GB |"]
    lines += ["|---" * 6 + "|"]
    for row in (row for row in data["rows"] if row["row"] == "eigenvalue"):
        lines.append(
            f"| {row['width']} | {row['value']:.4g} | {row['error']:.1e} | {row['products']} | "
            f"{row['seconds']:.1f} | {row['growth_bytes'] / 1e9:.2f} |"
        )
    lines += ["", "| width | kernel | seconds | entropy rank | kernel distance |", "|---" * 5 + "|"]
    for row in (row for row in data["rows"] if row["row"] == "sketch"):
        exact = f"{row['entropy_rank']:.3f} | {row['distance']:.4f}"
        lines.append(f"| {row['width']} | exact | {row['exact_seconds']:.1f} | {exact} |")
        for drawn in row["sketches"]:
            rank, distance = drawn["entropy_rank"], drawn["distance"]
            lines.append(
                f"| {row['width']} | {drawn['features']} features | {drawn['seconds']:.1f} | "
                f"{rank[0]:.3f} [{rank[1]:.3f}, {rank[2]:.3f}] | "
                f"{distance[0]:.4f} [{distance[1]:.4f}, {distance[2]:.4f}] |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
