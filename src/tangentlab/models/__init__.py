"""Networks, and the way to any ``nn.Module`` by import path.

A network takes inputs in [0, 1] and returns logits [n, C]; normalisation is part of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tangentlab.errors import ModelError, first_line, unknown_choice
from tangentlab.models.mlp import MLP
from tangentlab.models.normalization import DualBatchNorm2d
from tangentlab.models.preactresnet import PreActResNet18
from tangentlab.models.small_cnn import SmallCNN

__all__ = [
    "MLP",
    "MODELS",
    "DualBatchNorm2d",
    "Normalize",
    "NormalizeEach",
    "PreActResNet18",
    "SmallCNN",
    "check_output",
    "model_class",
]

MODELS: dict[str, type[nn.Module]] = {"small_cnn": SmallCNN, "mlp": MLP, "preactresnet18": PreActResNet18}


class Normalize(nn.Module):
    """(x − mean)/std per channel, the first layer of a network; mean and std travel as buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.reshape(-1, 1, 1).clone())
        self.register_buffer("std", std.reshape(-1, 1, 1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class NormalizeEach(nn.Module):
    """(x − m)/max(s, 1/√d), m and s the mean and standard deviation of each image's own d values."""

    def forward(self, x: Tensor) -> Tensor:
        values = x.flatten(1)
        std, mean = torch.std_mean(values, dim=1, correction=0, keepdim=True)
        return ((values - mean) / std.clamp_min(values.shape[1] ** -0.5)).view_as(x)


def model_class(name: str, allow_import: Iterable[str] = ()) -> type[nn.Module] | Callable[..., nn.Module]:
    """The network called ``name``: one of :data:`MODELS`, or "package.module:Class" of an allowed package.

    Importing runs code, so a package has to be named in ``allow_import``.

    Raises:
        ModelError: unknown, not allowed, or not importable.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" not in name:
        raise ModelError(unknown_choice("model", name, [*MODELS, "package.module:Class"]))
    module_name, _, attribute = name.partition(":")
    package = module_name.split(".")[0]
    if not package or not attribute:
        raise ModelError(f"model {name!r} is no import path; write package.module:Class")
    if package not in set(allow_import):
        raise ModelError(f"model {name!r} runs code of the package {package!r}: add --allow-import {package}")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # somebody else's module may raise anything
        raise ModelError(f"model {name!r} cannot be imported: {first_line(error)}") from error
    if not callable(found):
        raise ModelError(f"model {name!r} is a {type(found).__name__}, not a class or function")
    return found  # type: ignore[no-any-return]


def check_output(model: nn.Module, x: Tensor, num_classes: int) -> None:
    """Raise ModelError unless the model maps the examples ``x`` [n, ...] to [n, num_classes]."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(x)
    except Exception as error:  # somebody else's forward may raise anything
        reason = first_line(error)
        raise ModelError(f"the model fails on inputs of shape {tuple(x.shape)}: {reason}") from error
    finally:
        model.train(training)
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns a {type(output).__name__}, not a tensor [n, {num_classes}]")
    if output.shape != (len(x), num_classes):
        raise ModelError(
            f"the model returns shape {tuple(output.shape)} for {len(x)} examples, not [n, C] = "
            f"{(len(x), num_classes)}"
        )
