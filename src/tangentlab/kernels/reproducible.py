"""Whether a model in evaluation mode is a function: the same outputs twice, and no draw of random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tangentlab.errors import KernelError
from tangentlab.kernels.capture import record


def reproducible(model: nn.Module, x: Tensor) -> Tensor:
    """The model's outputs [n, C], if two forwards agree and neither moves PyTorch's global generators.

    The generators are watched because two draws may agree by chance; that also finds the module.

    Raises:
        KernelError: the outputs are random, or not finite; names the module that draws.
        ModelError: the output is not a floating-point tensor [n, C].
    """
    before: dict[nn.Module, list[Tensor]] = {}
    culprits: list[nn.Module] = []

    def enter(module: nn.Module, _args: Any) -> None:
        before[module] = _generator_states(x.device)

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        after = _generator_states(x.device)
        if any(not torch.equal(a, b) for a, b in zip(before[module], after, strict=True)):
            culprits.append(module)  # an inner module leaves before those around it

    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave),
        )
    ]
    try:
        first, second = (record(model, [], x).output.detach() for _ in range(2))
    finally:
        for handle in handles:
            handle.remove()
    if culprits:
        path = next(path for path, module in model.named_modules() if module is culprits[0])
        raise KernelError(
            f"{called(path)} ({type(culprits[0]).__name__}) draws random numbers in evaluation "
            "mode: the kernel of a random function is undefined"
        )
    bad = int((~first.isfinite()).sum())
    if bad:
        raise KernelError(
            f"{bad} of the model's {first.numel()} outputs on the first {len(x)} examples are not finite"
        )
    if float((first - second).norm()) > torch.finfo(first.dtype).eps ** 0.5 * float(first.norm()):
        raise KernelError(
            "two forwards of the model in evaluation mode differ: the kernel of a random "
            "function is undefined"
        )
    return first


def called(path: str) -> str:
    """A module's name in a message."""
    return f"module {path!r}" if path else "the model"


def _generator_states(device: torch.device) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]
