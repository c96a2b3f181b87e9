"""Free adversarial training: one backward updates the weights and the perturbation (Shafahi et al. 2019).

arXiv 1904.12843, algorithm 1; as Wong et al. (2020, fast_adversarial) run it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks import Passes
from tangentlab.attacks.threat import project
from tangentlab.errors import ConfigError
from tangentlab.training.method import Adversarial, Batch, Memory, check_sizes


@dataclass(frozen=True)
class FreeTraining(Adversarial):
    """Each batch is taken ``replays`` steps in a row; step k minimises mean CE(f(x + δ_k), y) and sets
    δ_{k+1} = Π(δ_k + step_size·sign ∇ₓCE(x + δ_k)). δ begins at zero and goes on into the next batch.

    An epoch is ``replays`` times as many updates; at equal cost a run takes as many epochs fewer. BatchNorm's
    buffers are updated once a step. A clean loss beside (clean_weight) costs its own pass.

    Args:
        eps: radius of the linf ball, in units of inputs in [0, 1].
        step_size: length of a step, same unit; none for the authors' eps.
        replays: m, at least 1.
    """

    eps: float
    step_size: float | None = None
    replays: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.eps, self.step_size)
        if self.replays < 1:
            raise ConfigError(f"replays={self.replays} is out of range; at least 1")

    @property
    def crafting_passes(self) -> Passes:
        """None: the loss's own backward crafts the next batch."""
        return Passes()

    def craft(self, model: nn.Module, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """x + δ_k; its gradient, when the loss's backward brings it, moves δ."""
        x, step_size = batch.x, self.eps if self.step_size is None else self.step_size
        delta = memory.of_batch("delta", batch)
        if delta is None:
            delta = torch.zeros_like(x)
        x_adv = project(x + delta, x, self.eps).requires_grad_(True)

        def arrived(gradient: Tensor) -> None:
            moved = project(x_adv.detach() + step_size * gradient.sign(), x, self.eps)
            memory.keep_of_batch("delta", batch, moved - x)

        x_adv.register_hook(arrived)
        return x_adv
