"""Kernel regression without the kernel: conjugate gradients on products with it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tangentlab.errors import ConfigError, ConvergenceWarning, KernelError
from tangentlab.kernels.operator import NTKOperator


@dataclass(frozen=True)
class Regression:
    """Coefficients of kernel regression.

    Attributes:
        coefficients: α, in the shape of y: predictions are Θ(x', x) α.
        residual: ‖(Θ + ridge·I) α − y‖ / ‖y‖, computed anew at the end.
        error: bound of ‖α − α*‖, residual·‖y‖/ridge; infinite without a ridge.
        products: made.
    """

    coefficients: Tensor
    residual: float
    error: float
    products: int


def kernel_regression(
    op: NTKOperator,
    y: Tensor,
    *,
    ridge: float = 0.0,
    tolerance: float = 1e-5,
    max_products: int | None = None,
) -> Regression:
    """(Θ + ridge·I)⁻¹ y by conjugate gradients (scipy.sparse.linalg.cg).

    The solution of the linearised network, zero at the start, that gradient descent on ½‖f − y‖² tends to.

    Args:
        op: of one side: symmetric.
        y: targets [n, C] or [nC].
        ridge: at least 0.
        tolerance: of the residual over ‖y‖.
        max_products: by default 10 N.

    Raises:
        ConfigError: y does not fit, or a number out of range.
        KernelError: the operator is not symmetric.

    Warns:
        ConvergenceWarning: out of products; the residual says how far it is.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)  # Θ = x·x'
        >>> op = NTKOperator(model, torch.tensor([[1.0]]))
        >>> kernel_regression(op, torch.tensor([[4.0]]), ridge=1.0).coefficients
        tensor([[2.]])
    """
    from scipy.sparse.linalg import LinearOperator, cg

    N = op.shape[0]
    if not op.symmetric:
        raise KernelError("the operator has two sides and is not symmetric: there is nothing to solve")
    if y.numel() != N:
        raise ConfigError(f"y has shape {list(y.shape)}; the operator needs {N} targets")
    if not 0 <= ridge < math.inf:
        raise ConfigError(f"ridge={ridge} is out of range; at least 0")
    theta, products = op.to_scipy(), 0

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        found: np.ndarray = theta @ v + ridge * v
        return found

    targets = y.detach().double().flatten().cpu().numpy()
    solution, failed = cg(
        LinearOperator((N, N), matvec=product, dtype=np.float64),
        targets,
        rtol=tolerance,
        maxiter=10 * N if max_products is None else max_products,
    )
    length = float(np.linalg.norm(targets)) or 1.0
    residual = float(np.linalg.norm(product(solution) - targets))
    if failed:
        warnings.warn(
            f"{products} products are too few for a residual of {tolerance:g}; it is {residual / length:.2g}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Regression(
        torch.from_numpy(solution).view(y.shape).to(y),
        residual / length,
        residual / ridge if ridge else math.inf,
        products,
    )
