"""Standard training: the cross-entropy of the clean batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tangentlab.attacks import Passes
from tangentlab.training.method import UPDATE, Batch, Memory, Network, check_share


@dataclass(frozen=True)
class Standard:
    """L(θ) = mean CE(f(x), y). BatchNorm's buffers are updated once a step, by the clean batch.

    Args:
        label_smoothing: s in [0, 1): the loss's targets are (1 − s) one-hot + s/C.
    """

    label_smoothing: float = 0.0

    replays: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_share("label_smoothing", self.label_smoothing)

    @property
    def passes(self) -> Passes:
        """One forward and one full backward."""
        return UPDATE

    def loss(self, network: Network, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy; nothing is drawn."""
        return F.cross_entropy(network.trained(batch.x), batch.y, label_smoothing=self.label_smoothing)

    def finish(self, network: Network, batch: Batch) -> None:
        """Nothing follows the update."""
