"""The examples that a probe watches: checked when they are given, and against the model when it is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tangentlab import modes
from tangentlab.errors import ConfigError, KernelError, ModelError


def own(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Copies, so that a probe's examples stay the same whatever the caller does with theirs.

    Raises:
        ConfigError: not x [n, ...] with labels [n].
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise ConfigError(f"x is a {type(x).__name__} and y a {type(y).__name__}; both must be tensors")
    if x.dim() == 0 or len(x) == 0:
        raise ConfigError(f"x has shape {tuple(x.shape)}; it must hold examples [n, ...]")
    if y.dim() != 1 or len(x) != len(y) or y.is_floating_point() or int(y.min()) < 0:
        raise ConfigError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)} {y.dtype}; y must hold the labels [n] "
            "of x [n, ...], integers from 0"
        )
    return x.detach().clone(), y.detach().long().clone()


def placed(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The examples on the model's device, floats in its precision, and the labels.

    Raises:
        KernelError: the model has no parameters.
        ModelError: it does not return [n, C].
        ConfigError: a label is none of its outputs.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise KernelError("the model has no parameters: the kernel has nothing to be taken over")
    x = x.to(parameter.device)
    x = x.to(parameter.dtype) if x.is_floating_point() else x
    with seen_plainly(model, x.device), torch.no_grad():
        output = model(x[:1])
    if not isinstance(output, Tensor) or output.dim() != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"the model returns {found}, not [n, C]")
    if int(y.max()) >= output.shape[1]:
        raise ConfigError(f"y holds the label {int(y.max())}; the model has {output.shape[1]} outputs")
    return x, y.to(parameter.device)


@contextmanager
def seen_plainly(model: nn.Module, device: torch.device) -> Iterator[None]:
    """In evaluation mode and full precision, whatever the caller's context is; buffers and global random
    state, which a model may touch there, come back as they were."""
    with (
        modes.evaluation(model),
        modes.buffers_kept(model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
    ):
        yield
