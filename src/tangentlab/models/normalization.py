"""What stands between a convolution and its ReLU: BatchNorm, two of them, GroupNorm, or nothing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tangentlab.errors import ConfigError, unknown_choice

GROUPS = 4


class DualBatchNorm2d(nn.Module):
    """Two BatchNorm layers, of statistics and of weights, for clean and for crafted inputs (Xie et al. 2020,
    arXiv 1911.09665).

    ``modes.branch(model, "clean")`` chooses; adversarial methods send each forward through its own branch.
    Otherwise, and so in evaluations, it is the crafted one.

    Args:
        channels: of the input [n, channels, h, w].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = "crafted"
        self.clean, self.crafted = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (self.clean if self.branch == "clean" else self.crafted)(x)
        return result


def _group(channels: int) -> nn.Module:
    if channels % GROUPS:
        raise ConfigError(f"normalization='group' takes channels in multiples of {GROUPS}, not {channels}")
    return nn.GroupNorm(GROUPS, channels)


NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "dual": DualBatchNorm2d,
    "group": _group,
    "none": lambda channels: nn.Identity(),
}


def normalization_layer(name: str, channels: int) -> nn.Module:
    """The layer of that name; raises ConfigError where there is none."""
    if name not in NORMALIZATIONS:
        raise ConfigError(unknown_choice("normalization", name, NORMALIZATIONS))
    return NORMALIZATIONS[name](channels)
