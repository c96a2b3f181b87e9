"""GradAlign: single-step training whose input gradients are kept aligned (Andriushchenko & Flammarion 2020).

arXiv 2007.02617, equation 5, as their code has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tangentlab.attacks import Passes
from tangentlab.attacks.threat import check_eps, cross_entropies, project, uniform_noise
from tangentlab.training.method import Adversarial, Batch, Memory, Network, check_weight


@dataclass(frozen=True)
class GradAlignTraining(Adversarial):
    """L(θ) = mean CE(f(x*), y) + λ (1 − mean cos(∇ₓCE(x), ∇ₓCE(x + η))), x* = x + eps·sign ∇ₓCE(x), η uniform
    in the ball, x + η not clipped.

    Only the gradient at x + η is differentiated. Examples one of whose gradients is zero are left out of the
    mean. BatchNorm: training mode; here the forward at x + η counts as crafting, and updates the buffers with
    it.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
        alignment: λ; the authors' 0.2 at eps = 8/255 and 2 at 16/255.
    """

    eps: float
    alignment: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eps(self.eps)
        check_weight("alignment", self.alignment)

    @property
    def crafting_passes(self) -> Passes:
        """Two forwards and input backwards; the second pair is differentiated: two full backwards."""
        return Passes(forwards=2, input_backwards=2, full_backwards=2)

    def loss(self, network: Network, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The cross-entropy at the FGSM point and the penalty."""
        self.begin(network, batch)
        x = batch.x
        with self.crafting(network.bare):
            at_x = self._gradient(network, x, batch.y, differentiable=False)
            start = x + uniform_noise(x, self.eps, generator)
            at_start = self._gradient(network, start, batch.y, differentiable=True)
        x_adv = project(x + self.eps * at_x.sign(), x, self.eps)
        self.keep(x_adv, batch, memory)
        loss = self.objective(network, batch, self.logits(network, x_adv))
        a, b = at_x.flatten(1), at_start.flatten(1)
        there = ((a != 0).any(1) & (b != 0).any(1)).to(a.dtype)
        cosines = (F.cosine_similarity(a, b, dim=1, eps=torch.finfo(a.dtype).tiny) * there).sum()
        aligned = cosines / there.sum().clamp(min=1)
        return loss + self.alignment * (1 - aligned)

    def _gradient(self, network: Network, x: Tensor, y: Tensor, *, differentiable: bool) -> Tensor:
        leaf = x.detach().clone().requires_grad_(True)
        loss = cross_entropies(network.bare(leaf), y).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=differentiable)
        return gradient
