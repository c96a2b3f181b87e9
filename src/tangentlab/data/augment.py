"""Random crops and flips of a batch, drawn for each example, computed at once on the batch's device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tangentlab.errors import ConfigError, unknown_choice
from tangentlab.randomness import drawn

_PADDINGS = {"zero": "constant", "reflect": "reflect"}


@dataclass(frozen=True)
class Placement:
    """Where the pixels of an augmented batch lie on the padded images, the canvases.

    Args:
        rows, columns: [n, h] and [n, w], of each pixel row and column of the batch; None where nothing moves.
        margin: pixels of padding on each side.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    margin: int = 0

    def canvas(self, x: Tensor) -> torch.Size:
        """The shape of one canvas for a batch x [n, ...]."""
        if self.rows is None:
            return x.shape[1:]
        channels, height, width = x.shape[1:]
        return torch.Size((channels, height + 2 * self.margin, width + 2 * self.margin))

    def take(self, canvas: Tensor) -> Tensor:
        """The batch's pixels of the canvases [n, ...]."""
        return canvas if self.rows is None else canvas[self._at(canvas)]

    def put(self, canvas: Tensor, values: Tensor) -> None:
        """Write the batch's pixels into the canvases; the others stay."""
        canvas[self._at(canvas) if self.rows is not None else ...] = values

    def _at(self, canvas: Tensor) -> tuple[Tensor, ...]:
        assert self.rows is not None
        assert self.columns is not None
        # One gather does crop and flip: out[i, c, r, s] = canvas[i, c, rows[i, r], columns[i, s]]
        example = torch.arange(len(canvas), device=canvas.device)[:, None, None, None]
        channel = torch.arange(canvas.shape[1], device=canvas.device)[:, None, None]
        return example, channel, self.rows[:, None, :, None], self.columns[:, None, None, :]


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
        placement = self.place(x, generator=generator)
        if placement.rows is None:
            return x
        padded = F.pad(x, (self.crop,) * 4, mode=_PADDINGS[self.padding]) if self.crop else x
        return placement.take(padded)

    def place(self, x: Tensor, *, generator: torch.Generator) -> Placement:
        """Where the same call would find the pixels of x, of which the shape alone matters.

        Raises:
            ConfigError: as the call does.
        """
        if self.crop == 0 and not self.flip:
            return Placement()
        if x.ndim != 4:
            raise ConfigError(f"x of shape {list(x.shape)} cannot be augmented; expected [n, ch, h, w]")
        n, _, height, width = x.shape
        if self.padding == "reflect" and self.crop >= min(height, width):
            raise ConfigError(
                f"crop={self.crop} cannot be reflected in images of {height}×{width}; "
                f"choose at most {min(height, width) - 1}"
            )

        def draw(high: int) -> Tensor:
            """Integers in 0..high-1, one an example: [n, 1]."""
            numbers = drawn(partial(torch.randint, high), (n, 1), generator)
            # From pinned memory, or the copy would wait for what the device is doing.
            if x.is_cuda and not numbers.is_cuda:
                numbers = numbers.pin_memory()
            return numbers.to(x.device, non_blocking=True)

        rows = torch.arange(height, device=x.device).expand(n, height)
        columns = torch.arange(width, device=x.device).expand(n, width)
        if self.crop:
            rows = rows + draw(2 * self.crop + 1)
            columns = columns + draw(2 * self.crop + 1)
        if self.flip:
            columns = torch.where(draw(2).bool(), columns.flip(1), columns)
        return Placement(rows, columns, self.crop)
