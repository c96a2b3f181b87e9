"""The state that kernels are taken in: evaluation mode, whatever the model and the caller are in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tangentlab.kernels.products import precision
from tangentlab.modes import evaluation, preserved


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode with gradients, whatever the caller is inside; all as it was at the end.

    Also what modules store on themselves in their forward: a replay would leave dead tensors there.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    collections = [
        (value, value.copy())
        for _, stored in attributes
        for value in stored.values()
        if type(value) in (list, dict)
    ]
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(cuda),
        preserved(model),
        evaluation(model),
        precision(),
    ):
        try:
            yield
        finally:
            for module, stored in attributes:
                vars(module).clear()
                vars(module).update(stored)
            for value, before in collections:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(before)
