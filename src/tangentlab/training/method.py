"""What a training method is: settings that turn a batch into the loss that the step minimises."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangentlab.attacks import Attack, Passes


class Network(NamedTuple):
    """The network as a step sees it.

    Args:
        bare: the module itself, for crafting: no data-parallel wrapper, no hooks.
        trained: what the loss goes through; under data-parallel training the wrapper around ``bare``.
    """

    bare: nn.Module
    trained: nn.Module


@runtime_checkable
class Method(Protocol):
    """Settings are frozen fields; no state lives here.

    The network comes in training mode. What a method's crafting and its loss do to BatchNorm's buffers is
    part of the method, and its docstring says it.
    """

    @property
    def passes(self) -> Passes:
        """Passes per example and step, the update's own included."""
        ...

    def loss(self, network: Network, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """The scalar loss of the batch x [n, ...] in [0, 1], y [n]; random draws from ``generator`` alone."""
        ...


UPDATE = Passes(forwards=1, full_backwards=1)
"""The passes of one plain step: a forward and a full backward."""


def adversarial_loss(
    attack: Attack, network: Network, x: Tensor, y: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Mean cross-entropy on the batch that ``attack`` crafts from the bare network as it stands."""
    x_adv = attack(network.bare, x, y, generator=generator)
    return F.cross_entropy(network.trained(x_adv), y)
