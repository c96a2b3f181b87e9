"""Fast adversarial training: FGSM from a random start (Wong, Rice & Kolter 2020, arXiv 2001.03994)."""

from __future__ import annotations

from dataclasses import dataclass

from tangentlab.attacks import PGD
from tangentlab.training.method import Attacked


@dataclass(frozen=True)
class FGSMRSTraining(Attacked):
    """L(θ) = mean CE(f(Π(x + η + step_size·sign ∇ₓCE(x + η))), y), η uniform in the ball (algorithm 3).

    BatchNorm as the authors' code has it: training mode, both forwards update the buffers.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
        step_size: length of the step, same unit; none for the authors' 1.25 eps.
    """

    eps: float
    step_size: float | None = None

    @property
    def attack(self) -> PGD:
        """What crafts the batch; raises ConfigError where a setting is out of range."""
        # A step of more than the box's size reaches no further.
        return PGD(self.eps, min(1.0, 1.25 * self.eps) if self.step_size is None else self.step_size, 1)
