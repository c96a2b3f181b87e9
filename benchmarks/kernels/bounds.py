"""What bounds the Gram part: rates of forming gradients and of multiplying them, at the layers' own sizes.

    python benchmarks/kernels/bounds.py results/kernels/bounds.json

Forming is G_i = δ_i a_iᵀ, [O, T] [T, D] for each of n examples: batched (torch.bmm), one by one by oneDNN as
the engine does it, and one by one without writing G anywhere, which shows what the writing takes. The product
is G Gᵀ of [n, P], of which half is needed: whole, and in the engine's blocks; GFLOP/s count that half.
``operators``: where a whole kernel's time goes, in shares of it, by PyTorch's profiler.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import CASES, SHAPE, network
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tangentlab import ntk
from tangentlab.kernels.products import gram, outer
from tangentlab.records import environment

# n, T, D, O of a linear or convolution layer.
FORMING = {
    "ViT-Tiny, up": (64, 65, 192, 768),
    "ViT-Tiny, down": (64, 65, 768, 192),
    "PreActResNet-18 w64, stage 1": (64, 1024, 576, 64),
    "PreActResNet-18 w64, stage 2": (64, 256, 1152, 128),
    "PreActResNet-18 w64, stage 3": (64, 64, 2304, 256),
}
# n, P of a slice of gradients.
OPERATORS = ("vit-tiny", "conv3-trace")
SHOWN = 10
PRODUCTS = {"n = 32": (32, 147_456), "n = 64": (64, 147_456), "n = 256": (256, 147_456)}


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    found: dict[str, Any] = {"schema": 1, "environment": environment()}
    found |= {"forming": {}, "products": {}, "operators": {}}
    for name, (n, T, D, O) in FORMING.items():  # noqa: E741
        d, a, G = torch.randn(n, O, T), torch.randn(n, D, T), torch.empty(n, O, D)
        work = 2 * n * T * D * O
        found["forming"][name] = {
            "batched": rate(work, partial(torch.bmm, d, a.transpose(1, 2), out=G)),
            "one by one": rate(work, partial(each, d, a, G)),
            "without writing": rate(work, partial(each, d, a, None)),
        }
    for name, (n, P) in PRODUCTS.items():
        G = torch.randn(n, 1, P)
        found["products"][name] = {
            "whole": rate(n * n * P, partial(outer, G[:, 0], G[:, 0], G.dtype)),
            "blocks": rate(n * n * P, partial(gram, G, None, G.dtype)),
        }
    for name in OPERATORS:
        found["operators"][name] = operators(name)
    x = torch.randn(1024, 1024)
    found["peak"] = rate(2 * 1024**3, lambda: outer(x, x, x.dtype))
    text = json.dumps(found, indent=1)
    Path(sys.argv[1]).write_text(text + "\n")
    print(text)


def operators(name: str) -> dict[str, float]:
    """Seconds of the case's kernel, and the share of them that each operator itself takes on the caller's
    thread; the rest is Python's and the dispatcher's."""
    case = CASES[name]
    model, x = network(case), torch.rand(case.n, *SHAPE)

    def call() -> Tensor:
        return ntk(model, x, kind=case.kind, memory=case.memory)

    call()
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        started = time.perf_counter()
        call()
        profiled = time.perf_counter() - started
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    shares = {event.key: round(event.self_cpu_time_total / 1e6 / profiled, 3) for event in events[:SHOWN]}
    return {"seconds": round(seconds, 3), **shares}


def each(d: Tensor, a: Tensor, G: Tensor | None) -> None:
    for i, (one, other) in enumerate(zip(d, a, strict=True)):
        product = outer(one, other, one.dtype)
        if G is not None:
            G[i] = product


def rate(work: float, call: Callable[[], object]) -> float:
    """GFLOP/s, the median of nine calls."""
    call()
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return round(work / statistics.median(seconds) / 1e9, 1)


if __name__ == "__main__":
    main()
