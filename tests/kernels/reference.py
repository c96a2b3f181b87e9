"""The slow and obviously right kernel: the Jacobian of each example alone, one autograd call an output."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("full", "class", "trace", "pseudo")

# A tensor [n, ...], a tuple of them (called as model(*x)) or a dict (called as model(**x)).
Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


def jacobian(model: nn.Module, x: Inputs) -> Tensor:
    """J [n, C, P] over the parameters that require grad, each example run alone in evaluation mode."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with _evaluated(model):
        return torch.stack([_rows(_call(model, example)[0], parameters) for example in _alone(x)])


def functional_jacobian(model: nn.Module, x: Inputs) -> Tensor:
    """The same by torch.func.jacrev, for models that functional transforms can run."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def output(parameters: dict[str, Tensor], example: Inputs) -> Tensor:
        args, kwargs = _arguments(example)
        return torch.func.functional_call(model, parameters, args, kwargs)[0]

    with _evaluated(model):
        found = [torch.func.jacrev(output, chunk_size=1)(parameters, example) for example in _alone(x)]
    return torch.stack(
        [torch.cat([J[name].reshape(len(J[name]), -1) for name in parameters], 1) for J in found]
    )


def batch_jacobian(model: nn.Module, x: Inputs) -> Tensor:
    """J [n, C, P] of the whole batch's outputs with BatchNorm in training mode, through its statistics."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    output = _call(model, x)
    return _rows(output.flatten(), [p for p in model.parameters() if p.requires_grad]).view(*output.shape, -1)


def functional_batch_jacobian(model: nn.Module, x: Inputs) -> Tensor:
    """The same by torch.func.jacrev of the whole batch's function."""
    model = copy.deepcopy(model).eval()
    torch.func.replace_all_batch_norm_modules_(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    args, kwargs = _arguments(x)
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, args, kwargs))(parameters)
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
    assert K.shape == expected.shape
    return float((K - expected).abs().max() / expected.abs().max())


def _rows(outputs: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """∂outputs/∂θ [len(outputs), P]; zeros where a parameter does not act, dense where it is sparse."""
    rows = []
    for value in outputs:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g).flatten()
                    for g, p in zip(gradients, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def _alone(x: Inputs) -> list[Inputs]:
    """Every example as a batch of one."""
    if isinstance(x, Tensor):
        return list(x.split(1))
    if isinstance(x, Mapping):
        return [dict(zip(x, one, strict=True)) for one in zip(*(t.split(1) for t in x.values()), strict=True)]
    return list(zip(*(t.split(1) for t in x), strict=True))


def _arguments(x: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What a model is called with, on copies: it may change its inputs in place."""
    if isinstance(x, Tensor):
        return (x.clone(),), {}
    if isinstance(x, Mapping):
        return (), {name: value.clone() for name, value in x.items()}
    return tuple(value.clone() for value in x), {}


def _call(model: nn.Module, x: Inputs) -> Any:
    args, kwargs = _arguments(x)
    return model(*args, **kwargs)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; not on a copy, for a weight that an old hook computes cannot be copied."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
