"""Run as a program: the growth of the peak resident memory, after a warm-up, of kernels within 32 MiB.

Prints it in bytes, then the size of the Jacobian that the trace needs when it is formed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tangentlab.kernels import NTKOperator, ntk, sketched_ntk


def growth(work: Callable[[], object]) -> int:
    """Of the resident memory at its peak, at the second call: libraries compile kernels for new shapes."""
    work()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(inplace=True),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.GroupNorm(4, 48),
        nn.ReLU(),
        nn.Conv2d(48, 96, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96 * 64, 4),
    )
    x = torch.rand(96, 3, 32, 32)
    growths = (
        growth(lambda: ntk(model, x, kind="trace", memory="32MiB")),
        growth(lambda: ntk(model, x[:24], kind="full", memory="32MiB")),
        growth(lambda: ntk(model, x[:41], x[50:73], kind="class", memory="32MiB")),
        growth(lambda: sketched_ntk(model, x, memory="32MiB")),
        growth(lambda: NTKOperator(model, x, memory="32MiB") @ torch.ones(384, 3)),
        growth(lambda: NTKOperator(model, x[:11], batchnorm="batch", memory="32MiB") @ torch.ones(44)),
    )
    print(max(growths))  # noqa: T201
    print(len(x) * 4 * sum(p.nbytes for p in model.parameters()))  # noqa: T201


if __name__ == "__main__":
    main()
