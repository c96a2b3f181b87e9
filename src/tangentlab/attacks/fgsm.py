"""The fast gradient sign method: x + eps·sign ∇ₓL, one step from x (Goodfellow et al. 2015, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks.threat import (
    NaNWatch,
    Passes,
    ascent,
    check_eps,
    crafting,
    cross_entropies,
    project,
)


@dataclass(frozen=True)
class FGSM:
    """One signed step of length eps from x itself, without a random start.

    With a random start (FGSM-RS, Wong et al. 2020, algorithm 3) it is ``PGD(eps, 1.25 * eps, num_steps=1)``.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
    """

    eps: float

    def __post_init__(self) -> None:
        check_eps(self.eps)

    @property
    def passes(self) -> Passes:
        """Passes per example."""
        return Passes(forwards=1, input_backwards=1)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """x + eps·sign ∇ₓL(x, y), clipped to [0, 1]; nothing is drawn from ``generator``.

        Raises:
            ModelError: the input gets no gradient, or a NaN.
        """
        watch = NaNWatch()
        with crafting(model, x, y) as (x, y):
            gradient = watch.see(ascent(model, x, lambda z: cross_entropies(z, y)).gradient)
        x_adv = project(x + self.eps * gradient.sign(), x, self.eps)
        watch.refuse()
        return x_adv
