"""Inputs of a model: a tensor [n, ...], or a tuple (positional) or dict (keyword arguments) of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError, ModelError

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


def tensors(x: Inputs) -> dict[str, Tensor]:
    """The tensors by what a message calls them: "" for a tensor alone, "[0]" or "['name']" inside another."""
    if isinstance(x, Tensor):
        return {"": x}
    if isinstance(x, Mapping):
        return {f"[{name!r}]": value for name, value in x.items()}
    return {f"[{i}]": value for i, value in enumerate(x)}


def mapped(x: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """The same structure with the function of every tensor."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {name: function(value) for name, value in x.items()}
    return tuple(function(value) for value in x)


def moved(x: Inputs, device: torch.device) -> Inputs:
    """The examples on the device, without a graph."""
    return mapped(x, lambda value: value.detach().to(device))


def count(x: Inputs) -> int:
    """n, the number of examples."""
    return len(next(iter(tensors(x).values())))


def select(x: Inputs, part: slice) -> Inputs:
    """Some of the examples."""
    return mapped(x, lambda value: value[part])


def joined(x: Inputs, x2: Inputs) -> Inputs:
    """The examples of both, one after the other."""
    others = iter(tensors(x2).values())
    return mapped(x, lambda value: torch.cat([value, next(others)]))


def apply(model: Callable[..., Any], x: Inputs) -> Any:
    """``model(x)``, ``model(*x)`` or ``model(**x)``, on copies: the model may change its inputs in place."""
    x = mapped(x, torch.clone)
    if isinstance(x, Tensor):
        return model(x)
    return model(**x) if isinstance(x, Mapping) else model(*x)


def outputs(model: nn.Module, x: Inputs) -> Tensor:
    """The model's outputs [n, C].

    Raises:
        ModelError: the output is not a floating-point tensor [n, C].
    """
    output = apply(model, x)
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns a {type(output).__name__}; a kernel needs a tensor [n, C]")
    if output.dim() != 2 or len(output) != count(x) or not output.is_floating_point():
        raise ModelError(
            f"the model maps {count(x)} examples to a {output.dtype} tensor of shape "
            f"{list(output.shape)}; a kernel needs floating-point outputs [{count(x)}, C]"
        )
    if output.shape[1] == 0:
        raise ModelError(f"the model returns a tensor of shape {list(output.shape)}: it has no outputs")
    return output


def cotangents(kind: str, classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What an example's outputs are contracted with for a kernel, in sets taken at once, [sets, R, C]."""
    unit = torch.eye(classes, dtype=dtype, device=device)
    if kind == "full":
        return unit[None]
    return unit[:, None] if kind in ("class", "trace") else unit.sum(0)[None, None] / classes**0.5


def check(x: Inputs, x2: Inputs | None) -> None:
    """Whether both are examples, and alike.

    Raises:
        ConfigError: not tensors [n, ...] of one n, or x2 unlike x.
    """
    for name, value in (("x", x), ("x2", x2)):
        if value is None and name == "x2":
            continue
        if not isinstance(value, Tensor | tuple | Mapping) or not tensors(value):
            raise ConfigError(
                f"{name} is a {type(value).__name__}; give a tensor of examples [n, ...], or a tuple or dict "
                "of tensors"
            )
        for place, tensor in tensors(value).items():
            if not isinstance(tensor, Tensor):
                raise ConfigError(f"{name}{place} is a {type(tensor).__name__}; give a tensor [n, ...]")
            if tensor.dim() == 0 or len(tensor) == 0:
                raise ConfigError(
                    f"{name}{place} has shape {list(tensor.shape)}; give at least one example, [n, ...]"
                )
            if len(tensor) != count(value):
                raise ConfigError(
                    f"{name}{place} has shape {list(tensor.shape)}, but {name} has {count(value)} examples; "
                    "the first dimension of every tensor is the examples'"
                )
    if x2 is None:
        return
    first, second = tensors(x), tensors(x2)
    if list(first) != list(second):
        raise ConfigError(f"x2 holds {_listed(second)}, x {_listed(first)}; they must be alike")
    for place in first:
        a, b = first[place], second[place]
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise ConfigError(
                f"x2{place} holds examples of shape {list(b.shape[1:])} and {b.dtype}, x{place} of "
                f"{list(a.shape[1:])} and {a.dtype}; they must be alike"
            )


def _listed(found: dict[str, Tensor]) -> str:
    return ", ".join(place or "a tensor" for place in found)
