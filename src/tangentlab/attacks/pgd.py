"""Projected gradient descent on the linf ball (Madry et al. 2018, section 2.1).

x_{k+1} = Π(x_k + step_size·sign ∇ₓL(x_k, y)), Π the projection on the ball and the box.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks.threat import (
    Passes,
    check_eps,
    check_generator,
    crafting,
    cross_entropies,
    input_gradient,
    project,
    uniform_start,
)
from tangentlab.errors import ConfigError


@dataclass(frozen=True)
class PGD:
    """``num_steps`` signed steps with projection; the last iterate is returned.

    With several restarts, of the last iterates the one with the largest loss is returned, example by
    example.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
        step_size: length of one step, same unit.
        num_steps: at least 1.
        num_restarts: at least 1; more than one needs a random start.
        random_start: start from a uniform point of the ball instead of x.
    """

    eps: float
    step_size: float
    num_steps: int = 10
    num_restarts: int = 1
    random_start: bool = True

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_eps(self.step_size, "step_size")
        if self.num_steps < 1:
            raise ConfigError(f"num_steps={self.num_steps} is out of range; at least 1")
        if self.num_restarts < 1 or (self.num_restarts > 1 and not self.random_start):
            raise ConfigError(
                f"num_restarts={self.num_restarts} with random_start={self.random_start}: at least 1, "
                "and more than 1 only with random_start=True"
            )

    @property
    def passes(self) -> Passes:
        """Passes per example; each restart beyond one adds a forward to compare the losses."""
        steps = self.num_steps * self.num_restarts
        return Passes(
            forwards=steps + (self.num_restarts if self.num_restarts > 1 else 0), input_backwards=steps
        )

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The last iterate; random starts are drawn from ``generator``.

        Raises:
            ConfigError: random_start without a generator.
        """
        if self.random_start:
            generator = check_generator(generator)
        with crafting(model, x) as x:
            best = self._climb(model, x, y, generator)
            if self.num_restarts == 1:
                return best
            best_loss = _losses(model, best, y)
            for _ in range(self.num_restarts - 1):
                candidate = self._climb(model, x, y, generator)
                loss = _losses(model, candidate, y)
                better = loss > best_loss
                best = torch.where(better.reshape(-1, *[1] * (x.dim() - 1)), candidate, best)
                best_loss = torch.where(better, loss, best_loss)
        return best

    def _climb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        start = x if generator is None or not self.random_start else uniform_start(x, self.eps, generator)
        x_adv = project(start, x, self.eps)
        for _ in range(self.num_steps):
            gradient = input_gradient(model, x_adv, y)
            x_adv = project(x_adv + self.step_size * gradient.sign(), x, self.eps)
        return x_adv


@torch.no_grad()
def _losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropies(model(x), y)
