"""The right kernel, plain autograd of each example alone, or an error that names what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab.errors import KernelError
from tangentlab.kernels import ntk

from .reference import Inputs, jacobian, kernel, relative_error
from .zoo import Made

TWO = ("full", "trace")

Function = Callable[..., Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(*shape: int, seed: int = 7) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=seed))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make().double()


def error(model: nn.Module, x: Inputs, x2: Inputs | None = None, kind: str = "trace", **words: Any) -> float:
    """The kernel's distance from that of the examples alone, in float64."""
    K = ntk(model, x, x2, kind=kind, **words)
    J = jacobian(model, x)
    return relative_error(K, kernel(J, J if x2 is None else jacobian(model, x2), kind))


def right_or_refused(
    model: nn.Module, x: Inputs, x2: Inputs | None = None, names: str = "mixes examples", **words: Any
) -> None:
    """The right kernel, or an error that says ``names``; nothing else."""
    found: dict[str, Tensor] = {}
    for kind in TWO:
        try:
            found[kind] = ntk(model, x, x2, kind=kind, **words)
        except KernelError as refusal:
            assert re.search(names, str(refusal))  # noqa: PT017
            assert len(str(refusal).splitlines()) == 1  # noqa: PT017
    if found:
        J = jacobian(model, x)
        J2 = J if x2 is None else jacobian(model, x2)
        for kind, K in found.items():
            assert relative_error(K, kernel(J, J2, kind)) < 1e-10


def right(model: nn.Module, x: Inputs, x2: Inputs | None = None, **words: Any) -> None:
    J = jacobian(model, x)
    J2 = J if x2 is None else jacobian(model, x2)
    for kind in TWO:
        assert relative_error(ntk(model, x, x2, kind=kind, **words), kernel(J, J2, kind)) < 1e-10


def dense(function: Function, width: int = 6) -> Callable[[], nn.Module]:
    return lambda: Made(function, linear=nn.Linear(width, 4), head=nn.Linear(4, 2))
