"""The gap between the kernel that training follows and the one on running statistics, split exactly.

With R the Jacobian on running statistics, V on the values of the batch's statistics held constant, and D the
derivative through these statistics alone, the Jacobian on batch statistics is B = V + D. With W = V − R

    B Bᵀ − R Rᵀ = (R Wᵀ + W Rᵀ + W Wᵀ) + (R Dᵀ + D Rᵀ + D Dᵀ) + (W Dᵀ + D Wᵀ)     values, derivative, cross
    R Bᵀ − R Rᵀ = R Wᵀ + R Dᵀ                                                   the mixed kernel's

The theory is in docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError
from tangentlab.kernels.moments import Moments, WrittenOut, batch_moments
from tangentlab.kernels.reproducible import require_statistics
from tangentlab.kernels.structure import trained
from tangentlab.modes import batchnorm, evaluation, preserved


@dataclass(frozen=True)
class KernelGap:
    """Class kernels [C, n, n] on the first n examples of a batch, and the parts of the gaps between them.

    Each is computed on its own: ``batch`` and ``mixed`` from PyTorch's BatchNorm in training mode, the parts
    without them.

    Attributes:
        running: R Rᵀ.
        batch: B Bᵀ; batch = running + values + derivative + cross.
        mixed: R Bᵀ; mixed = running + mixed_values + mixed_derivative.
        values, derivative, cross: from the values of the statistics, their derivative, and both together.
        mixed_values, mixed_derivative: likewise; the mixed kernel is linear in B and has no cross term.
    """

    running: Tensor
    batch: Tensor
    mixed: Tensor
    values: Tensor
    derivative: Tensor
    cross: Tensor
    mixed_values: Tensor
    mixed_derivative: Tensor


def kernel_gap(model: nn.Module, x: Tensor, *, rows: int | None = None) -> KernelGap:
    """The class kernels of the batch x on running and on batch statistics, and the split of their gap.

    The statistics are those of the whole batch. Two backwards of the batch and two of one example for each
    of rows · C outputs; four times rows · P numbers are held.

    Args:
        model: with BatchNorm that has running statistics, in any mode; it comes back as it was.
        x: [m, ...] on the model's device.
        rows: n, how many of the first examples have kernels; None for all.

    Raises:
        ConfigError: rows out of range.
        KernelError: no parameter requires grad; a BatchNorm without running statistics.
    """
    n = len(x) if rows is None else rows
    if not 1 <= n <= len(x):
        raise ConfigError(f"rows={n} is out of range; choose 1..{len(x)}")
    require_statistics(model, "the gap")
    with preserved(model), evaluation(model), torch.enable_grad():
        found = _Jacobians(model, x, n)
        parts = [_parts(*found.of_class(c)) for c in range(found.classes)]
    return KernelGap(*(torch.stack(kernels) for kernels in zip(*parts, strict=True)))


def _parts(R: Tensor, V: Tensor, D: Tensor, B: Tensor) -> list[Tensor]:
    """The fields of KernelGap for one class, from Jacobians [n, P]."""
    W = V - R
    values, derivative = R @ W.T, R @ D.T
    return [
        R @ R.T,
        B @ B.T,
        R @ B.T,
        values + values.T + W @ W.T,
        derivative + derivative.T + D @ D.T,
        W @ D.T + D @ W.T,
        values,
        derivative,
    ]


class _Jacobians:
    """Rows of the four Jacobians of a batch, class by class; the graphs are kept in between."""

    def __init__(self, model: nn.Module, x: Tensor, n: int) -> None:
        self._parameters = list(trained(model).values())
        alone = x[:n].split(1)
        self._running = [model(example) for example in alone]
        with batchnorm(model, statistics="batch"):
            self._batch = model(x)
            # The statistics as functions of the parameters, each layer's through those before it.
            with WrittenOut() as written:
                model(x)
            held = [Moments(*map(_leaf, moments)) for moments in batch_moments(model, x)]
        self._statistics = _flat(written.used)
        self._held = _flat(held)
        self._valued = [_given(model, example, held) for example in alone]
        self.classes = self._batch.shape[1]

    def of_class(self, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """R, V, D and B of output c, [n, P] each."""
        R, V, D, B = [], [], [], []
        p = self._parameters
        for i, (running, valued) in enumerate(zip(self._running, self._valued, strict=True)):
            R.append(_row(_gradients(running[0, c], p)))
            both = _gradients(valued[0, c], [*p, *self._held])
            V.append(_row(both[: len(p)]))
            # ∂f/∂s, brought to the parameters through the statistics alone.
            D.append(_row(_gradients(self._statistics, p, both[len(p) :])))
            B.append(_row(_gradients(self._batch[i, c], p)))
        return torch.stack(R), torch.stack(V), torch.stack(D), torch.stack(B)


def _given(model: nn.Module, example: Tensor, moments: Sequence[Moments]) -> Tensor:
    with WrittenOut(moments):
        output: Tensor = model(example)
    return output


def _flat(moments: Sequence[Moments]) -> list[Tensor]:
    return [value for pair in moments for value in pair]


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _row(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def _gradients(
    outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    if not isinstance(outputs, Tensor):
        # Without BatchNorm there are no statistics, and some depend on no parameter: those of the input.
        pairs = [(s, v) for s, v in zip(outputs, cotangents or (), strict=True) if s.requires_grad]
        if not pairs:
            return [torch.zeros_like(value) for value in inputs]
        outputs, cotangents = [s for s, _ in pairs], [v for _, v in pairs]
    return torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
    )
