"""Labelled images in memory: a split holds them as bytes, a data set is a training and a test split.

Rows of a table are images one pixel high: [n, 1, 1, features].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tangentlab.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Images [n, ch, h, w] (uint8, 0..scale) and labels [n] (int64).

    Bytes are kept, a quarter of the memory of floats; :meth:`x` gives the floats that a model sees.

    Raises:
        DataError: a tensor has another type or shape, or the counts differ.
    """

    images: Tensor
    labels: Tensor
    scale: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            found = f"{self.images.dtype} {list(self.images.shape)}"
            raise DataError(f"images are {found}; expected torch.uint8 [n, ch, h, w]")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise DataError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)}; expected torch.int64 [n]"
            )
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels")
        if self.scale < 1:
            raise DataError(f"scale={self.scale} is not a positive integer")

    def __len__(self) -> int:
        return len(self.labels)

    def x(
        self, index: Tensor | slice | int | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The images at ``index`` (all for None) as float32 [.., ch, h, w] in [0, 1], on ``device``.

        They travel to the device as bytes. Without ``device`` they stay where the images are.
        """
        if isinstance(index, Tensor):
            index = index.to(self.images.device)
        images = self.images if index is None else self.images[index]
        images = images.to(device).to(torch.float32)
        # By a tensor there: GPUs multiply by the reciprocal of a plain number, which rounds otherwise.
        return images.div_(torch.full((), float(self.scale), device=images.device))

    def select(self, index: Tensor) -> Split:
        """The examples at ``index`` (int64 [m] or bool [n]), in that order."""
        index = index.to(self.images.device)
        return Split(self.images[index], self.labels[index], self.scale)

    def to(self, device: torch.device | str) -> Split:
        """The same examples on ``device``; tensors already there are shared, not copied."""
        return Split(self.images.to(device), self.labels.to(device), self.scale)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split with the same image shape, and the name of each class.

    Raises:
        DataError: the two splits' images differ in shape.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise DataError(
                f"{self.name}: training images are {list(self.train.images.shape[1:])}, "
                f"test images {list(self.test.images.shape[1:])}"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes C; labels are 0..C-1."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (ch, h, w) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def check_labels(labels: list[Any], num_classes: int, path: Path) -> None:
    """Refuse labels that are no integer in 0..num_classes-1, naming the file, the first index and value."""
    for index, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < num_classes:
            raise DataError(f"{path}: label {label!r} at index {index} is not in 0..{num_classes - 1}")
