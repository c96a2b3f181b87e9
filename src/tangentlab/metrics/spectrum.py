"""How many directions a kernel has: entropy rank, participation ratio, intrinsic dimension, top mass.

Three ways to count with p_i = λ_i / Σλ, each between 1 (rank one) and n (a multiple of the identity):
exp(−Σ p_i log p_i) (Roy & Vetterli 2007, "The effective rank", the paper's KER), 1/Σp², and 1/max p.
Over the last two axes of [..., n, n]; of class kernels they are taken per class, for the caller to average.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from tangentlab.errors import ConfigError, KernelError
from tangentlab.metrics._checks import as_symmetric, resolution


class NegativeEigenvalueWarning(UserWarning):
    """A kernel has eigenvalues too negative for rounding; they are counted as zero."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of kernels, from one decomposition, and the counts that derive from them.

    Attributes:
        values: float64 [..., n], descending, none negative, not all zero.

    >>> s = spectrum(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
    >>> round(s.entropy_rank.item(), 4), round(s.participation_ratio.item(), 4)
    (2.8284, 2.6667)
    >>> s.intrinsic_dimension.item(), s.top_mass(2).item()
    (2.0, 0.75)
    """

    values: Tensor

    @property
    def shares(self) -> Tensor:
        """p_i = λ_i / Σλ, [..., n]."""
        shares: Tensor = self.values / self.values.sum(-1, keepdim=True)
        return shares

    @property
    def entropy_rank(self) -> Tensor:
        """exp(−Σ p_i log p_i), [...], in [1, n] (0 log 0 = 0)."""
        entropy: Tensor = torch.special.entr(self.shares).sum(-1)
        return entropy.exp()

    @property
    def participation_ratio(self) -> Tensor:
        """(Σλ)² / Σλ², [...], in [1, n]."""
        return 1 / self.shares.square().sum(-1)

    @property
    def intrinsic_dimension(self) -> Tensor:
        """Σλ / λ_max, [...], in [1, n]: the stable rank of J where K = J Jᵀ."""
        return 1 / self.shares[..., 0]

    def top_mass(self, k: int) -> Tensor:
        """Σ_{i ≤ k} λ_i / Σλ, [...], in (0, 1]; ConfigError unless 1 ≤ k ≤ n."""
        n = self.values.shape[-1]
        if not 1 <= k <= n:
            raise ConfigError(f"k={k} eigenvalues were asked of {n}; choose from 1 to {n}")
        return self.shares[..., :k].sum(-1)


def spectrum(K: Tensor) -> Spectrum:
    """Eigenvalues of symmetric kernels [..., n, n]; decompose once, read all counts off the result.

    Eigenvalues that rounding made negative are zero in the result. Those below −√ε·λ_max, with ε of the
    input's dtype (1.5e-8 in float64, 3.5e-4 in float32), are no rounding: they are zero too, with a warning.

    Raises:
        KernelError: not square; not symmetric to √ε of the largest entry, as mixed kernels are not; NaN or
            infinite entries; a kernel that is zero everywhere or has no positive eigenvalue.

    Warns:
        NegativeEigenvalueWarning: with the number of negative eigenvalues.

    >>> spectrum(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).values.tolist()
    [3.0, 1.0]
    """
    values = torch.linalg.eigvalsh(as_symmetric(K)).flip(-1)
    hopeless = int((values[..., 0] <= 0).sum())
    if hopeless:
        raise KernelError(
            f"K has {hopeless} kernels of {values[..., 0].numel()} without a positive eigenvalue"
        )
    negative = int((values < -resolution(K) * values[..., :1]).sum())
    if negative:
        lowest = float((values[..., -1] / values[..., 0]).min())
        warnings.warn(
            f"{negative} eigenvalues of {values.numel()} are negative, down to {lowest:.2g} of the largest; "
            "they are counted as zero",
            NegativeEigenvalueWarning,
            stacklevel=2,
        )
    return Spectrum(values.clamp(min=0))


def eigenvalues(K: Tensor) -> Tensor:
    """Eigenvalues of K [..., n, n], descending, float64 [..., n]; raises and warns as :func:`spectrum`.

    >>> eigenvalues(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).tolist()
    [3.0, 1.0]
    """
    return spectrum(K).values


def entropy_rank(K: Tensor) -> Tensor:
    """KER = exp(−Σ p_i log p_i) of K [..., n, n], float64 [...]; raises and warns as :func:`spectrum`.

    >>> round(entropy_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item(), 4)  # 2√2
    2.8284
    """
    return spectrum(K).entropy_rank


def participation_ratio(K: Tensor) -> Tensor:
    """(Σλ)² / Σλ² of K [..., n, n], float64 [...]; raises and warns as :func:`spectrum`.

    >>> round(participation_ratio(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item(), 4)  # 16/6
    2.6667
    """
    return spectrum(K).participation_ratio


def intrinsic_dimension(K: Tensor) -> Tensor:
    """Σλ / λ_max of K [..., n, n], float64 [...]; raises and warns as :func:`spectrum`.

    >>> intrinsic_dimension(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item()
    2.0
    """
    return spectrum(K).intrinsic_dimension


def top_mass(K: Tensor, k: int) -> Tensor:
    """Σ_{i ≤ k} λ_i / Σλ of K [..., n, n], float64 [...]; raises and warns as :func:`spectrum`.

    Tsilivis & Kempe (2022, arXiv 2210.05577) square the eigenvalues; here they are not, so that the mass is
    a share of the trace.

    >>> top_mass(torch.diag(torch.tensor([2.0, 1.0, 1.0])), 1).item()
    0.5
    """
    return spectrum(K).top_mass(k)
