"""Auto-PGD: PGD that halves its step size when it stops gaining (Croce & Hein 2020, algorithm 1).

z = Π(x_k + η d(∇f(x_k))),  x_{k+1} = Π(x_k + α(z − x_k) + (1 − α)(x_k − x_{k−1})),  α = 0.75.

η is 2·eps at first; at checkpoints it is halved where the loss grew too rarely, and the ascent goes on from
the best point so far.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks.threat import (
    Loss,
    NaNWatch,
    Passes,
    ascent,
    check_count,
    check_eps,
    check_generator,
    check_norm,
    crafting,
    cross_entropies,
    gaussian,
    lengths,
    per_example,
    predicted,
    project,
    steepest,
    uniform,
)
from tangentlab.errors import ConfigError, ModelError, unknown_choice

LOSSES = ("ce", "dlr", "dlr-targeted")
RHO = 0.75  # share of the steps since the last checkpoint that must gain
MOMENTUM = 0.75  # α


@dataclass(frozen=True)
class APGD:
    """Ascent without a step size to choose; the best point is returned, not the last.

    Losses, with z the logits and π their descending order:

    - "ce": the cross-entropy;
    - "dlr": −(z_y − max_{i≠y} z_i) / (z_π1 − z_π3), which does not change when the logits are scaled;
    - "dlr-targeted": −(z_y − z_t) / (z_π1 − (z_π3 + z_π4)/2), one ascent for each of the
      ``num_target_classes`` likeliest other classes t, on the examples that are still classified correctly.

    "dlr" needs three classes and "dlr-targeted" four. With fewer the next of "dlr-targeted", "dlr", "ce" that
    is defined is used, with a warning.

    Returned is, example by example, the misclassified iterate of the largest loss, or, where none is
    misclassified, the iterate of the largest loss. Examples whose gradient is exactly 0 stay where they are.

    Args:
        eps: radius of the ball, in units of inputs in [0, 1].
        num_steps: at least 1; 100 in the paper.
        norm: "linf" or "l2".
        loss: one of ``LOSSES``.
        num_target_classes: of "dlr-targeted"; C − 1 where there are fewer.
    """

    eps: float
    num_steps: int = 100
    norm: str = "linf"
    loss: str = "ce"
    num_target_classes: int = 9

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_eps(self.eps, norm=self.norm)
        check_count(self.num_steps, "num_steps")
        check_count(self.num_target_classes, "num_target_classes")
        if self.loss not in LOSSES:
            raise ConfigError(unknown_choice("loss", self.loss, LOSSES))

    @property
    def passes(self) -> Passes:
        """Passes per example; the most there can be for "dlr-targeted", which leaves out fooled examples."""
        if self.loss != "dlr-targeted":
            # The last iterate needs a loss, not a gradient: the authors' code takes both.
            return Passes(forwards=self.num_steps + 1, input_backwards=self.num_steps)
        return Passes(
            forwards=1 + self.num_target_classes * (self.num_steps + 1),
            input_backwards=self.num_target_classes * self.num_steps,
        )

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The best iterate; starts on the ball's surface are drawn from ``generator``.

        Raises:
            ConfigError: no generator.
            ModelError: the input gets no gradient or a NaN, or the model has one class.
        """
        generator = check_generator(generator)
        with crafting(model, x, y) as (x, y):
            if self.loss == "dlr-targeted":
                return self._targeted(model, x, y, generator)
            return self._climb(model, x, y, generator, _Untargeted(self.loss, y)).x

    def _targeted(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        logits = predicted(model, x)
        if logits.shape[1] < 4:
            return self._climb(model, x, y, generator, _Untargeted(self.loss, y)).x
        targets = likeliest_others(logits, y, self.num_target_classes)
        x_adv = x.clone()
        dtype = torch.promote_types(logits.dtype, torch.float32)
        best = logits.new_full((len(x),), -torch.inf, dtype=dtype)
        left = torch.arange(len(x), device=x.device)
        for number in range(targets.shape[1]):
            found = self._climb(model, x[left], y[left], generator, _Targeted(y[left], targets[left, number]))
            better = found.fooled | (found.losses > best[left])
            x_adv[left[better]] = found.x[better]
            best[left[better]] = found.losses[better]
            left = left[~found.fooled]
            if not len(left):
                break
        return x_adv

    def _climb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, loss: Loss) -> _Best:
        watch = NaNWatch()
        x_adv = surface_start(x, self.eps, generator, self.norm)
        before = x_adv
        now = ascent(model, x_adv, loss)
        watch.see(now.losses)
        # The ascent's own best: where it returns to when it halves the step.
        top, top_losses, top_gradient = x_adv, now.losses, now.gradient
        kept = _Best(x_adv, now.losses, now.logits.argmax(dim=1) != y)
        losses, gradient = now.losses, now.gradient
        step_size = x.new_full((len(x),), 2 * self.eps)
        gains = torch.zeros_like(losses)
        last = 0
        halved = torch.zeros_like(losses, dtype=torch.bool)
        top_at_last = top_losses
        ends = set(checkpoints(self.num_steps))
        for step in range(self.num_steps):
            watch.see(gradient)
            z = project(
                x_adv + per_example(step_size, x) * steepest(gradient, self.norm), x, self.eps, self.norm
            )
            if step:
                z = x_adv + MOMENTUM * (z - x_adv) + (1 - MOMENTUM) * (x_adv - before)
                z = project(z, x, self.eps, self.norm)
            before, x_adv = x_adv, z
            previous = losses
            if step + 1 < self.num_steps:
                logits, losses, gradient = ascent(model, x_adv, loss)
            else:
                logits = predicted(model, x_adv)
                losses = loss(logits)
            watch.see(losses)
            kept = kept.or_better(x_adv, losses, logits.argmax(dim=1) != y)
            gains = gains + (losses > previous)
            higher = losses > top_losses
            top = torch.where(per_example(higher, x), x_adv, top)
            top_losses = torch.where(higher, losses, top_losses)
            top_gradient = torch.where(per_example(higher, x), gradient, top_gradient)
            if step + 1 in ends:
                # Conditions 1 and 2 of section 3.2.
                rare = gains < RHO * (step + 1 - last)
                stuck = ~halved & (top_at_last == top_losses)
                halved = rare | stuck
                step_size = torch.where(halved, step_size / 2, step_size)
                x_adv = torch.where(per_example(halved, x), top, x_adv)
                gradient = torch.where(per_example(halved, x), top_gradient, gradient)
                losses = torch.where(halved, top_losses, losses)
                gains, last, top_at_last = torch.zeros_like(gains), step + 1, top_losses
        watch.refuse()
        return kept


