"""Whether a model in evaluation mode is a function of its examples: it must not draw, change itself or mix.

What is wrong is found by the outputs; who is wrong by running once more with hooks on every module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils._pytree import tree_leaves

from tangentlab.errors import KernelError
from tangentlab.kernels.inputs import Inputs, count, outputs, select, tensors


def reproducible(model: nn.Module, x: Inputs) -> Tensor:
    """The model's outputs [n, C], if two forwards agree and leave generators and parameters alone.

    PyTorch's generators are watched because two draws may agree by chance.

    Raises:
        KernelError: the outputs are random, or not finite, or the model changes its parameters; names the
            module. The parameters are put back.
        ModelError: the output is not a floating-point tensor [n, C].
    """
    device = next(iter(tensors(x).values())).device
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before: dict[nn.Module, list[Tensor]] = {}
    drew: list[nn.Module] = []

    def enter(module: nn.Module, *_: Any) -> None:
        before[module] = _generator_states(device)

    def leave(module: nn.Module, *_: Any) -> None:
        after = _generator_states(device)
        if any(not torch.equal(a, b) for a, b in zip(before[module], after, strict=True)):
            drew.append(module)  # an inner module leaves before those around it

    try:
        first, second = (_hooked(model, x, enter, leave) for _ in range(2))
    finally:
        changed = _put_back(model, weights)
    if changed:
        raise KernelError(
            f"{named(model, _changing(model, x, weights))} changes its parameters in its forward: "
            "the outputs have no gradient"
        )
    if drew:
        raise KernelError(
            f"{named(model, drew[0])} draws random numbers in evaluation mode: the kernel of a random "
            "function is undefined"
        )
    bad = int((~first.isfinite()).sum())
    if bad:
        raise KernelError(
            f"{bad} of the model's {first.numel()} outputs on the first {count(x)} examples are not finite"
        )
    if _differ(first, second):
        raise KernelError(
            f"{named(model, _parting(model, x, x))} gives other outputs at every call in evaluation mode: "
            "the kernel of a random function is undefined"
        )
    return first


def mixing(model: nn.Module, x: Inputs) -> str:
    """The module whose output for an example depends on the others, for a message."""
    return named(model, _parting(model, x, select(x, slice(0, 1))))


def named(model: nn.Module, module: nn.Module) -> str:
    """A module's path and type in a message."""
    path = next(path for path, other in model.named_modules() if other is module)
    return f"{called(path)} ({type(module).__name__})"


def called(path: str) -> str:
    """A module's path in a message."""
    return f"module {path!r}" if path else "the model"


def _parting(model: nn.Module, x: Inputs, x2: Inputs) -> nn.Module:
    """The first module to finish whose outputs differ between two forwards, as far as both reach."""

    def listed(x: Inputs) -> list[tuple[nn.Module, list[Tensor]]]:
        found: list[tuple[nn.Module, list[Tensor]]] = []

        def leave(module: nn.Module, _args: Any, output: object) -> None:
            found.append((module, [t.detach().clone() for t in tree_leaves(output) if isinstance(t, Tensor)]))

        _hooked(model, x, lambda *_: None, leave)
        return found

    for (module, first), (_, second) in zip(listed(x), listed(x2), strict=False):
        for a, b in zip(first, second, strict=False):
            if a.dim() and a.shape[1:] == b.shape[1:] and _differ(a[: len(b)], b):
                return module
    return model


def _differ(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return not torch.equal(a, b)
    allowed: float = torch.finfo(a.dtype).eps ** 0.5 * float(a.norm())
    return float((a - b).norm()) > allowed


def _changing(model: nn.Module, x: Inputs, weights: dict[str, Tensor]) -> nn.Module:
    """The first module to finish after which the parameters are not what they were."""
    found: list[nn.Module] = []

    def leave(module: nn.Module, *_: Any) -> None:
        if _put_back(model, weights):
            found.append(module)

    _hooked(model, x, lambda *_: None, leave)
    return found[0] if found else model


def _put_back(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether a parameter has changed; it is put back."""
    changed = [
        (p, weights[name]) for name, p in model.named_parameters() if not torch.equal(p, weights[name])
    ]
    with torch.no_grad():
        for p, weight in changed:
            p.copy_(weight)
    return bool(changed)


def _hooked(model: nn.Module, x: Inputs, enter: Callable[..., None], leave: Callable[..., None]) -> Tensor:
    """The model's outputs, the hooks called at every module that takes any."""
    handles = [
        handle
        for module in model.modules()
        if not isinstance(module, ScriptModule)
        for handle in (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave),
        )
    ]
    try:
        with torch.enable_grad():  # without it some modules take another path
            return outputs(model, x).detach()
    finally:
        for handle in handles:
            handle.remove()


def _generator_states(device: torch.device) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]
