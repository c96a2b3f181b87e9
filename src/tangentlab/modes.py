"""What a forward pass may read and write: evaluation mode, BatchNorm's statistics, restored afterwards.

"Training mode" conflates three things: dropout, which statistics BatchNorm normalizes with, and whether
its running statistics are updated. The contexts here keep them apart and put every submodule back as it
was, one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tangentlab.errors import ConfigError, unknown_choice

STATISTICS = ("running", "batch")
BRANCHES = ("clean", "crafted")
"""Of layers that treat clean and crafted inputs apart: modules whose attribute ``branch`` is one of these."""

# Models whose running statistics the caller has asked to be updated, by id, within this context.
_updating: ContextVar[frozenset[int]] = ContextVar("_updating", default=frozenset())


def batchnorm_modules(model: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm module of the model (1d, 2d, 3d, Sync), each once."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back, at the end, each submodule's mode, each buffer, ``.grad`` and ``requires_grad``.

    Gradients are restored by reference: the body may replace ``.grad`` or set it to None, but must not
    write into a gradient in place.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        with _modes_kept(model), buffers_kept(model):
            yield
    finally:
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back the values of every buffer, and the buffers that the body replaces."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in kept:
            module._buffers[name] = buffer
            # Past autograd's count of versions: the values that a graph of the caller saved are these.
            # Written without a look, which would wait for the device.
            buffer.data.copy_(values)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the whole model; each submodule's own mode comes back at the end."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def batchnorm(model: nn.Module, *, statistics: str | None = None, update: bool = False) -> Iterator[None]:
    """Choose what BatchNorm normalizes with and whether its running statistics move.

    Args:
        model: any module; other kinds of layer keep their mode.
        statistics: "batch" (of the current batch), "running", or None to leave each layer as it is.
        update: whether forwards that use batch statistics update the buffers. Attacks run inside this
            context change buffers only if this is True.

    Raises:
        ConfigError: statistics unknown, or an update asked for with statistics="running".
    """
    if statistics not in (*STATISTICS, None):
        raise ConfigError(unknown_choice("statistics", statistics, STATISTICS))
    if update and statistics == "running":
        raise ConfigError("statistics='running' with update=True: only batch statistics can update buffers")
    modules = batchnorm_modules(model)
    before = [(module.training, module.track_running_stats) for module in modules]
    ids = _updating.get()
    token = _updating.set(ids | {id(model)} if update else ids - {id(model)})
    try:
        for module in modules:
            if statistics is not None:
                module.training = statistics == "batch"
            if not update:
                # In training mode an untracked BatchNorm uses batch statistics and leaves its buffers
                # alone; in evaluation mode it still reads them. momentum=0 would count the batch.
                module.track_running_stats = False
        yield
    finally:
        _updating.reset(token)
        for module, (training, tracked) in zip(modules, before, strict=True):
            module.training, module.track_running_stats = training, tracked


@contextmanager
def branch(model: nn.Module, name: str) -> Iterator[None]:
    """Forwards go through that branch of every layer that has :data:`BRANCHES`; others are left alone.

    Raises:
        ConfigError: there is no such branch.
    """
    if name not in BRANCHES:
        raise ConfigError(unknown_choice("branch", name, BRANCHES))
    before: list[tuple[Any, str]] = []
    for module in model.modules():
        own = getattr(module, "branch", None)
        if isinstance(own, str) and own in BRANCHES:
            before.append((module, own))
    try:
        for module, _ in before:
            module.branch = name
        yield
    finally:
        for module, own in before:
            module.branch = own


def updates_buffers(model: nn.Module) -> bool:
    """Whether the caller is inside ``batchnorm(model, update=True)``."""
    return id(model) in _updating.get()
