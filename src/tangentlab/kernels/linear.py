"""a Wᵀ + b with the fastest products of the device, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from tangentlab.kernels.products import outer, wide


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear and its gradients, up to rounding."""
    if not wide(input) or not wide(weight) or input.dim() < 2 or weight.dim() != 2:
        return F.linear(input, weight, bias)
    result: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, weight)
        result: Tensor = outer(a.flatten(0, -2), weight, a.dtype).unflatten(0, a.shape[:-1])
        return result if bias is None else result.add_(bias)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, weight = ctx.saved_tensors
        wanted = [node is not None and _wanted(node) for node, _ in ctx.next_functions]
        flat = d.flatten(0, -2)
        if not wanted[0]:
            inputs = None
        elif torch.is_grad_enabled():  # to be differentiated again
            inputs = d @ weight
        else:
            inputs = outer(flat, weight.T, d.dtype).view_as(a)
        weights = flat.T @ a.flatten(0, -2) if wanted[1] else None
        return inputs, weights, flat.sum(0) if wanted[2:] == [True] else None


def _wanted(node: Node) -> bool:
    """Whether this backward needs the gradient; ctx.needs_input_grad only knows what requires one."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for
        return True
