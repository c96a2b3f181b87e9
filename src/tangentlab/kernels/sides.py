"""One side's examples as the Jacobian of their outputs sees them: alone, or as a batch with its statistics.

What its graph weighs is measured on forwards of two and three examples and extrapolated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tangentlab.errors import KernelError
from tangentlab.kernels.inputs import Inputs, count, outputs, select, tensors
from tangentlab.kernels.memory import Saved
from tangentlab.kernels.products import chunks
from tangentlab.kernels.structure import trained
from tangentlab.modes import batchnorm


class Side:
    """The examples of one side, the model in evaluation mode but for BatchNorm with batch statistics.

    Args:
        model: in evaluation mode and preserved by the caller.
        x: examples on the model's device.
        batch: whether BatchNorm normalizes with the statistics of the whole x.
    """

    def __init__(self, model: nn.Module, x: Inputs, batch: bool) -> None:
        self.model, self.x, self.batch, self.n = model, x, batch, count(x)
        self.parameters = trained(model)
        first = next(iter(self.parameters.values()))
        self.device, self.dtype = first.device, first.dtype

    def mode(self) -> AbstractContextManager[None]:
        """BatchNorm as this side has it."""
        return batchnorm(self.model, statistics="batch") if self.batch else nullcontext()

    def parts(self, size: int = 1) -> Iterator[Inputs]:
        """What is run at once: the whole batch, or so many examples."""
        if self.batch:
            yield self.x
            return
        for part in chunks(self.n, size):
            yield select(self.x, part)

    def outputs(self, part: Inputs) -> Tensor:
        """The model's outputs with their graph, in the mode that the model is in."""
        try:
            with torch.enable_grad():
                return outputs(self.model, part)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise KernelError(
                f"a batch of {self.n} is too small for the batch statistics of this model: "
                "a BatchNorm gets only one value per channel"
            ) from error

    @cached_property
    def whole(self) -> Tensor:
        """The batch's outputs, with their graph."""
        return self.outputs(self.x)

    @cached_property
    def weighed(self) -> Weighed:
        """What graphs of these examples weigh."""
        with self.mode():
            return Weighed(*(_measured(self, size) for size in (min(self.n, 2), min(self.n, 3))))


@dataclass(frozen=True)
class Weight:
    """Bytes: of the graph of some examples, inputs included, of a backward's transients, of the largest
    activation."""

    graph: int
    transients: int
    largest: int

    @property
    def total(self) -> int:
        """At the peak."""
        return self.graph + self.transients


class _Measured(NamedTuple):
    """Of a forward: the outputs; bytes of the inputs, of each storage that the graph saves, and of each
    convolution's unfolded input."""

    output: Tensor
    given: int
    saved: list[int]
    unfolded: list[int]


@dataclass(frozen=True)
class Weighed:
    """Forwards of two examples and of three, or of as many as there are."""

    first: _Measured
    last: _Measured

    @property
    def classes(self) -> int:
        """C."""
        return self.last.output.shape[1]

    def at(self, n: int) -> Weight:
        """What n examples weigh."""
        saved, unfolded = (
            _extrapolated(getattr(self.first, name), getattr(self.last, name), len(self.last.output), n)
            for name in ("saved", "unfolded")
        )
        given = self.last.given * n // len(self.last.output)
        # As transients a few of the largest activation, and the unfolded input of a convolution: CPU kernels
        # without oneDNN unfold the whole batch.
        largest = max(saved, default=0)
        transients = 4 * largest + max(unfolded, default=0)
        ends = 4 * n * self.classes * self.last.output.element_size()
        return Weight(sum(saved) + given, transients + ends, largest)


def _measured(side: Side, size: int) -> _Measured:
    part = select(side.x, slice(size))
    saved = Saved(side.model)
    unfolded: list[int] = []

    def unfold(module: _ConvNd, _args: object, output: object) -> None:
        if isinstance(output, Tensor):
            unfolded.append(output[:, 0].numel() * module.weight[0].numel() * output.element_size())

    handles = [
        module.register_forward_hook(unfold) for module in side.model.modules() if isinstance(module, _ConvNd)
    ]
    before = {name: (p.data_ptr(), p._version) for name, p in side.parameters.items()}
    try:
        with saved.recording():
            output = side.outputs(part).detach()
    finally:
        for handle in handles:
            handle.remove()
    for name, p in side.parameters.items():
        if (p.data_ptr(), p._version) != before[name]:
            raise KernelError(
                f"parameter {name!r} is changed by the model's forward: "
                "the outputs are no function of it with a kernel"
            )
    return _Measured(output, sum(t.nbytes for t in tensors(part).values()), saved.sizes(), unfolded)


def _extrapolated(first: list[int], second: list[int], last: int, n: int) -> list[int]:
    """Sizes for n examples from those for one example fewer than ``last`` and for ``last``."""
    if len(first) != len(second):  # control flow that depends on the data
        return [size * n // last for size in second]
    return [size + max(size - before, 0) * (n - last) for before, size in zip(first, second, strict=True)]
