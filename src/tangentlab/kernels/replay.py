"""The exact rule for every module: run it again on each example alone and pull its cotangents back.

Slower than a rule that knows the module's algebra, but it needs to know none: LayerNorm, Embedding,
grouped and transposed convolutions, bare parameters, parametrizations, and at worst the whole model.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from tangentlab.kernels.capture import Call, Tape


class Replay:
    """Per-example gradients of the parameters ``names`` of a module, by vector-Jacobian products.

    G_ir = Σ_calls (∂out_i/∂θ)ᵀ δ_ir, with out_i the module's output on the call's inputs of example i alone.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.modules = [module]
        self._module = module
        self._names = names
        self._vectorized = True

    def gradient(self, tape: Tape, dtype: torch.dtype, space: float) -> Tensor | None:
        chunk = max(1, int(space / max(1, self.transient(tape))))
        G: Tensor | None = None
        for _, call, delta in tape.live(self.modules):
            share = self._pulled(call, delta, chunk).to(dtype)
            G = share if G is None else G + share
        return G

    def _pulled(self, call: Call, delta: Tensor, chunk: int) -> Tensor:
        """[n, R, P] of one call with the cotangents δ [n, R, ...]."""
        with torch.no_grad(), warnings.catch_warnings():  # vjp records nevertheless, but only for the names
            # What torch cannot vectorize it loops over, correctly, and says so at each new operator.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            if self._vectorized:
                try:
                    result: Tensor = vmap(
                        lambda inputs, rows: self._example(call, inputs, rows), chunk_size=chunk
                    )(call.inputs, delta)
                    return result
                except (RuntimeError, ValueError):
                    # No batching rule, a random draw, or control flow that depends on the data.
                    self._vectorized = False
            return torch.stack(
                [self._example(call, [t[i] for t in call.inputs], rows) for i, rows in enumerate(delta)]
            )

    def _example(self, call: Call, inputs: list[Tensor], rows: Tensor) -> Tensor:
        """[R, P] of one example: its inputs [...], its cotangents [R, ...]."""

        def forward(parameters: dict[str, Tensor]) -> Tensor:
            # Clones, for a module that changes its inputs in place would change the tape's.
            args, kwargs = call.arguments(tensor.unsqueeze(0).clone() for tensor in inputs)
            output: Tensor = functional_call(self._module, parameters, args, kwargs)
            return output.squeeze(0)

        pull = vjp(forward, {name: self._module.get_parameter(name).detach() for name in self._names})[1]

        def pulled(row: Tensor) -> Tensor:
            (gradients,) = pull(row)
            return torch.cat([gradients[name].flatten() for name in self._names])

        if self._vectorized and len(rows) > 1:
            flat: Tensor = vmap(pulled)(rows)
            return flat
        return torch.stack([pulled(row) for row in rows])

    def transient(self, tape: Tape) -> int:
        """A container's replay holds at most what the model's graph does, a leaf's a few outputs."""
        live = tape.live(self.modules)
        if not live:
            return 0
        rows = live[0][2].shape[1]
        own = sum(p.numel() for p in map(self._module.get_parameter, self._names))
        outputs = max(delta[0].numel() + sum(t[0].numel() for t in call.inputs) for _, call, delta in live)
        graph = tape.footprint if any(self._module.children()) else 0
        return (1 + rows) * (graph + 4 * outputs + own)
