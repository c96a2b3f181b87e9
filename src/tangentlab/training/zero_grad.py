"""ZeroGrad: FGSM-RS whose smallest gradient entries are zeroed (Golgooni et al. 2021, arXiv 2103.15476)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tangentlab.attacks import Passes
from tangentlab.attacks.threat import ascent, crafting, cross_entropies, project, uniform_start
from tangentlab.training.method import Adversarial, Batch, Memory, check_share, check_sizes


@dataclass(frozen=True)
class ZeroGradTraining(Adversarial):
    """L(θ) = mean CE(f(Π(x + η + step_size·sign g)), y), g = ∇ₓCE(x + η) without the entries of an example
    that are below its q-quantile of |∇ₓCE|; η uniform in the ball (algorithm 1).

    BatchNorm as the authors' code has it: training mode, both forwards update the buffers.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
        step_size: length of the step, same unit; none for the authors' 2 eps.
        quantile: q in [0, 1), the share of entries that are zeroed.
    """

    eps: float
    step_size: float | None = None
    quantile: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.eps, self.step_size)
        check_share("quantile", self.quantile)

    @property
    def crafting_passes(self) -> Passes:
        """One forward and one input backward."""
        return Passes(forwards=1, input_backwards=1)

    def craft(self, model: nn.Module, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The step from the random start."""
        step_size = 2 * self.eps if self.step_size is None else self.step_size
        with crafting(model, batch.x, batch.y) as (x, y):
            start = uniform_start(x, self.eps, generator)
            gradient = ascent(model, start, partial(cross_entropies, y=y)).gradient
        size = gradient.abs().flatten(1)
        threshold = size.float().quantile(self.quantile, dim=1)
        kept = size >= threshold.to(size.dtype)[:, None]
        return project(start + step_size * gradient.sign() * kept.view_as(gradient), x, self.eps)
