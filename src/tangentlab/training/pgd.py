"""PGD adversarial training (Madry et al. 2018): the loss at the approximate worst case of each example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tangentlab.attacks import PGD, Passes
from tangentlab.training.method import UPDATE, Network, adversarial_loss


@dataclass(frozen=True)
class PGDTraining:
    """L(θ) = mean CE(f(x*), y), x* the last of ``num_steps`` projected steps.

    Crafting normalizes with the batch's statistics and leaves BatchNorm's buffers alone; they are updated
    once a step, by the crafted batch.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
        step_size: length of one step, same unit.
        num_steps: at least 1.
        random_start: start from a uniform point of the ball instead of x.
    """

    eps: float
    step_size: float
    num_steps: int = 10
    random_start: bool = True

    @property
    def attack(self) -> PGD:
        """What crafts the batch; raises ConfigError where a setting is out of range."""
        return PGD(self.eps, self.step_size, self.num_steps, random_start=self.random_start)

    def __post_init__(self) -> None:
        _ = self.attack

    @property
    def passes(self) -> Passes:
        """The attack's passes and the update's: 11 forwards, 10 input backwards, 1 full one for PGD-10."""
        return self.attack.passes.plus(UPDATE)

    def loss(self, network: Network, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy on the crafted batch."""
        return adversarial_loss(self.attack, network, x, y, generator=generator)
