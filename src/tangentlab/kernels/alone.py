"""Examples run alone: the independent path that structures and kernels are checked against.

Nothing of the engine is in it but autograd: outputs of a batch of one, and gradients of their products with
cotangents, so many parameters at a time as there is room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from tangentlab.kernels.inputs import Inputs, count, joined, mapped, outputs, select, tensors
from tangentlab.kernels.sites import dense
from tangentlab.randomness import generator

_Key = TypeVar("_Key")

# Examples tried for one unlike the first.
_TRIED = 64


class Alone:
    """One example of a model by itself.

    Attributes:
        output: [1, C], detached.
    """

    def __init__(self, model: nn.Module, x: Inputs, i: int) -> None:
        with torch.enable_grad():
            self._output = outputs(model, select(x, slice(i, i + 1)))
        self.output = self._output.detach()

    def gradients(self, parameters: Mapping[str, nn.Parameter], v: Tensor) -> dict[str, Tensor | None]:
        """Of the output's product with v [C], by name; None where it does not depend on a parameter."""
        if not self._output.requires_grad:
            return dict.fromkeys(parameters)
        found = torch.autograd.grad(
            [self._output], list(parameters.values()), [v[None]], retain_graph=True, allow_unused=True
        )
        return {name: None if g is None else dense(g) for name, g in zip(parameters, found, strict=True)}


def pair(x: Inputs, x2: Inputs | None) -> Inputs:
    """Two unlike examples: the first of x, and another one; where there is none, the first one changed."""
    first = select(x, slice(0, 1))
    pool = x if x2 is None else joined(select(x, slice(0, _TRIED)), select(x2, slice(0, _TRIED)))
    order = torch.randperm(count(pool), generator=generator(0, "kernels.pair")).tolist()
    for i in order[:_TRIED]:
        other = select(pool, slice(i, i + 1))
        if any(
            not torch.equal(a, b)
            for a, b in zip(tensors(first).values(), tensors(other).values(), strict=True)
        ):
            return joined(first, other)
    return joined(first, mapped(first, lambda t: 0.9 * t if t.is_floating_point() else t.flip(-1)))


def grouped(sizes: Mapping[_Key, int], elements: float) -> Iterator[list[_Key]]:
    """The keys in groups whose sizes add up to ``elements`` at most, one at least.

    >>> list(grouped({"a": 2, "b": 3, "c": 4}, 5))
    [['a', 'b'], ['c']]
    """
    group: list[_Key] = []
    for key, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > elements:
            yield group
            group = []
        group.append(key)
    if group:
        yield group


def dot(a: Tensor | None, b: Tensor | None) -> float:
    """⟨a, b⟩ summed in float64; None is zero."""
    if a is None or b is None:
        return 0.0
    parts = zip(a.flatten().split(2**20), b.flatten().split(2**20), strict=True)
    return sum(float(p.double() @ q.double()) for p, q in parts)
