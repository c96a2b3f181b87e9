"""Run as a program: the growth of the peak resident memory, after a warm-up, of kernels within 32 MiB.

Prints it in bytes, then the size of the Jacobian that the trace needs when it is formed.
"""

from __future__ import annotations

import resource

import torch
from torch import nn

from tangentlab.kernels import ntk


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    ntk(model, x[:4])
    before = peak()
    ntk(model, x, kind="trace", memory="32MiB")
    ntk(model, x[:24], kind="full", memory="32MiB")
    print(peak() - before)  # noqa: T201
    print(len(x) * 4 * sum(p.nbytes for p in model.parameters()))  # noqa: T201


if __name__ == "__main__":
    main()
