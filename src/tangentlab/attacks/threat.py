"""The threat model: a ball of radius eps around x in the linf or l2 norm, intersected with the box [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangentlab import modes, randomness
from tangentlab.errors import ConfigError, ModelError, unknown_choice

NORMS = ("linf", "l2")

# In fp32 for every precision.
_uniform = partial(torch.rand, dtype=torch.float32)
_gaussian = partial(torch.randn, dtype=torch.float32)

Loss = Callable[[Tensor], Tensor]  # logits [n, C] to the loss of each example, [n]


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
        """Passes per example: exact, or the most there can be where an attack stops at its success."""
        ...

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Inputs in [0, 1], of x's shape, that raise the loss on the labels ``y`` [n]."""
        ...


def check_eps(eps: float, name: str = "eps", *, norm: str = "linf") -> None:
    """Raise ConfigError unless 0 < eps, finite, and in linf eps ≤ 1; 8 is taken for a forgotten /255."""
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise ConfigError(f"{name}={eps!r} is not a number")
    if norm == "l2":
        if not 0 < eps < math.inf:
            raise ConfigError(f"{name}={eps:g} is out of range (0, inf) for norm='l2'")
    elif not 0 < eps <= 1:
        hint = f"; inputs are in [0, 1]: write {eps:g}/255" if 1 < eps <= 255 else ""
        raise ConfigError(f"{name}={eps:g} is out of range (0, 1]{hint}")


def check_inputs(x: Tensor) -> None:
    """Raise ConfigError unless x, of at least one example, holds numbers in [0, 1]."""
    if not x.is_floating_point():
        raise ConfigError(f"x holds {x.dtype}; inputs are floats in [0, 1]")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        raise ConfigError(
            f"x lies in [{low:g}, {high:g}]; inputs are in [0, 1], normalisation belongs in the model"
        )


def check_norm(norm: str) -> None:
    """Raise ConfigError unless the norm is one of ``NORMS``."""
    if norm not in NORMS:
        raise ConfigError(unknown_choice("norm", norm, NORMS))


def check_count(value: int, name: str) -> None:
    """Raise ConfigError unless ``value`` is a whole number, at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not a whole number")
    if value < 1:
        raise ConfigError(f"{name}={value} is out of range; at least 1")


def check_generator(generator: torch.Generator | None) -> torch.Generator:
    """Raise ConfigError where an attack that draws has no generator to draw from."""
    if generator is None:
        raise ConfigError(
            "random_start=True needs a generator; pass generator=tangentlab.generator(seed, name)"
        )
    return generator


def per_example(values: Tensor, x: Tensor) -> Tensor:
    """[n] as [n, 1, …, 1], to go with x."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def lengths(delta: Tensor, norm: str) -> Tensor:
    """The norm of each example's perturbation, [n]."""
    flat = delta.flatten(1)
    # Scaled by the largest entry: squares of gradients near 1e-30 would vanish in fp32.
    largest = flat.abs().amax(dim=1)
    if norm == "linf":
        return largest
    scale = largest.clamp_min(torch.finfo(delta.dtype).tiny)
    return scale * (flat / scale[:, None]).square().sum(dim=1).sqrt()


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The direction of unit norm with the largest slope: sign g (linf), g/‖g‖₂ (l2); 0 where g is 0."""
    if norm == "linf":
        return gradient.sign()
    tiny = torch.finfo(gradient.dtype).tiny
    scaled = gradient / per_example(lengths(gradient, "linf").clamp_min(tiny), gradient)
    return scaled / per_example(lengths(scaled, "l2").clamp_min(tiny), gradient)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """Back into the ball, then into the box; the result is in both, because x is in the box.

    In linf it is the nearest such point. In l2 the perturbation is scaled to length eps at most and the box
    cuts off what sticks out, which only shortens it: a point of both sets, inside the ball where the box
    cuts, not the nearest one. The other order would leave the box. (The nearest one needs a root search per
    example and step; the field, AutoAttack included, goes without.)
    """
    if norm == "linf":
        return torch.clamp(x_adv, x - eps, x + eps).clamp_(0.0, 1.0)
    delta = x_adv - x
    shrink = (eps / lengths(delta, norm).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1.0)
    return (x + delta * per_example(shrink, x)).clamp_(0.0, 1.0)


def uniform_start(x: Tensor, eps: float, generator: torch.Generator, norm: str = "linf") -> Tensor:
    """A uniform point of the ball around x, clipped to the box.

    linf: x + U(−eps, eps). l2: a Gaussian direction, of length eps·U(0, 1)^(1/d). Drawn on the generator's
    device, in fp32 for every precision.
    """
    if norm == "linf":
        return (x + uniform_noise(x, eps, generator)).clamp_(0.0, 1.0)
    radius = randomness.drawn(_uniform, (len(x),), generator)
    radius = radius.pow(1 / max(x[0].numel(), 1)).to(x) if len(x) else radius.to(x)
    return (x + eps * per_example(radius, x) * steepest(gaussian(x, generator), norm)).clamp_(0.0, 1.0)


def uniform_noise(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """U(−eps, eps) of x's shape, not clipped to the box."""
    return (2 * uniform(x, generator) - 1) * eps


def uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """U(0, 1) of x's shape, device and precision."""
    return randomness.drawn(_uniform, x.shape, generator).to(x)


def gaussian(x: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) of x's shape, device and precision."""
    return randomness.drawn(_gaussian, x.shape, generator).to(x)


class Ascent(NamedTuple):
    """What one forward and one backward tell: logits [n, C], loss of each example [n], its gradient."""

    logits: Tensor
    losses: Tensor
    gradient: Tensor


def ascent(model: nn.Module, x: Tensor, loss: Loss) -> Ascent:
    """∇ₓ of the summed loss; the parameters' gradients are neither computed nor touched.

    Raises:
        ModelError: no path with gradients leads from the output back to the input, or the output is not
            [n, C].
    """
    with torch.inference_mode(False), torch.enable_grad():
        # A copy in normal mode, because tensors made in inference mode cannot be saved for a backward.
        leaf = x.detach().clone().requires_grad_(True)
        logits = model(leaf)
        losses = loss(check_logits(logits, leaf))
        gradient: Tensor | None = None
        if losses.requires_grad:
            # Summed, so that one example's gradient does not depend on the size of the batch.
            (gradient,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
    if gradient is None:
        raise ModelError(
            f"{type(model).__name__} passes no gradient to its input (is the input detached, or the "
            "forward under no_grad?): a gradient attack would report robustness that is not there"
        )
    return Ascent(logits.detach(), losses.detach(), gradient.detach())


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """The logits [n, C] at x, without a graph."""
    with torch.no_grad():
        return check_logits(model(x), x)


def check_logits(logits: Tensor, x: Tensor) -> Tensor:
    """Raise ModelError unless the model's output is [n, C]."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model's output is {found} for {len(x)} inputs; it must be [n, C]")
    return logits


class NaNGradientError(ModelError):
    """The loss or its gradient at the input is NaN: in a training loop, a sign that it has diverged."""


# Where a training loop collects what its attacks' watches saw, within ``nan_collected``.
_collected: ContextVar[list[Tensor] | None] = ContextVar("_collected", default=None)


@contextmanager
def nan_collected() -> Iterator[list[Tensor]]:
    """Attacks in the body do not raise NaNGradientError, which waits for the device: each adds to the list
    a scalar tensor, whether it saw a NaN."""
    collected: list[Tensor] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


class NaNWatch:
    """Collects, without waiting for the device, which examples had a NaN; ``refuse`` waits once and raises.

    Needed because sign(NaN) is 0 in PyTorch: in linf a NaN gradient would pass for a zero one.
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def see(self, values: Tensor) -> Tensor:
        """Look at ``values`` [n, …], a gradient or losses, and hand them on."""
        nan = values.flatten(1).amax(dim=1).isnan() if values.dim() > 1 else values.isnan()
        self._seen = nan if self._seen is None else self._seen | nan
        return values

    def refuse(self) -> None:
        """Raise NaNGradientError if there was a NaN, with the number of examples."""
        if self._seen is None:
            return
        if (collected := _collected.get()) is not None:
            collected.append(self._seen.any())
        elif count := int(self._seen.sum()):
            raise NaNGradientError(
                f"the loss or its gradient at the input is NaN for {count} of {len(self._seen)} examples; "
                "look for NaN in inputs and parameters, and for overflow"
            )


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example, [n], in fp32 at least, whatever precision the logits come in."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="none")


@contextmanager
def crafting(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The model in the mode it is in, x without its graph, and y, for an attack.

    Every buffer is put back at the end, BatchNorm's unless the caller asked for updates; so is the global
    random state that layers such as dropout draw from in training mode. Inside, no graph is kept but where
    an attack asks for a gradient, and inference mode is off.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([x.device] if x.device.type == "cuda" else []))
        if not modes.updates_buffers(model):
            stack.enter_context(modes.buffers_kept(model))
            stack.enter_context(modes.batchnorm(model, update=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        # Tensors made in inference mode cannot be saved for a backward.
        yield x.detach().clone() if x.is_inference() else x.detach(), y.clone() if y.is_inference() else y
