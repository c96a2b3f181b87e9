"""PGD adversarial training (Madry et al. 2018): the loss at the approximate worst case of each example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks import PGD, Passes
from tangentlab.training.method import Adversarial, Batch, Memory


@dataclass(frozen=True)
class PGDTraining(Adversarial):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.attack

    @property
    def crafting_passes(self) -> Passes:
        """The attack's: a forward and an input backward a step."""
        return self.attack.passes

    def craft(self, model: nn.Module, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The attack's last iterate."""
        return self.attack(model, batch.x, batch.y, generator=generator)
