"""The exact rule for every module: run it again on each example alone and pull its cotangents back.

Slower than a rule that knows the module's algebra, but it needs to know none: LayerNorm, Embedding,
grouped and transposed convolutions, bare parameters, parametrizations, and at worst the whole model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from tangentlab.kernels.capture import Tape
from tangentlab.kernels.sites import Call, dense


class Replay:
    """Per-example gradients of the parameters ``names`` of a module, by vector-Jacobian products.

    G_ir = Σ_calls (∂out_i/∂θ)ᵀ δ_ir, with out_i the module's output on the call's inputs of example i alone.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module = module
        self._names = names
        self._vectorized = True

    def gradient(self, tape: Tape, dtype: torch.dtype, space: float) -> Tensor | None:
        chunk = max(1, int(space / max(1, self.transient(tape))))
        G: Tensor | None = None
        for call, delta in self._live(tape):
            share = self._pulled(call, delta, chunk).to(dtype)
            G = share if G is None else G + share
        return G

    def _live(self, tape: Tape) -> list[tuple[Call, Tensor]]:
        """The calls that the outputs depend on, and their cotangents [n, R, ...]."""
        return [(call, call.delta.squeeze(2)) for call in tape.calls[self.module] if call.delta is not None]

    def _pulled(self, call: Call, delta: Tensor, chunk: int) -> Tensor:
        """[n, R, P] of one call with the cotangents δ [n, R, ...]."""
        if self._vectorized:
            with (
                torch.no_grad(),
                warnings.catch_warnings(),
            ):  # vjp records nevertheless, but only for the names
                # What torch cannot vectorize it loops over, correctly, and says so at each new operator.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                try:
                    result: Tensor = vmap(
                        lambda inputs, rows: self._example(call, inputs, rows), chunk_size=chunk
                    )(call.inputs, delta)
                    return result
                except (RuntimeError, ValueError):
                    # No batching rule, a random draw, or control flow that depends on the data.
                    self._vectorized = False
        return torch.stack(
            [self._alone(call, [t[i] for t in call.inputs], rows) for i, rows in enumerate(delta)]
        )

    def _example(self, call: Call, inputs: list[Tensor], rows: Tensor) -> Tensor:
        """[R, P] of one example inside vmap: its inputs [...], its cotangents [R, ...]."""

        def forward(parameters: dict[str, Tensor]) -> Tensor:
            args, kwargs = self._arguments(call, inputs)
            output: Tensor = functional_call(self.module, parameters, args, kwargs)
            return output.squeeze(0)

        pull = vjp(forward, {name: self.module.get_parameter(name).detach() for name in self._names})[1]
        # Row by row: a vmap inside the other makes the gradients of PReLU wrong (torch 2.13).
        pulled = [pull(row)[0] for row in rows]
        return torch.stack(
            [torch.cat([gradients[name].flatten() for name in self._names]) for gradients in pulled]
        )

    def _alone(self, call: Call, inputs: list[Tensor], rows: Tensor) -> Tensor:
        """The same by autograd, for what torch.func cannot transform."""
        parameters = [self.module.get_parameter(name) for name in self._names]
        with torch.enable_grad():
            args, kwargs = self._arguments(call, inputs)
            output = self.module(*args, **kwargs)
        pulled = []
        for row in rows:
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if output.requires_grad:
                gradients = torch.autograd.grad(
                    [output], parameters, [row[None]], retain_graph=True, allow_unused=True
                )
            pulled.append(
                torch.cat(
                    [
                        torch.zeros_like(p).flatten() if g is None else dense(g).flatten()
                        for p, g in zip(parameters, gradients, strict=True)
                    ]
                )
            )
        return torch.stack(pulled)

    def _arguments(self, call: Call, inputs: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Clones, for a module that changes its inputs in place would change the tape's.
        return call.arguments(tensor.unsqueeze(0).clone() for tensor in inputs)

    def transient(self, tape: Tape) -> int:
        """A container's replay holds at most what the model's graph does, a leaf's a few outputs."""
        live = self._live(tape)
        if not live:
            return 0
        rows = live[0][1].shape[1]
        own = sum(p.numel() for p in map(self.module.get_parameter, self._names))
        outputs = max(delta[0].numel() + sum(t[0].numel() for t in call.inputs) for call, delta in live)
        graph = tape.footprint if any(self.module.children()) else 0
        return (1 + rows) * (graph + 4 * outputs + own)
