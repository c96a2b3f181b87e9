"""Standard training: the cross-entropy of the clean batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tangentlab.attacks import Passes
from tangentlab.training.method import UPDATE, Network


@dataclass(frozen=True)
class Standard:
    """L(θ) = mean CE(f(x), y). BatchNorm's buffers are updated once a step, by the clean batch."""

    @property
    def passes(self) -> Passes:
        """One forward and one full backward."""
        return UPDATE

    def loss(self, network: Network, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy; nothing is drawn."""
        return F.cross_entropy(network.trained(x), y)
