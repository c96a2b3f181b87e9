"""FGSM-PGI: a step from the perturbation of the example's last epoch (Jia et al. 2022, arXiv 2207.08859)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tangentlab.attacks import Passes
from tangentlab.attacks.threat import check_eps, project
from tangentlab.errors import ConfigError
from tangentlab.training.method import UPDATE, Adversarial, Batch, Memory, Network, check_share


@dataclass(frozen=True)
class FGSMPGITraining(Adversarial):
    """FGSM-MEP, the authors' best prior: with δ stored of each example, g = ∇ₓCE(x + δ),

        L(θ) = mean CE(f(x*), y) + λ · mean (f(x*) − f(x + δ))²,  x* = Π(x + δ + eps·sign g),
        m ← decay·m + g/‖g‖₁,  δ ← Π(δ + eps·sign m),

    ‖g‖₁ over the batch. δ begins at the corners ±eps at random, m at zero, and again every ``reset_epochs``
    epochs. δ belongs to the example as it is seen, whatever its crop and flip. BatchNorm as the authors' code
    has it: training mode, both forwards update the buffers.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
        consistency: λ, at least 0.
        decay: in [0, 1).
        reset_epochs: at least 1.
    """

    eps: float
    consistency: float = 10.0
    decay: float = 0.3
    reset_epochs: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eps(self.eps)
        check_share("decay", self.decay)
        if not 0 <= self.consistency < float("inf"):
            raise ConfigError(f"consistency={self.consistency} is out of range; at least 0")
        if self.reset_epochs < 1:
            raise ConfigError(f"reset_epochs={self.reset_epochs} is out of range; at least 1")

    @property
    def crafting_passes(self) -> Passes:
        """A forward that is trained through too, its backward to the inputs, and its full backward."""
        return Passes(input_backwards=1).plus(UPDATE)

    def loss(self, network: Network, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The cross-entropy at x* and the distance of its logits from those at the prior."""
        self.begin(network, batch)
        x = batch.x

        def corners(delta: Tensor) -> None:
            bits = torch.randint(2, delta.shape, generator=generator, device=generator.device)
            delta.copy_((2 * bits - 1) * self.eps)

        shape, epochs = x.shape[1:], self.reset_epochs
        delta = memory.of_examples("prior", batch, shape, corners, epochs=epochs)
        momentum = memory.of_examples("momentum", batch, shape, Tensor.zero_, epochs=epochs)
        prior = project(x + delta, x, self.eps).requires_grad_(True)
        with self.crafting(network.bare):
            logits = network.bare(prior)
        # The graph is kept: the distance is trained through it.
        (gradient,) = torch.autograd.grad(
            self.cross_entropy(logits.float(), batch.y), prior, retain_graph=True
        )
        start = prior.detach()
        norm = batch.share.sum(gradient.abs().sum())
        momentum = self.decay * momentum + gradient / norm.clamp(min=1e-30)
        memory.keep_of_examples("momentum", batch, momentum)
        delta = project(start + self.eps * momentum.sign(), x, self.eps) - x
        memory.keep_of_examples("prior", batch, delta)
        x_adv = project(start + self.eps * gradient.sign(), x, self.eps)
        self.keep(x_adv, batch, memory)
        crafted = self.logits(network, x_adv)
        loss = self.objective(network, batch, crafted)
        return loss + self.consistency * F.mse_loss(crafted.float(), logits.float())
