"""A multilayer perceptron on flattened inputs, with or without BatchNorm."""

from __future__ import annotations

import math

from torch import Tensor, nn


class MLP(nn.Module):
    """flatten – [linear – (BatchNorm) – ReLU] × k – linear.

    Args:
        input_shape: shape of one example; flattened.
        num_classes: C, at least 2.
        widths: units of each hidden layer.
        batchnorm: BatchNorm before each ReLU.

    Maps [n, ...] to logits [n, C].
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        widths: tuple[int, ...] = (256, 256),
        batchnorm: bool = True,
    ) -> None:
        super().__init__()
        units = math.prod(input_shape)
        layers: list[nn.Module] = [nn.Flatten()]
        for out in widths:
            layers += [nn.Linear(units, out, bias=not batchnorm)]
            layers += [nn.BatchNorm1d(out)] if batchnorm else []
            layers += [nn.ReLU()]
            units = out
        self.layers = nn.Sequential(*layers, nn.Linear(units, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits
