"""Accuracy on a few points, as probes that steer or watch need it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tangentlab import modes
from tangentlab.attacks import Attack


def accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | None = None,
    *,
    generator: torch.Generator | None = None,
    against: nn.Module | None = None,
) -> float:
    """Share of x [n, ...] that ``model`` gets right in evaluation mode, attacked or not.

    Args:
        y: [n], the labels.
        attack: crafts the inputs; None for x itself.
        generator: of the attack's noise.
        against: the network that the attack climbs; None for ``model`` itself.
    """
    source = model if against is None else against
    with modes.evaluation(model), modes.evaluation(source), torch.no_grad():
        fed = x if attack is None else attack(source, x, y, generator=generator)
        return float((model(fed).argmax(dim=1) == y).double().mean())
