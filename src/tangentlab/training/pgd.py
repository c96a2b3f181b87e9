"""PGD adversarial training (Madry et al. 2018): the loss at the approximate worst case of each example."""

from __future__ import annotations

from dataclasses import dataclass

from tangentlab.attacks import PGD
from tangentlab.training.method import Attacked


@dataclass(frozen=True)
class PGDTraining(Attacked):
    """L(θ) = mean CE(f(x*), y), x* the last of ``num_steps`` projected steps.

    BatchNorm as Rice et al. (2020, robust_overfitting) have it: training mode while crafting, every forward
    updates the buffers.

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
