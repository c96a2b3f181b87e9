"""N-FGSM: one long step from a noisier start, without projection (de Jorge et al. 2022, algorithm 1).

x_adv = x + η + eps·sign ∇ₓL(x + η, y), η ~ U(−k·eps, k·eps), k = 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks.threat import (
    NaNWatch,
    Passes,
    ascent,
    check_eps,
    check_generator,
    crafting,
    cross_entropies,
    uniform_start,
)
from tangentlab.errors import ConfigError


@dataclass(frozen=True)
class NFGSM:
    """Noise that the step is added to, not projected away: cheap training without catastrophic overfitting.

    The result is in the box but **not** in the eps-ball: |x_adv − x| ≤ (noise + 1)·eps, given as ``bound``.
    Meant for training; as an evaluation it would count perturbations that the threat model excludes.
    As in the authors' code the noisy point is clipped to [0, 1] before the gradient is taken.

    Args:
        eps: length of the step, in units of inputs in [0, 1].
        noise: k, the noise's half-width in units of eps.
    """

    eps: float
    noise: float = 2.0

    def __post_init__(self) -> None:
        check_eps(self.eps)
        if isinstance(self.noise, bool) or not isinstance(self.noise, (int, float)):
            raise ConfigError(f"noise={self.noise!r} is not a number")
        if not 0 < self.noise * self.eps <= 1:
            raise ConfigError(
                f"noise={self.noise:g} is out of range; choose 0 < noise·eps ≤ 1, 2 in the paper"
            )

    @property
    def bound(self) -> float:
        """The largest |x_adv − x|, (noise + 1)·eps."""
        return (self.noise + 1) * self.eps

    @property
    def passes(self) -> Passes:
        """Passes per example."""
        return Passes(forwards=1, input_backwards=1)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The stepped noisy point, clipped to [0, 1]; the noise is drawn from ``generator``.

        Raises:
            ConfigError: no generator.
            ModelError: the input gets no gradient, or a NaN.
        """
        generator = check_generator(generator)
        watch = NaNWatch()
        with crafting(model, x, y) as (x, y):
            noisy = uniform_start(x, self.noise * self.eps, generator)
            gradient = watch.see(ascent(model, noisy, lambda z: cross_entropies(z, y)).gradient)
        x_adv = (noisy + self.eps * gradient.sign()).clamp_(0.0, 1.0)
        watch.refuse()
        return x_adv
