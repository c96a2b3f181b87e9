"""ATTA: stored perturbations are attacked further in the next epoch (Zheng et al. 2020, arXiv 1912.11969)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from tangentlab.attacks import Passes
from tangentlab.attacks.threat import ascent, crafting, cross_entropies, project
from tangentlab.errors import ConfigError
from tangentlab.training.method import Adversarial, Batch, Memory, Perturbations, check_sizes

# Standard deviation of the noise that a stored perturbation begins with.
_START = 0.001


@dataclass(frozen=True)
class ATTATraining(Adversarial):
    """L(θ) = mean CE(f(x*), y), x* the last of ``num_steps`` projected steps from x + δ, δ what the example's
    last attack left (the authors' "MAT" loss).

    δ lies on the example's canvas, before the augmentation: each crop and flip takes its part of it and
    writes it back (section 4.2). It begins at 0.001·N(0, 1), and again every ``reset_epochs`` epochs, or at
    what the method before kept.
    BatchNorm as the authors' code has it: running statistics while crafting, the loss's forward updates the
    buffers.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
        step_size: length of one step, same unit; none for the authors' eps/2 at one step, eps/4 at more.
        num_steps: at least 1.
        reset_epochs: at least 1; none for never.
    """

    eps: float
    step_size: float | None = None
    num_steps: int = 1
    reset_epochs: int | None = 10

    crafting_statistics: str = field(default="running", kw_only=True)
    buffer_updates: tuple[str, ...] = field(default=("loss",), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.eps, self.step_size)
        for name, value in (("num_steps", self.num_steps), ("reset_epochs", self.reset_epochs)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is out of range; at least 1")

    @property
    def crafting_passes(self) -> Passes:
        """A forward and an input backward a step."""
        return Passes(forwards=self.num_steps, input_backwards=self.num_steps)

    def craft(self, model: nn.Module, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The last iterate; its perturbation is stored."""
        step_size = self.step_size or self.eps / (2 if self.num_steps == 1 else 4)

        def start(delta: Tensor) -> None:
            delta.normal_(0, _START, generator=generator)

        kept = Perturbations(memory, batch, start, epochs=self.reset_epochs)
        with crafting(model, batch.x, batch.y) as (x, y):
            x_adv = project(x + kept.read(), x, self.eps)
            for _ in range(self.num_steps):
                gradient = ascent(model, x_adv, partial(cross_entropies, y=y)).gradient
                x_adv = project(x_adv + step_size * gradient.sign(), x, self.eps)
        kept.keep(x_adv - x)
        return x_adv
