"""PreActResNet-18 for small images (He et al. 2016, "Identity Mappings in Deep Residual Networks").

The variant that adversarial training is usually measured on: 3×3 stem without pooling, four stages of two
blocks, a last BatchNorm before the average (Rice et al. 2020, robust_overfitting). ``width`` scales it; 64
is the published network with 11.2 million parameters.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tangentlab.models.normalization import normalization_layer


class PreActBlock(nn.Module):
    """x ↦ shortcut(x') + conv(ReLU(BN(conv(x')))), x' = ReLU(BN(x)); the identity where shapes agree."""

    def __init__(self, channels: int, out: int, stride: int, normalization: str) -> None:
        super().__init__()
        self.bn1 = normalization_layer(normalization, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn2 = normalization_layer(normalization, out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Conv2d(channels, out, 1, stride, bias=False) if stride != 1 or channels != out else None
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return shortcut + residual


class PreActResNet18(nn.Module):
    """PreActResNet-18.

    Args:
        input_shape: (channels, height, width) of one example; height and width at least 8.
        num_classes: C, at least 2.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        normalization: batch, dual (BatchNorm apart for clean and crafted inputs), group (of four) or none.

    Maps [n, channels, height, width] to logits [n, C].
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: int = 64,
        normalization: str = "batch",
    ) -> None:
        super().__init__()
        channels = width
        self.stem = nn.Conv2d(input_shape[0], width, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        for stage, stride in enumerate((1, 2, 2, 2)):
            out = width * 2**stage
            blocks += [
                PreActBlock(channels, out, stride, normalization),
                PreActBlock(out, out, 1, normalization),
            ]
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.bn = normalization_layer(normalization, channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.bn(self.blocks(self.stem(x))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
