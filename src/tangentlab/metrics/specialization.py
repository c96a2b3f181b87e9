"""Kernel specialization: does the kernel of each output align with its own class?

Shan & Bordelon (2021), "A theory of neural tangent kernel alignment and its influence on training",
arXiv 2105.14301, their kernel specialization matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tangentlab.errors import KernelError
from tangentlab.metrics._checks import as_labels, as_square, unit


def kernel_specialization(class_kernels: Tensor, y: Tensor) -> Tensor:
    """KSM[m, m'] = A(K_m, y_m' y_m'ᵀ) / [(1/C) Σ_m'' A(K_m'', y_m' y_m'ᵀ)].

    A is the cosine ⟨K, K'⟩ / (‖K‖ ‖K'‖) and y_m' the 0/1 indicator of class m', nothing centred.

    Args:
        class_kernels: [..., C, n, n], one kernel an output, square.
        y: integer labels [n], from 0 to C − 1, each class at least once.

    Returns:
        float64 [..., C, C]: row m the class kernel, column m' the label class. Every column has mean 1; all
        ones where the class kernels are proportional to each other.

    Raises:
        KernelError: wrong shapes, NaN or infinite entries, zero kernels, a label out of range, a class
            without examples, or a class whose block sums to nothing positive over the kernels.

    >>> y = torch.tensor([0, 0, 1])
    >>> own = torch.stack([torch.diag((y == c).float()) for c in (0, 1)])
    >>> kernel_specialization(own, y).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    if class_kernels.ndim < 3:
        raise KernelError(f"class_kernels has shape {list(class_kernels.shape)}; choose from [..., C, n, n]")
    K = unit(as_square(class_kernels, "class_kernels"))
    classes = K.shape[-3]
    y = as_labels(y, K.shape[-1]).to(K.device)
    if int(y.max()) >= classes:
        raise KernelError(
            f"y holds the label {int(y.max())}; {classes} class kernels take 0 to {classes - 1}"
        )
    counts = torch.bincount(y, minlength=classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        raise KernelError(f"y has no example of class {', '.join(map(str, missing))}; every class needs one")

    Y = torch.nn.functional.one_hot(y, classes).to(torch.float64)
    # ⟨K, y yᵀ⟩ = yᵀ K y, and ‖y yᵀ‖ = yᵀ y, the number of examples.
    alignment = torch.einsum("...mij,ic,jc->...mc", K, Y, Y) / counts
    mean = alignment.mean(-2, keepdim=True)
    if bool((mean <= 0).any()):
        worst = int(mean.reshape(-1, classes).amin(0).argmin())
        raise KernelError(f"no class kernel aligns with class {worst} on average; the matrix is undefined")
    return alignment / mean


def specialization_score(ksm: Tensor) -> Tensor:
    """Mean of the diagonal of a specialization matrix: 1 without specialization, C when complete.

    Args:
        ksm: [..., C, C], as :func:`kernel_specialization` returns it.

    Returns:
        float64 [...]; below 1 where the kernels prefer other classes than their own.

    >>> specialization_score(torch.tensor([[1.5, 0.5], [0.5, 1.5]])).item()
    1.5
    """
    if ksm.ndim < 2 or ksm.shape[-1] != ksm.shape[-2]:
        raise KernelError(f"ksm has shape {list(ksm.shape)}; a specialization matrix is [..., C, C]")
    return ksm.to(torch.float64).diagonal(dim1=-2, dim2=-1).mean(-1)
