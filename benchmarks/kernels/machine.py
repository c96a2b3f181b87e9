"""What the machine's matrix units reach: the best of several products, in fp32 and bf16.

torch.mm goes to MKL in fp32, which on some processors runs at half of what oneDNN reaches in its linear and
convolution kernels; the peak is the best of all of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

SIZES = (512, 1024, 2048, 4096)
SECONDS = 1.0  # for each product and size, at most after the third repeat


def products(size: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Products of 2·size³ operations."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    side = 32
    image = torch.randn(size // side, size, side, 1, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    w = b[:, :, None, None].contiguous(memory_format=torch.channels_last)
    found: dict[str, Callable[[], Any]] = {
        "mm": lambda: torch.mm(a, b),
        "conv1x1": lambda: F.conv2d(image, w),
    }
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        linear = torch.ops.mkldnn._linear_pointwise
        found["onednn_linear"] = lambda: linear(a, b, None, "none", [], "")
    return found


def peak(sizes: tuple[int, ...]) -> dict[str, Any]:
    """GFLOP/s by precision: of each product at each size, and the best of them."""
    found: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rates = {}
        for size in sizes:
            for product, call in products(size, dtype).items():
                rates[f"{product}-{size}"] = 2e-9 * size**3 / fastest(call)
        best = max(rates, key=rates.__getitem__)
        found[name] = {"gflops": rates[best], "by": best, "all": rates}
    return found


def fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest call."""
    call()
    each: list[float] = []
    while len(each) < 3 or (sum(each) < SECONDS and len(each) < 50):
        started = time.perf_counter()
        call()
        each.append(time.perf_counter() - started)
    return min(each)


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    with torch.no_grad():
        found = peak(tuple(size for size in SIZES if size <= spec.get("largest", SIZES[-1])))
    Path(spec["answer"]).write_text(json.dumps({"status": "ok", **found}))


if __name__ == "__main__":
    main()
