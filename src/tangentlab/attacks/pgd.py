"""Projected gradient descent on the linf or l2 ball (Madry et al. 2018, section 2.1).

x_{k+1} = Π(x_k + step_size·d(∇ₓL(x_k, y))), Π the projection on the ball and the box, d(g) = sign g in linf
and g/‖g‖₂ in l2, example by example.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks.threat import (
    NaNWatch,
    Passes,
    ascent,
    check_count,
    check_eps,
    check_generator,
    check_norm,
    crafting,
    cross_entropies,
    per_example,
    predicted,
    project,
    steepest,
    uniform_start,
)
from tangentlab.errors import ConfigError


@dataclass(frozen=True)
class PGD:
    """``num_steps`` steps of steepest ascent with projection; the last iterate is returned.

    With several restarts, of the last iterates the one with the largest loss is returned, example by
    example. The loss is the cross-entropy on the labels ``y``, or minus it if ``targeted``: ``y`` are then
    the classes to reach. An example whose gradient is exactly 0 (a saturated softmax) stays where it is.
    One step of 1.25·eps from a random start is FGSM-RS (Wong et al. 2020).

    Args:
        eps: radius of the ball, in units of inputs in [0, 1].
        step_size: length of one step in the same norm and unit.
        num_steps: at least 1.
        num_restarts: at least 1; more than one needs a random start.
        random_start: start from a uniform point of the ball instead of x.
        norm: "linf" or "l2".
        targeted: lower the loss on ``y`` instead of raising it.
    """

    eps: float
    step_size: float
    num_steps: int = 10
    num_restarts: int = 1
    random_start: bool = True
    norm: str = "linf"
    targeted: bool = False

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_eps(self.eps, norm=self.norm)
        check_eps(self.step_size, "step_size", norm=self.norm)
        check_count(self.num_steps, "num_steps")
        if self.num_restarts < 1 or (self.num_restarts > 1 and not self.random_start):
            raise ConfigError(
                f"num_restarts={self.num_restarts} with random_start={self.random_start}: at least 1, "
                "and more than 1 only with random_start=True"
            )

    @property
    def passes(self) -> Passes:
        """Passes per example; several restarts add a forward each to compare the losses."""
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
            ModelError: the input gets no gradient, or a NaN.
        """
        if self.random_start:
            generator = check_generator(generator)
        watch = NaNWatch()
        with crafting(model, x, y) as (x, y):
            best = self._climb(model, x, y, generator, watch)
            if self.num_restarts > 1:
                best_loss = self._losses(predicted(model, best), y)
                for _ in range(self.num_restarts - 1):
                    candidate = self._climb(model, x, y, generator, watch)
                    loss = self._losses(predicted(model, candidate), y)
                    better = loss > best_loss
                    best = torch.where(per_example(better, x), candidate, best)
                    best_loss = torch.where(better, loss, best_loss)
        watch.refuse()
        return best

    def _climb(
        self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None, watch: NaNWatch
    ) -> Tensor:
        x_adv = x
        if generator is not None and self.random_start:
            x_adv = uniform_start(x, self.eps, generator, self.norm)
        x_adv = project(x_adv, x, self.eps, self.norm)
        for _ in range(self.num_steps):
            gradient = watch.see(ascent(model, x_adv, lambda logits: self._losses(logits, y)).gradient)
            x_adv = project(x_adv + self.step_size * steepest(gradient, self.norm), x, self.eps, self.norm)
        return x_adv

    def _losses(self, logits: Tensor, y: Tensor) -> Tensor:
        losses = cross_entropies(logits, y)
        return -losses if self.targeted else losses
