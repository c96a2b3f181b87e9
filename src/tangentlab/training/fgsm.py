"""Single-step adversarial training without a random start (Goodfellow et al. 2015, section 6).

Cheap, and prone to catastrophic overfitting (Wong et al. 2020): it is here as the method that collapses.
"""

from __future__ import annotations

from dataclasses import dataclass

from tangentlab.attacks import FGSM
from tangentlab.training.method import Attacked


@dataclass(frozen=True)
class FGSMTraining(Attacked):
    """L(θ) = mean CE(f(x + eps·sign ∇ₓCE), y), every example attacked.

    BatchNorm as Andriushchenko & Flammarion (2020) have it: training mode, both forwards update the buffers.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
    """

    eps: float

    @property
    def attack(self) -> FGSM:
        """What crafts the batch; raises ConfigError where eps is out of range."""
        return FGSM(eps=self.eps)
