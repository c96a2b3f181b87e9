"""The functions with a rule, and what makes a use of their arguments.

Each rule answers None where no watched parameter is in a place that it knows; the parameter then acts through
the module that is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangentlab.kernels.uses import Affine, BatchNorm, Convolution, Embedding, Linear, Use

Watched = Mapping[int, nn.Parameter]
Arguments = dict[str, Any]


def _roles(watched: Watched, given: Arguments, names: Sequence[str] = ("weight", "bias")) -> dict[str, Any]:
    return {name: given[name] for name in names if id(given.get(name)) in watched}


def _linear(watched: Watched, given: Arguments) -> Use | None:
    roles, weight = _roles(watched, given), given["weight"]
    if not roles or weight.dim() != 2:
        return None
    return Linear(given["input"], roles, len(weight), swapped=False)


def _matmul(watched: Watched, given: Arguments) -> Use | None:
    roles, weight = _roles(watched, given), given["weight"]
    if not roles or weight.dim() != 2 or given["input"].dim() < 2:
        return None
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
        return None
    if "bias" in roles and roles["bias"].shape != weight.shape[1:]:
        return None
    return Linear(given["input"], roles, weight.shape[1], swapped=True)


def _embedding(watched: Watched, given: Arguments) -> Use | None:
    roles = _roles(watched, given, ["weight"])
    if not roles or given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
        return None
    return Embedding(given["input"], roles, given.get("padding_idx"))


def _convolution(watched: Watched, given: Arguments, *, transposed: bool) -> Use | None:
    roles, weight, a = _roles(watched, given), given["weight"], given["input"]
    dims = weight.dim() - 2
    if not roles or a.dim() != weight.dim():
        return None

    def each(name: str, default: int) -> list[int]:
        value = given.get(name, default)
        return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)

    dilation, padding = each("dilation", 1), given.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):  # torch pads the uneven one at the end
            a = F.pad(a, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
            total = [0] * dims
        given = given | {"padding": [t // 2 for t in total]}
    elif padding == "valid":
        given = given | {"padding": 0}
    return Convolution(
        a,
        roles,
        weight.shape,
        each("stride", 1),
        each("padding", 0),
        dilation,
        given.get("groups", 1),
        each("output_padding", 0) if transposed else None,
    )


def _channelwise(x: Tensor) -> list[int]:
    return [x.shape[1], *[1] * (x.dim() - 2)]


def _batch_norm(watched: Watched, given: Arguments) -> Use | None:
    roles, x = _roles(watched, given), given["input"]
    mean, var, eps = given["running_mean"], given["running_var"], given.get("eps", 1e-5)
    if not roles or given.get("training", False) or mean is None:
        return None

    return BatchNorm(x, roles, mean, var, eps)


def _layer_norm(watched: Watched, given: Arguments) -> Use | None:
    shape, eps = list(given["normalized_shape"]), given.get("eps", 1e-5)
    return _affine(watched, given, shape, lambda x: F.layer_norm(x, shape, None, None, eps))


def _rms_norm(watched: Watched, given: Arguments) -> Use | None:
    shape, eps = list(given["normalized_shape"]), given.get("eps")
    # The default eps is that of the type which the model ran in.
    eps = torch.finfo(given["input"].dtype).eps if eps is None else eps
    return _affine(watched, given, shape, lambda x: F.rms_norm(x, shape, None, eps))


def _group_norm(watched: Watched, given: Arguments) -> Use | None:
    groups, eps = given["num_groups"], given.get("eps", 1e-5)
    view = _channelwise(given["input"])
    return _affine(watched, given, view, lambda x: F.group_norm(x, groups, None, None, eps))


def _prelu(watched: Watched, given: Arguments) -> Use | None:
    view = _channelwise(given["input"]) if given["weight"].numel() > 1 else []
    return _affine(watched, given, view, lambda x: x.clamp(max=0))


def _affine(
    watched: Watched, given: Arguments, view: Sequence[int], normalized: Callable[[Tensor], Tensor]
) -> Use | None:
    roles = _roles(watched, given)
    return Affine([given["input"]], roles, view, normalized) if roles else None


def _broadcast(watched: Watched, given: Arguments, *, role: str) -> Use | None:
    """x + p, x * p, either way round."""
    found = [name for name in ("input", "other") if id(given.get(name)) in watched]
    if len(found) != 1:
        return None
    p, x = given[found[0]], given["other" if found[0] == "input" else "input"]
    if not isinstance(x, Tensor) or x.dim() < p.dim():
        return None
    return Affine([x], {role: p}, p.shape)


def _expand(watched: Watched, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Use | None:
    p = args[0]
    return Affine([], {"bias": p}, p.shape) if id(p) in watched else None


def _named(*names: str, **renamed: str) -> Callable[..., Any]:
    """Bind a call's arguments to names, given in torch's order; ``renamed`` maps torch's names to ours."""

    def bound(rule: Callable[..., Use | None], **settings: Any) -> Callable[..., Use | None]:
        def of(watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Use | None:
            given = {renamed.get(name, name): value for name, value in kwargs.items()}
            if len(args) > len(names) or not given.keys() <= set(names[len(args) :]):
                return None
            return rule(watched, dict(zip(names, args, strict=False)) | given, **settings)

        return of

    return bound


_CONV = _named("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = _named("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_TWO = _named("input", "other")
_MATMUL = _named("input", "weight", other="weight", mat2="weight")

# What makes a use of a call's arguments, None where no watched parameter is in a place that a rule knows.
RULES: dict[Any, Callable[[Watched, tuple[Any, ...], dict[str, Any]], Use | None]] = {
    F.linear: _named("input", "weight", "bias")(_linear),
    torch.addmm: _named(
        "bias", "input", "weight", "beta", "alpha", input="bias", mat1="input", mat2="weight"
    )(_matmul),
    **{f: _MATMUL(_matmul) for f in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm)},
    F.embedding: _named(
        "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"
    )(_embedding),
    **{f: _CONV(_convolution, transposed=False) for f in (F.conv1d, F.conv2d, F.conv3d)},
    **{
        f: _TRANSPOSED(_convolution, transposed=True)
        for f in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    },
    F.batch_norm: _named(
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    )(_batch_norm),
    F.layer_norm: _named("input", "normalized_shape", "weight", "bias", "eps")(_layer_norm),
    F.rms_norm: _named("input", "normalized_shape", "weight", "eps")(_rms_norm),
    F.group_norm: _named("input", "num_groups", "weight", "bias", "eps")(_group_norm),
    F.prelu: _named("input", "weight")(_prelu),
    **{f: _TWO(_broadcast, role="bias") for f in (torch.add, Tensor.add, Tensor.add_)},
    **{f: _TWO(_broadcast, role="weight") for f in (torch.mul, Tensor.mul)},
    Tensor.expand: _expand,
    Tensor.expand_as: _expand,
}
