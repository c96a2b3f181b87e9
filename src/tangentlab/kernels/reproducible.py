"""Whether a model outside training is a function of its examples: it must not draw, change itself or mix.

What is wrong is found by the outputs; who is wrong by hooks on every module.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from tangentlab.errors import KernelError
from tangentlab.kernels.inputs import Inputs, count, outputs, select, tensors
from tangentlab.kernels.products import chunks
from tangentlab.modes import batchnorm_modules


def reproducible(model: nn.Module, x: Inputs) -> Tensor:
    """The model's outputs [n, C], if two forwards agree and leave generators and parameters alone.

    PyTorch's generators are watched because two draws may agree by chance.

    Raises:
        KernelError: the outputs are random, or not finite, or the model changes its parameters; names the
            module. The parameters are put back, but for those that another module than their own writes into.
            Or a module has not made its parameters yet.
        ModelError: the output is not a floating-point tensor [n, C].
    """
    made(model)
    device = next(iter(tensors(x).values())).device
    before: dict[nn.Module, list[Tensor]] = {}
    drew: list[nn.Module] = []
    weights = _Weights(model)

    def enter(module: nn.Module, *_: Any) -> None:
        weights.enter(module)
        before[module] = _generator_states(device)

    def leave(module: nn.Module, *_: Any) -> None:
        weights.leave(module)
        after = _generator_states(device)
        if any(not torch.equal(a, b) for a, b in zip(before[module], after, strict=True)):
            drew.append(module)  # an inner module leaves before those around it

    try:
        first, second = (_hooked(model, x, enter, leave) for _ in range(2))
    finally:
        changing = weights.end()
    if changing is not None:
        raise KernelError(
            f"{named(model, changing)} changes its parameters in its forward: the outputs have no gradient"
        )
    if drew:
        raise KernelError(
            f"{named(model, drew[0])} draws random numbers that evaluation mode does not switch off: "
            "the kernel of a random function is undefined"
        )
    bad = int((~first.isfinite()).sum())
    if bad:
        raise KernelError(
            f"{bad} of the model's {first.numel()} outputs on {count(x)} examples are not finite"
        )
    if _differ(first, second, coarsest(model, first)):
        raise KernelError(
            f"{named(model, _parting(model, x, x))} gives other outputs at every call: "
            "the kernel of a random function is undefined"
        )
    return first


def made(model: nn.Module) -> None:
    """Whether every parameter and buffer has a shape and can be differentiated by.

    Raises:
        KernelError: a lazy module has not been run, a parameter was made in inference mode, or a module has
            no hash, by which PyTorch itself tells modules apart; names it.
    """
    for path, module in _modules(model):
        held = (*module._parameters.values(), *module._buffers.values())
        if type(module).__hash__ is None:
            raise KernelError(
                f"{called(path)} ({type(module).__name__}) has an __eq__ but no __hash__; "
                "give it __hash__ = nn.Module.__hash__"
            )
        if any(t is not None and is_lazy(t) for t in held):
            raise KernelError(
                f"{called(path)} ({type(module).__name__}) makes its parameters at its first forward: "
                "run the model once before"
            )
        if any(p is not None and p.is_inference() for p in module._parameters.values()):
            raise KernelError(
                f"{called(path)} ({type(module).__name__}) has parameters made in inference mode, "
                "which have no gradients; make or load the model outside of it"
            )


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """named_modules, for modules without a hash too."""
    found: dict[int, tuple[str, nn.Module]] = {}
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) not in found:
            found[id(module)] = (path, module)
            inner = [(name, child) for name, child in module._modules.items() if child is not None]
            stack += [(f"{path}.{name}" if path else name, child) for name, child in reversed(inner)]
    return list(found.values())


def require_statistics(model: nn.Module, what: str) -> None:
    """Raise a KernelError, naming the module, if a BatchNorm has no running statistics for ``what``."""
    for module in batchnorm_modules(model):
        if module.running_mean is None:
            raise KernelError(
                f"{named(model, module)} has no running statistics, so that {what} is undefined"
            )


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


def coarsest(model: nn.Module, *others: Tensor) -> float:
    """The largest eps among the model's parameters and buffers and ``others``: what rounding may do to them.

    The outputs' own is not enough: a float32 network with a float64 head is right to float32 only.
    """
    held = itertools.chain(model.parameters(), model.buffers(), others)
    dtypes = {t.dtype for t in held if t.is_floating_point() or t.is_complex()}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def _parting(model: nn.Module, x: Inputs, x2: Inputs) -> nn.Module:
    """The first module to finish whose outputs differ between two forwards, as far as both reach."""

    def listed(x: Inputs) -> list[tuple[nn.Module, list[Tensor]]]:
        found: list[tuple[nn.Module, list[Tensor]]] = []

        def leave(module: nn.Module, _args: Any, output: object) -> None:
            found.append((module, [t.detach().clone() for t in tree_leaves(output) if isinstance(t, Tensor)]))

        _hooked(model, x, lambda *_: None, leave)
        return found

    eps = coarsest(model)
    for (module, first), (_, second) in zip(listed(x), listed(x2), strict=False):
        for a, b in zip(first, second, strict=False):
            if a.is_nested or b.is_nested:  # padded to the longest: it can only be compared unpadded
                return module
            if a.dim() and a.shape[1:] == b.shape[1:] and _differ(a[: len(b)], b, eps):
                return module
    return model


def _differ(a: Tensor, b: Tensor, eps: float) -> bool:
    """Whether two tensors differ beyond half of the digits that ``eps`` and their own dtype leave."""
    if not (a.is_floating_point() or a.is_complex()):
        return not torch.equal(a, b)
    allowed: float = max(eps, torch.finfo(a.dtype).eps) ** 0.5 * float(a.norm())
    return float((a - b).norm()) > allowed


class _Weights:
    """Finds the module that changes parameters over some forwards, and puts them back.

    A module's own are copied while it runs. The others have a checksum, for copies of all of them would be a
    second model; values and not versions, since ``.data`` has none and an RNN moves its weights unchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # The detached tensors keep the storage if a parameter is given another.
        self._before = {p: (p.detach(), _checksum(p)) for p in model.parameters()}
        self._running: list[tuple[nn.Module, list[tuple[nn.Parameter, Tensor, Tensor]]]] = []
        self._changing: nn.Module | None = None

    def enter(self, module: nn.Module) -> None:
        own = list(module.parameters(recurse=False))
        if any(p in self._before and _checksum(p) != self._before[p][1] for p in own):
            self._found(self._running[-1][0] if self._running else self._model)
        self._running.append((module, [(p, p.detach(), p.detach().clone()) for p in own]))

    def leave(self, module: nn.Module) -> None:
        """Also for the modules inside that were left by an exception."""
        while self._running:
            last, own = self._running.pop()
            for p, storage, values in own:
                if not torch.equal(p, values):
                    _put_back(p, storage)
                    if not torch.equal(p, values):
                        with torch.no_grad():
                            p.copy_(values)
                    self._found(last)
            if last is module:
                break

    def end(self) -> nn.Module | None:
        """The module found, if any."""
        if self._running:  # the forward has failed
            self.leave(self._running[0][0])
        for p, (storage, checksum) in self._before.items():
            if _checksum(p) != checksum:
                _put_back(p, storage)
                self._found(self._model)
        return self._changing

    def _found(self, module: nn.Module) -> None:
        self._changing = self._changing or module


def _put_back(p: nn.Parameter, storage: Tensor) -> None:
    if p.data_ptr() != storage.data_ptr():
        p.data = storage


def _checksum(p: Tensor) -> tuple[object, ...]:
    """Of the bits, with little memory beside them."""
    bits = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
    bits = torch.atleast_1d(bits.view(_BITS[bits.element_size()]))
    each = max(1, bits[:1].numel())
    return (p.shape, *(int(bits[part].sum()) for part in chunks(len(bits), 2**18 // each)))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
