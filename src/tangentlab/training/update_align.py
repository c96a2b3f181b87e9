"""Update alignment: single-step training whose updates are kept useful against several steps.

Of this project: the penalty is on the update cosine of tangentlab.probes.update_signals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tangentlab.attacks import Passes
from tangentlab.attacks.threat import ascent, check_eps, cross_entropies, project
from tangentlab.training.method import Adversarial, Batch, Memory, Network, check_weight


@dataclass(frozen=True)
class UpdateAlignTraining(Adversarial):
    """L(θ) = mean CE(f(x_F), y) + λ (1 − cos(g_F, g_P)), x_F = x + eps·sign ∇ₓCE(x), x_P the PGD point of two
    steps of eps/2 from x, g = ∂CE/∂θ of the mean over the batch on either.

    Only g_F is differentiated: a product of the loss's Hessian with one vector. BatchNorm: training mode; the
    forward at x_P counts as crafting, and updates the buffers with it.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
        alignment: λ.
    """

    eps: float
    alignment: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eps(self.eps)
        check_weight("alignment", self.alignment)

    @property
    def crafting_passes(self) -> Passes:
        """Two forwards and input backwards, then g_P; the backward of g_F, and its own."""
        return Passes(forwards=3, input_backwards=2, full_backwards=3)

    def loss(self, network: Network, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The cross-entropy at x_F and the penalty."""
        self.begin(network, batch)
        x, y = batch.x, batch.y

        def losses(logits: Tensor) -> Tensor:
            return cross_entropies(logits, y)

        def gradient(logits: Tensor, *, differentiable: bool) -> Tensor:
            """∂(mean CE)/∂θ of this share, flat."""
            parameters = [parameter for parameter in network.bare.parameters() if parameter.requires_grad]
            found = torch.autograd.grad(
                losses(logits).mean(),
                parameters,
                create_graph=differentiable,
                allow_unused=True,
                materialize_grads=True,
            )
            return torch.cat([part.flatten() for part in found])

        with self.crafting(network.bare):
            direction = ascent(network.bare, x, losses).gradient.sign()
            half = project(x + self.eps / 2 * direction, x, self.eps)
            second = ascent(network.bare, half, losses).gradient.sign()
            several = project(half + self.eps / 2 * second, x, self.eps)
            of_several = gradient(network.bare(several), differentiable=False)
        x_adv = project(x + self.eps * direction, x, self.eps)
        self.keep(x_adv, batch, memory)
        logits = self.logits(network, x_adv)
        own = gradient(logits, differentiable=True)
        cosine, slope = _cosine(
            *(batch.share.gather(g.detach()[None]).mean(dim=0) for g in (own, of_several))
        )
        # Of the whole batch's cosine, with the gradient that is this share's part of its.
        aligned = cosine + slope @ (own - own.detach())
        return self.objective(network, batch, logits) + self.alignment * (1 - aligned)


def _cosine(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """cos(a, b) and its gradient by a."""
    tiny = torch.finfo(a.dtype).tiny
    length = a.norm().clamp(min=tiny)
    along, other = a / length, b / b.norm().clamp(min=tiny)
    cosine = along @ other
    return cosine, (other - cosine * along) / length
