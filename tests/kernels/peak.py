"""Run as a program: the growth of the peak resident memory in one kernel, after a warm-up, in bytes.

python peak.py KIND MEMORY N DTYPE
"""

from __future__ import annotations

import resource
import sys

import torch
from torch import nn

from tangentlab.kernels import ntk


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(kind: str, memory: str, n: int, dtype: torch.dtype) -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(inplace=True),
        nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.GroupNorm(4, 48), nn.ReLU(),
        nn.Conv2d(48, 96, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96 * 64, 4)).to(dtype)
    x = torch.rand(n, 3, 32, 32, dtype=dtype)
    ntk(model, x[:4], kind=kind)
    before = peak()
    ntk(model, x, kind=kind, memory=memory)
    return peak() - before


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), getattr(torch, sys.argv[4])))  # noqa: T201
