"""TRADES: accuracy and robustness traded against each other (Zhang et al. 2019, arXiv 1901.08573)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangentlab import modes
from tangentlab.attacks import Passes
from tangentlab.attacks.threat import ascent, crafting, gaussian, project
from tangentlab.errors import ConfigError
from tangentlab.training.method import (
    UPDATE,
    Adversarial,
    Batch,
    Memory,
    Network,
    check_sizes,
    check_weight,
)

# Standard deviation of the start around x, where the divergence and its gradient are zero.
_START = 0.001


@dataclass(frozen=True)
class TRADESTraining(Adversarial):
    """L(θ) = mean CE(f(x), y) + beta · mean KL(p(x) ‖ p(x*)), p = softmax f; x* maximises the divergence in
    the ball, in ``num_steps`` signed steps from x + 0.001·N(0, 1).

    BatchNorm as the authors' code has it: running statistics while crafting; the loss's two forwards, first
    the clean one, update the buffers.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
        step_size: length of one step, same unit.
        num_steps: at least 1.
        beta: weight of the divergence, 1/λ in the paper; above 0.
    """

    eps: float
    step_size: float
    num_steps: int = 10
    beta: float = 6.0

    crafting_statistics: str = field(default="running", kw_only=True)
    buffer_updates: tuple[str, ...] = field(default=("loss",), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.eps, self.step_size)
        if self.num_steps < 1:
            raise ConfigError(f"num_steps={self.num_steps} is out of range; at least 1")
        check_weight("beta", self.beta)
        if self.clean_weight:
            raise ConfigError(
                f"clean_weight={self.clean_weight}: TRADES has a clean term; beta weighs the other"
            )

    @property
    def crafting_passes(self) -> Passes:
        """The clean forward that the divergence is taken to, a forward and an input backward a step, and the
        loss's clean pass."""
        return Passes(forwards=1 + self.num_steps, input_backwards=self.num_steps).plus(UPDATE)

    def craft(self, model: nn.Module, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The last iterate."""
        with crafting(model, batch.x, batch.y) as (x, _):
            with modes.branch(model, "clean"):
                clean = _log_probabilities(model(x))

            def divergence(logits: Tensor) -> Tensor:
                return F.kl_div(_log_probabilities(logits), clean, reduction="none", log_target=True).sum(1)

            x_adv = project(x + _START * gaussian(x, generator), x, self.eps)
            for _ in range(self.num_steps):
                gradient = ascent(model, x_adv, divergence).gradient
                x_adv = project(x_adv + self.step_size * gradient.sign(), x, self.eps)
        return x_adv

    def loss(self, network: Network, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The clean cross-entropy and the divergence."""
        x_adv = self.crafted(network, batch, memory=memory, generator=generator)
        with self.updating(network.bare, "loss", branch="clean"):
            clean = network.bare(batch.x)
        divergence = F.kl_div(
            _log_probabilities(self.logits(network, x_adv)),
            _log_probabilities(clean),
            reduction="batchmean",
            log_target=True,
        )
        return self.cross_entropy(clean, batch.y) + self.beta * divergence


def _log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
