"""How well a kernel fits a target: kernel-target alignment, and centred alignment (CKA) of two kernels.

Over the last two axes of [..., n, n]; of class kernels they are taken per class, for the caller to average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tangentlab.errors import KernelError
from tangentlab.metrics._checks import as_labels, as_square, unit

# Centring a constant leaves rounding, of about ε = 2e-16 for each entry; far less is left of no real kernel.
_CONSTANT = 1e-12


def kernel_target_alignment(K: Tensor, y: Tensor) -> Tensor:
    """⟨K, Y Yᵀ⟩ / (‖K‖ ‖Y Yᵀ‖) with Y one-hot, uncentred (Cristianini et al. 2001, Def. 1).

    Args:
        K: [..., n, n].
        y: integer labels [n], from 0.

    Returns:
        float64 [...], in [−1, 1]; 1 where K is proportional to "same class".

    Raises:
        KernelError: wrong shapes, NaN or infinite entries, zero kernels, labels that are no integers from 0.

    >>> y = torch.tensor([0, 0, 1])
    >>> round(kernel_target_alignment(torch.eye(3), y).item(), 4)  # 3/√(3·5)
    0.7746
    """
    K = unit(as_square(K))
    y = as_labels(y, K.shape[-1]).to(K.device)
    # (Y Yᵀ)_ij is 1 for equal labels: no need to know how many classes there are.
    same = unit((y[:, None] == y[None, :]).to(torch.float64))
    return (K * same).sum(dim=(-2, -1))


def centered_alignment(K1: Tensor, K2: Tensor) -> Tensor:
    """CKA = ⟨HK1H, HK2H⟩ / (‖HK1H‖ ‖HK2H‖), H = I − 11ᵀ/n (Cortes et al. 2012, eq. 3; Kornblith 2019).

    Args:
        K1, K2: [..., n, n] on the same n examples; leading axes broadcast.

    Returns:
        float64 [...], in [−1, 1], in [0, 1] for positive semi-definite kernels.

    Raises:
        KernelError: wrong shapes, NaN or infinite entries, zero kernels, or a kernel of which centring
            leaves nothing (constant).

    >>> K = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    >>> round(centered_alignment(K, torch.eye(3)).item(), 4)  # 4/√17
    0.9701
    """
    a, b = _centred(K1, "K1"), _centred(K2, "K2")
    if a.shape[-1] != b.shape[-1]:
        raise KernelError(
            f"K1 and K2 have shapes {list(K1.shape)} and {list(K2.shape)}; both need the same n"
        )
    return (a * b).sum(dim=(-2, -1))


def _centred(K: Tensor, name: str) -> Tensor:
    """HKH of norm 1."""
    K = unit(as_square(K, name))
    centred = K - K.mean(-1, keepdim=True) - K.mean(-2, keepdim=True) + K.mean((-2, -1), keepdim=True)
    constant = torch.linalg.matrix_norm(centred) <= _CONSTANT
    if bool(constant.any()):
        raise KernelError(
            f"{name} has {int(constant.sum())} kernels of {constant.numel()} of which centring leaves nothing"
        )
    return unit(centred)
