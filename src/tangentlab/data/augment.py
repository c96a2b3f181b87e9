"""Random crops and flips of a batch, drawn for each example, computed at once on the batch's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tangentlab.errors import ConfigError, unknown_choice

_PADDINGS = {"zero": "constant", "reflect": "reflect"}


@dataclass(frozen=True)
class Augmentation:
    """Pad by ``crop`` pixels, cut a window of the old size at random, flip left-right with probability 1/2.

    The usual augmentation of CIFAR is ``Augmentation(crop=4, flip=True)`` (He et al., arXiv:1512.03385,
    Section 4.2).

    Args:
        crop: pixels of padding on each side, the largest shift; 0 for none.
        padding: "zero" (black) or "reflect" (mirrored, the edge not repeated).
        flip: whether to flip.

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    crop: int = 0
    padding: str = "zero"
    flip: bool = False

    def __post_init__(self) -> None:
        if type(self.crop) is not int or self.crop < 0:
            raise ConfigError(f"crop={self.crop!r} is not a number of pixels; choose an integer from 0")
        if self.padding not in _PADDINGS:
            raise ConfigError(unknown_choice("padding", self.padding, _PADDINGS))
        if type(self.flip) is not bool:
            raise ConfigError(f"flip={self.flip!r} is not a truth value; choose from True, False")

    def __call__(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """The augmented batch, of the shape, type and device of ``x`` [n, ch, h, w], contiguous.

        Draws come from ``generator`` alone, on its own device; one on the CPU gives the same augmentation
        on every device. With nothing to do, ``x`` itself is returned and nothing is drawn.

        Raises:
            ConfigError: ``x`` is no batch of images, or too small for the reflection.
        """
        if self.crop == 0 and not self.flip:
            return x
        if x.ndim != 4:
            raise ConfigError(f"x of shape {list(x.shape)} cannot be augmented; expected [n, ch, h, w]")
        n, channels, height, width = x.shape
        if self.padding == "reflect" and self.crop >= min(height, width):
            raise ConfigError(
                f"crop={self.crop} cannot be reflected in images of {height}×{width}; "
                f"choose at most {min(height, width) - 1}"
            )

        def draw(high: int) -> Tensor:
            """Integers in 0..high-1, one an example: [n, 1]."""
            return torch.randint(high, (n, 1), generator=generator, device=generator.device).to(x.device)

        rows = torch.arange(height, device=x.device).expand(n, height)
        columns = torch.arange(width, device=x.device).expand(n, width)
        padded = x
        if self.crop:
            padded = F.pad(x, (self.crop,) * 4, mode=_PADDINGS[self.padding])
            rows = rows + draw(2 * self.crop + 1)
            columns = columns + draw(2 * self.crop + 1)
        if self.flip:
            columns = torch.where(draw(2).bool(), columns.flip(1), columns)
        # One gather does crop and flip: out[i, c, r, s] = padded[i, c, rows[i, r], columns[i, s]]
        example = torch.arange(n, device=x.device)[:, None, None, None]
        channel = torch.arange(channels, device=x.device)[:, None, None]
        return padded[example, channel, rows[:, None, :, None], columns[:, None, None, :]]
