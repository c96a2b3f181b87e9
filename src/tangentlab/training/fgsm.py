"""Single-step adversarial training without a random start (Goodfellow et al. 2015, section 6).

Cheap, and prone to catastrophic overfitting (Wong et al. 2020): it is here as the method that collapses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tangentlab.attacks import FGSM, Passes
from tangentlab.training.method import UPDATE, Network, adversarial_loss


@dataclass(frozen=True)
class FGSMTraining:
    """L(θ) = mean CE(f(x + eps·sign ∇ₓCE), y), every example attacked, no clean term.

    Crafting normalizes with the batch's statistics and leaves BatchNorm's buffers alone; they are updated
    once a step, by the crafted batch.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
    """

    eps: float

    @property
    def attack(self) -> FGSM:
        """What crafts the batch; raises ConfigError where eps is out of range."""
        return FGSM(eps=self.eps)

    def __post_init__(self) -> None:
        _ = self.attack

    @property
    def passes(self) -> Passes:
        """The attack's passes and the update's."""
        return self.attack.passes.plus(UPDATE)

    def loss(self, network: Network, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy on the crafted batch."""
        return adversarial_loss(self.attack, network, x, y, generator=generator)
