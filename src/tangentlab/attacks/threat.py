"""The linf threat model: the ball of radius eps around x, intersected with the box [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangentlab import modes
from tangentlab.errors import ConfigError


class Passes(NamedTuple):
    """Passes through the network per example: the cost of crafting or of a training step.

    ``cost`` counts forward equivalents: a backward to the inputs costs about one forward, a full backward
    (inputs and parameters) two.
    """

    forwards: int = 0
    input_backwards: int = 0
    full_backwards: int = 0

    @property
    def cost(self) -> int:
        return self.forwards + self.input_backwards + 2 * self.full_backwards

    def plus(self, other: Passes) -> Passes:
        """The sum, count by count."""
        return Passes(*(a + b for a, b in zip(self, other, strict=True)))


@runtime_checkable
class Attack(Protocol):
    """What crafts adversarial inputs; settings are frozen fields.

    An attack runs in the mode it finds the model in. It leaves parameters, ``.grad`` and buffers as they
    were; BatchNorm's buffers move only if the caller is inside ``modes.batchnorm(model, update=True)``.
    """

    @property
    def eps(self) -> float: ...

    @property
    def passes(self) -> Passes:
        """Passes per example."""
        ...

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Inputs in [0, 1], of x's shape, that raise the loss on the labels ``y`` [n]."""
        ...


def check_eps(eps: float, name: str = "eps") -> None:
    """Raise ConfigError unless eps is a number, 0 < eps ≤ 1; 8 is taken for a forgotten /255."""
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise ConfigError(f"{name}={eps!r} is not a number")
    if not 0 < eps <= 1:
        hint = f"; inputs are in [0, 1]: write {eps:g}/255" if 1 < eps <= 255 else ""
        raise ConfigError(f"{name}={eps:g} is out of range (0, 1]{hint}")


def check_generator(generator: torch.Generator | None) -> torch.Generator:
    """Raise ConfigError where a random start has no generator to draw from."""
    if generator is None:
        raise ConfigError(
            "random_start=True needs a generator; pass generator=tangentlab.generator(seed, name)"
        )
    return generator


def project(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """The nearest point of the ball and the box: clamp to [x − eps, x + eps], then to [0, 1]."""
    return torch.clamp(x_adv, x - eps, x + eps).clamp_(0.0, 1.0)


def uniform_start(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """x + U(−eps, eps), clipped to the box; drawn on the generator's device, in fp32 for every precision."""
    noise = torch.rand(x.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return (x + (2 * noise.to(x) - 1) * eps).clamp_(0.0, 1.0)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """∇ₓ of the summed cross-entropy; the parameters' gradients are neither computed nor touched."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(True)
        # Summed, so that one example's gradient does not depend on the size of the batch.
        # Copies in normal mode, because tensors made in inference mode cannot be saved for a backward.
        loss = cross_entropies(model(leaf), y.clone()).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.detach()


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example, [n], in fp32 at least, whatever precision the logits come in."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="none")


@contextmanager
def crafting(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The model in the mode it is in, and x without its graph, for an attack.

    Every buffer is put back at the end, BatchNorm's unless the caller asked for updates; so is the global
    random state that layers such as dropout draw from in training mode.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([x.device] if x.device.type == "cuda" else []))
        if not modes.updates_buffers(model):
            stack.enter_context(modes.buffers_kept(model))
            stack.enter_context(modes.batchnorm(model, update=False))
        yield x.detach()
