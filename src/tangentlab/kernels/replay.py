"""The exact rule for every module: run it again on each example alone and pull its cotangents back.

Slower than a rule that knows the module's algebra, but it needs to know none: LayerNorm, Embedding,
grouped and transposed convolutions, bare parameters, parametrizations, and at worst the whole model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from tangentlab.errors import first_line
from tangentlab.kernels.capture import Tape
from tangentlab.kernels.memory import Saved
from tangentlab.kernels.products import chunks
from tangentlab.kernels.sites import Call, dense

# Of one row: a gradient, what it is added to, their sum; or results one by one and then stacked. And gaps.
_MAKING = 4


class CannotReplay(Exception):
    """A module does not run on one example of what it was called with.

    It read what its parent had set up around the call: a precision, an attribute with the batch's shape.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"cannot be run on one example alone: {first_line(cause)}")


class Replay:
    """Per-example gradients of the parameters ``names`` of a module, by vector-Jacobian products.

    G_ir = Σ_calls (∂out_i/∂θ)ᵀ δ_ir, with out_i the module's output on the call's inputs of example i alone.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module = module
        self._names = names
        self._vectorized = True
        self._graphs: dict[object, int] = {}

    def gradient(self, tape: Tape, dtype: torch.dtype, space: float) -> Tensor | None:
        """G [n, R, P] in ``dtype``; beside it at most ``space`` elements are held, or what one example takes.

        As many examples as fit are run together, each by itself where no two do; with ``space`` zero, which
        is a test, one by one in the way of many.

        Raises:
            CannotReplay: the module does not run on one example.
        """
        live = self._live(tape)
        if not live:
            return None
        n, rows = live[0][1].shape[:2]
        sizes = [p.numel() for p in self._parameters()]
        chunk = space // max(1, self.transient(tape)) if space else 1.0
        vectorized = chunk > 1 or not space
        G = live[0][1].new_zeros(n, rows, sum(sizes), dtype=dtype)
        with torch.no_grad():
            for call, delta in live:
                for part in chunks(n, chunk):
                    slots, inputs = list(G[part].split(sizes, 2)), [t[part] for t in call.inputs]
                    if not (vectorized and self._add_together(slots, call, inputs, delta[part])):
                        self._add_alone(slots, call, inputs, delta[part])
        return G

    def _live(self, tape: Tape) -> list[tuple[Call, Tensor]]:
        """The calls that the outputs depend on, and their cotangents [n, R, ...]."""
        return [(call, call.delta.squeeze(2)) for call in tape.calls[self.module] if call.delta is not None]

    def _parameters(self) -> list[nn.Parameter]:
        return [self.module.get_parameter(name) for name in self._names]

    def _add_together(self, G: Sequence[Tensor], call: Call, inputs: list[Tensor], delta: Tensor) -> bool:
        """Add the gradients of k examples by δ [k, R, ...] to the parameters' G [k, R, p], if it can be."""
        if not self._vectorized:
            return False
        added = 0

        def add(G: Sequence[Tensor], inputs: list[Tensor], rows: Tensor) -> Tensor:
            nonlocal added

            def forward(parameters: dict[str, Tensor]) -> Tensor:
                args, kwargs = self._arguments(call, inputs)
                output: Tensor = functional_call(self.module, parameters, args, kwargs)
                return output.squeeze(0)

            at = {name: p.detach() for name, p in zip(self._names, self._parameters(), strict=True)}
            pull = vjp(forward, at)[1]
            # Row by row: a vmap inside the other makes the gradients of PReLU wrong (torch 2.13). And into G
            # at once: rows that waited would be as large as G, and lie scattered over the heap.
            for r, row in enumerate(rows):
                gradients = pull(row)[0]
                added += 1
                for slot, name in zip(G, self._names, strict=True):
                    slot[r] += gradients[name].flatten()
            return rows

        try:
            with warnings.catch_warnings():
                # What torch cannot vectorize it loops over, correctly, and says so at each new operator.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                vmap(add)(G, inputs, delta)  # gradients are off, but vjp records nevertheless
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if added:
                raise CannotReplay(error) from error
            # No batching rule, a random draw, or control flow that depends on the data. Should it be anything
            # else, the plain run says so too.
            self._vectorized = False
            return False
        return True

    def _add_alone(self, G: Sequence[Tensor], call: Call, inputs: list[Tensor], delta: Tensor) -> None:
        """The same, example by example."""
        for i, rows in enumerate(delta):
            for r, gradients in enumerate(self._alone(call, [t[i] for t in inputs], rows)):
                for slot, gradient in zip(G, gradients, strict=True):
                    if gradient is not None:
                        slot[i, r] += gradient.flatten()

    def _alone(self, call: Call, inputs: list[Tensor], rows: Tensor) -> Iterator[list[Tensor | None]]:
        """The same of one example by autograd, for what torch.func cannot transform; None is zero."""
        parameters = self._parameters()
        try:
            output = self._run(call, inputs)
            for row in rows if output.requires_grad else ():
                gradients = torch.autograd.grad(
                    [output], parameters, [row[None]], retain_graph=True, allow_unused=True
                )
                yield [None if g is None else dense(g) for g in gradients]
        except _FAILURES as error:
            if _exhausted(error):
                raise
            raise CannotReplay(error) from error

    def _run(self, call: Call, inputs: list[Tensor]) -> Tensor:
        """The module's output [1, ...] on one example, with its graph."""
        with torch.enable_grad():
            args, kwargs = self._arguments(call, inputs)
            output: Tensor = self.module(*args, **kwargs)
        return output

    def _arguments(self, call: Call, inputs: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Clones, for a module that changes its inputs in place would change the tape's.
        return call.arguments(tensor.unsqueeze(0).clone() for tensor in inputs)

    def transient(self, tape: Tape) -> int:
        """Elements that one example takes while it is replayed, its G not counted.

        Its graph and twice as much again for what the forward and the backward drop on the way and the heap
        keeps between, copies of what enters and leaves, and one row's gradient in the making.
        """
        live = self._live(tape)
        if not live:
            return 0
        own = sum(p.nbytes for p in self._parameters())
        run = max(
            3 * self._graph(call, tape) + 4 * (delta[0, 0].nbytes + sum(t[0].nbytes for t in call.inputs))
            for call, delta in live
        )
        return -(-(run + _MAKING * own) // tape.output.element_size())

    def _graph(self, call: Call, tape: Tape) -> int:
        """Bytes that autograd keeps of one example's run: measured, for it is not known of any module."""
        key = call.entries(len(tape))
        if key not in self._graphs:
            saved = Saved(self.module)
            try:
                with saved.recording():
                    self._run(call, [t[0] for t in call.inputs])
                self._graphs[key] = sum(saved.sizes())
            except _FAILURES as error:
                if _exhausted(error):
                    raise
                # The replay will say so; the graph is at most the model's.
                self._graphs[key] = tape.footprint * tape.output.element_size()
        return self._graphs[key]


# What a module raises that is not set up for the call.
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def _exhausted(error: Exception) -> bool:
    """Whether memory ran out, for which CPUs have no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
