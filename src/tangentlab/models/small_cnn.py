"""A small convolutional network with BatchNorm, for digits and Fashion-MNIST.

The defaults are the network of the tier-1 experiments: three convolutions (16, 32, 64) and a hidden layer
of 128.
"""

from __future__ import annotations

from torch import Tensor, nn

from tangentlab.errors import ConfigError


class SmallCNN(nn.Module):
    """[conv 3×3 – BatchNorm – ReLU] × k, then [linear – ReLU] if ``hidden`` > 0, then linear.

    Args:
        input_shape: (channels, height, width) of one example.
        num_classes: C, at least 2.
        widths: output channels of each convolution.
        strides: stride of each convolution, as many as ``widths``.
        hidden: units of the hidden layer; 0 leaves it out.

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
    ) -> None:
        super().__init__()
        if len(widths) != len(strides):
            raise ConfigError(f"widths {widths} and strides {strides} differ in length")
        if min((*widths, *strides, 1)) < 1:
            raise ConfigError(f"widths {widths} and strides {strides} must be at least 1")
        channels, height, width = input_shape
        layers: list[nn.Module] = []
        for out, stride in zip(widths, strides, strict=True):
            # BatchNorm takes the bias out again.
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
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