def checkpoints(num_steps: int) -> list[int]:
    """w_j = ⌈p_j·num_steps⌉ below num_steps, in order (section 3.2).

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06).

    >>> checkpoints(100)
    [0, 22, 41, 57, 70, 80, 87, 93, 99]
    """
    # In hundredths: sums of floats would put ⌈0.70·100⌉ at 71.
    percent = [0, 22]
    while percent[-1] < 100:
        percent.append(percent[-1] + max(percent[-1] - percent[-2] - 3, 6))
    ends = (-(-p * num_steps // 100) for p in percent)
    return sorted({end for end in ends if end < num_steps})


def defined_loss(loss: str, num_classes: int) -> str:
    """The loss itself, or with a warning the nearest one that is defined for so few classes.

    Raises:
        ModelError: one class: there is nothing to mistake it for.
    """
    if num_classes < 2:
        raise ModelError(f"the model has {num_classes} class; an attack needs at least 2")
    used = loss
    if used == "dlr-targeted" and num_classes < 4:
        used = "dlr"
    if used == "dlr" and num_classes < 3:
        used = "ce"
    if used != loss:
        warnings.warn(
            f"loss={loss!r} is not defined for {num_classes} classes; {used!r} is used", stacklevel=2
        )
    return used


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The difference of logits ratio, equation 6 of Croce & Hein (2020), [n]; needs 3 classes.

    −(z_y − max_{i≠y} z_i) / (z_π1 − z_π3): positive exactly where y is not the largest, and at most 1.
    """
    ordered = logits.sort(dim=1, descending=True).values
    return -margins(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """−(z_y − z_t) / (z_π1 − (z_π3 + z_π4)/2), equation 7 of Croce & Hein (2020), [n]; needs 4 classes."""
    ordered = logits.sort(dim=1, descending=True).values
    gap = _of(logits, y) - _of(logits, target)
    return -gap / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """z_y − max_{i≠y} z_i, [n]."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return _of(logits, y) - others.amax(dim=1)


def likeliest_others(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The ``count`` classes other than y with the largest logits, in order, [n, min(count, C − 1)]."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True)[:, : min(count, logits.shape[1] - 1)]


def surface_start(x: Tensor, eps: float, generator: torch.Generator, norm: str) -> Tensor:
    """A point at distance eps from x, clipped to the box: uniform noise (linf) or Gaussian (l2), scaled."""
    noise = 2 * uniform(x, generator) - 1 if norm == "linf" else gaussian(x, generator)
    return (x + eps * noise / per_example(lengths(noise, norm), x)).clamp_(0.0, 1.0)


def _of(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


class _Untargeted:
    """ "ce" or "dlr" on the labels; which one is settled at the first logits."""

    def __init__(self, loss: str, y: Tensor) -> None:
        self._loss, self._y, self._settled = loss, y, False

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self._settled:
            self._loss, self._settled = defined_loss(self._loss, logits.shape[1]), True
        return dlr(logits, self._y) if self._loss == "dlr" else cross_entropies(logits, self._y)


@dataclass(frozen=True)
class _Targeted:
    y: Tensor
    target: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return targeted_dlr(logits, self.y, self.target)


@dataclass(frozen=True)
class _Best:
    """The points to return: misclassified before not, then by loss."""

    x: Tensor
    losses: Tensor
    fooled: Tensor

    def or_better(self, x: Tensor, losses: Tensor, fooled: Tensor) -> _Best:
        better = (fooled & ~self.fooled) | ((fooled == self.fooled) & (losses > self.losses))
        return _Best(
            torch.where(per_example(better, x), x, self.x),
            torch.where(better, losses, self.losses),
            fooled | self.fooled,
        )
