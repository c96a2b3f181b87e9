"""The slow and obviously right kernel: the Jacobian of each example alone, one autograd call an output."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """J [n, C, P] over the parameters that require grad, each example run alone in evaluation mode."""
    model = copy.deepcopy(model).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for example in x.split(1):
        output = model(example.clone())[0]
        for value in output:
            gradients = torch.autograd.grad(
                value, parameters, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows).view(len(x), -1, rows[0].numel())


def functional_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """The same by torch.func, for models that it can vectorize."""
    model = copy.deepcopy(model).eval()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def output(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (example[None],))[0]

    J = torch.func.vmap(torch.func.jacrev(output), (None, 0))(parameters, x)
    return torch.cat([J[name].flatten(2) for name in parameters], 2)


def kernel(J: Tensor, J2: Tensor, kind: str) -> Tensor:
    """The kernel of that kind from two Jacobians."""
    full = torch.einsum("icp,jdp->ijcd", J, J2)
    classes = full.diagonal(dim1=2, dim2=3)
    return {
        "full": full,
        "class": classes.permute(2, 0, 1),
        "trace": classes.mean(2),
        "pseudo": full.sum((2, 3)) / full.shape[2],
    }[kind]


def relative_error(K: Tensor, expected: Tensor) -> float:
    """max |K − K'| / max |K'|."""
    return float((K - expected).abs().max() / expected.abs().max())
