"""The fast gradient sign method: x + eps·sign ∇ₓL, one step from x (Goodfellow et al. 2015, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks.threat import Passes, check_eps, crafting, input_gradient, project


@dataclass(frozen=True)
class FGSM:
    """One signed step of length eps from x itself, without a random start.

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
        """x + eps·sign ∇ₓL(x, y), clipped to [0, 1]; nothing is drawn from ``generator``."""
        with crafting(model, x) as x:
            gradient = input_gradient(model, x, y)
        return project(x + self.eps * gradient.sign(), x, self.eps)
