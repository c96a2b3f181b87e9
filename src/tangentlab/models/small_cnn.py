"""A small convolutional network, by default with BatchNorm, for digits and Fashion-MNIST.

The defaults are the network of the tier-1 experiments: three convolutions (16, 32, 64) and a hidden layer
of 128.
"""

from __future__ import annotations

from torch import Tensor, nn

from tangentlab.errors import ConfigError
from tangentlab.models.normalization import normalization_layer


class SmallCNN(nn.Module):
    """[conv 3×3 – normalization – ReLU] × k, then [linear – ReLU] if ``hidden`` > 0, then linear.

    Args:
        input_shape: (channels, height, width) of one example.
        num_classes: C, at least 2.
        widths: output channels of each convolution.
        strides: stride of each convolution, as many as ``widths``.
        hidden: units of the hidden layer; 0 leaves it out.
        normalization: batch, dual (BatchNorm apart for clean and crafted inputs), group (of four) or none.

    Maps [n, channels, height, width] to logits [n, C].
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        widths: tuple[int, ...] = (16, 32, 64),
        strides: tuple[int, ...] = (1, 2, 2),
        hidden: int = 128,
        normalization: str = "batch",
    ) -> None:
        super().__init__()
        if len(widths) != len(strides):
            raise ConfigError(f"widths {widths} and strides {strides} differ in length")
        if min((*widths, *strides, 1)) < 1:
            raise ConfigError(f"widths {widths} and strides {strides} must be at least 1")
        channels, height, width = input_shape
        layers: list[nn.Module] = []
        for out, stride in zip(widths, strides, strict=True):
            # A normalization has its own; BatchNorm would take the convolution's out again.
            bias = normalization == "none"
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=bias)]
            layers += [normalization_layer(normalization, out), nn.ReLU()]
            channels, height, width = out, -(-height // stride), -(-width // stride)
        self.features = nn.Sequential(*layers, nn.Flatten())
        units = channels * height * width
        head: list[nn.Module] = []
        if hidden:
            head, units = [nn.Linear(units, hidden), nn.ReLU()], hidden
        self.head = nn.Sequential(*head, nn.Linear(units, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits
