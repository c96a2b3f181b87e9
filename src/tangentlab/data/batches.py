"""Training batches as a pure function of the step: what resumes at a step continues as if never stopped."""

from __future__ import annotations

import torch
from torch import Tensor

from tangentlab.data.augment import Augmentation, Placement
from tangentlab.data.dataset import Split
from tangentlab.errors import ConfigError
from tangentlab.randomness import generator


class Batches:
    """Shuffled, augmented batches of ``split``, whose images live on ``device`` as bytes, once.

    Each epoch is a new order of all examples; the last incomplete batch is dropped. Process ``rank`` of
    ``world_size`` takes its contiguous part of each batch: together they are the batch of a single process.

    Args:
        batch_size: examples a step over all processes.
        seed: of the streams "order" (epoch) and "augment" (step).

    Raises:
        ConfigError: the batch does not fit the split or does not divide by ``world_size``, or ``rank`` is
            out of range.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 1 <= batch_size <= len(split):
            raise ConfigError(f"batch_size={batch_size} is out of range; choose 1..{len(split)}")
        if world_size < 1 or batch_size % world_size:
            raise ConfigError(f"batch_size={batch_size} does not divide by world_size={world_size}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} is out of range; choose 0..{world_size - 1}")
        self._split = split.to(device)
        self._batch_size, self._seed, self._augmentation = batch_size, seed, augmentation
        self._rank, self._share = rank, batch_size // world_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in the split."""
        return len(self._split) // self._batch_size

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch of ``step`` (from 0) on the device: ``x`` float32 [b, ch, h, w] in [0, 1], contiguous,
        labels ``y`` int64 [b], and ``index`` int64 [b], their positions in the split; b = batch_size /
        world_size.

        Raises:
            ConfigError: ``step`` is negative.
        """
        if step < 0:
            raise ConfigError(f"step={step} is out of range; steps count from 0")
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self._batch_size + self._rank * self._share
        index = self._permutation(epoch)[start : start + self._share]
        x = self._augmentation(self._split.x(index), generator=self._random(step))
        return x, self._split.labels[index], index

    def placement(self, step: int, x: Tensor) -> Placement:
        """Where the pixels of that step's ``x`` lie on the padded images."""
        return self._augmentation.place(x, generator=self._random(step))

    def _random(self, step: int) -> torch.Generator:
        return generator(self._seed, "augment", step, part=(self._rank, self._batch_size // self._share))

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            # Drawn on the CPU, so that every device sees the same order.
            order = torch.randperm(len(self._split), generator=generator(self._seed, "order", epoch))
            self._epoch, self._order = epoch, order.to(self._split.labels.device)
        return self._order
