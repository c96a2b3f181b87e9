"""Kernel regression by conjugate gradients, against the dense solution."""

from __future__ import annotations

import pytest
import torch

from tangentlab.errors import ConfigError, ConvergenceWarning, KernelError
from tangentlab.kernels import NTKOperator, kernel_regression

from .zoo import build, examples

NAME = "pre-activation block"


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_solution_is_the_dense_one(ridge: float) -> None:
    model, x, x2 = build(NAME), examples(NAME, 6), examples(NAME, 3, seed=3)
    y = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    op = NTKOperator(model, x)
    found = kernel_regression(op, y, ridge=ridge, tolerance=1e-10)
    theta = op.to_dense() + ridge * torch.eye(18, dtype=torch.float64)
    expected = torch.linalg.solve(theta, y.flatten())
    assert found.coefficients.shape == y.shape
    assert float((found.coefficients.flatten() - expected).norm()) < 1e-6 * float(expected.norm())
    assert found.residual < 1e-9
    # The linearised network, zero at the start, fits its targets as the ridge lets it.
    predicted = NTKOperator(model, x2, x) @ found.coefficients.flatten()
    torch.testing.assert_close(predicted, NTKOperator(model, x2, x).to_dense() @ expected)


def test_the_error_is_a_bound() -> None:
    model, x = build(NAME), examples(NAME, 6)
    op, y = NTKOperator(model, x), torch.ones(6, 3, dtype=torch.float64)
    theta = op.to_dense() + 0.1 * torch.eye(18, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="4 products are too few for a residual of 1e-05; it is"):
        found = kernel_regression(op, y, ridge=0.1, max_products=3)
    wrong = found.coefficients.flatten() - torch.linalg.solve(theta, y.flatten())
    assert 0 < float(wrong.norm()) <= found.error
    residual = theta @ found.coefficients.flatten() - y.flatten()
    assert found.residual == pytest.approx(float(residual.norm() / y.norm()))
    assert found.products == 4


def test_bad_input_is_named() -> None:
    model, x = build(NAME), examples(NAME, 4)
    with pytest.raises(ConfigError, match=r"y has shape \[4, 2\]; the operator needs 12 targets"):
        kernel_regression(NTKOperator(model, x), torch.ones(4, 2))
    with pytest.raises(ConfigError, match="ridge=-1.0 is out of range"):
        kernel_regression(NTKOperator(model, x), torch.ones(4, 3), ridge=-1.0)
    with pytest.raises(KernelError, match="two sides"):
        kernel_regression(NTKOperator(model, x, x), torch.ones(4, 3))
