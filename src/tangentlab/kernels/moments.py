"""BatchNorm written out, so that its statistics can be read, given, and differentiated by.

y = w (h − μ)/√(σ² + ε) + b for each channel (Ioffe & Szegedy 2015, algorithm 1). PyTorch's own function has
no derivative by the statistics that it is given, and does not show those that it takes from a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tangentlab.errors import KernelError

_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class Moments(NamedTuple):
    """What a BatchNorm normalizes with: mean and variance of each channel, [channels]."""

    mean: Tensor
    variance: Tensor


class WrittenOut(TorchFunctionMode):
    """Within it every BatchNorm is elementary operations.

    In training mode the statistics are the batch's mean and biased variance, in evaluation mode the buffers;
    ``given`` ones, a pair for each call in order, take the place of either.

    Attributes:
        used: the statistics of each call in order, with their graph.
    """

    def __init__(self, given: Sequence[Moments] | None = None) -> None:
        super().__init__()
        self.used: list[Moments] = []
        self._given = given

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        call = dict(zip(_NAMES, args, strict=False)) | dict(kwargs or {})
        h = call["input"]
        moments = self._moments(h, call)
        self.used.append(moments)
        shape = [1, -1, *[1] * (h.dim() - 2)]
        scale = (moments.variance + call.get("eps", 1e-5)).rsqrt()
        y = (h - moments.mean.view(shape)) * scale.view(shape)
        if call.get("weight") is not None:
            y = y * call["weight"].view(shape)
        return y if call.get("bias") is None else y + call["bias"].view(shape)

    def _moments(self, h: Tensor, call: Mapping[str, Any]) -> Moments:
        if self._given is not None:
            if len(self.used) == len(self._given):
                raise KernelError(
                    f"the model calls BatchNorm more often than the {len(self._given)} times on the batch"
                )
            return self._given[len(self.used)]
        if call.get("training", False):
            across = [0, *range(2, h.dim())]
            return Moments(h.mean(across), h.var(across, correction=0))
        return Moments(call["running_mean"], call["running_var"])


def batch_moments(model: nn.Module, x: Tensor) -> list[Moments]:
    """The statistics of the batch x [n, ...] at each BatchNorm call of the model, without a graph; the layers
    before it normalize with theirs. BatchNorm must be in training mode (``modes.batchnorm``)."""
    with torch.no_grad(), WrittenOut() as written:
        model(x)
    found: list[Moments] = written.used
    return found
