"""N-FGSM: a step from noise larger than the ball, unclipped (de Jorge et al. 2022, arXiv 2202.01181)."""

from __future__ import annotations

from dataclasses import dataclass

from tangentlab.attacks import NFGSM
from tangentlab.training.method import Attacked


@dataclass(frozen=True)
class NFGSMTraining(Attacked):
    """L(θ) = mean CE(f(x + η + eps·sign ∇ₓCE(x + η)), y), η ~ U(−k·eps, k·eps): in the box, not in the ball.

    BatchNorm as the authors' code has it: training mode, both forwards update the buffers.

    Args:
        eps: length of the step, in units of inputs in [0, 1].
        noise: k, the noise's half-width in units of eps.
    """

    eps: float
    noise: float = 2.0

    @property
    def attack(self) -> NFGSM:
        """What crafts the batch; raises ConfigError where a setting is out of range."""
        return NFGSM(self.eps, self.noise)
