"""Ranks and masses against closed forms and NumPy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tangentlab.errors import ConfigError, KernelError
from tangentlab.metrics import (
    NegativeEigenvalueWarning,
    eigenvalues,
    entropy_rank,
    intrinsic_dimension,
    participation_ratio,
    spectrum,
    top_mass,
)

COUNTS = [entropy_rank, participation_ratio, intrinsic_dimension]


def psd(*shape: int, seed: int = 0) -> torch.Tensor:
    J = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return J @ J.mT


@pytest.mark.parametrize("count", COUNTS)
def test_identity_has_n_directions_and_rank_one_has_one(count) -> None:
    assert count(5.5 * torch.eye(7)).item() == pytest.approx(7)
    v = torch.arange(1.0, 8.0, dtype=torch.float64)
    assert count(torch.outer(v, v)).item() == pytest.approx(1, abs=1e-9)
    # Three equal eigenvalues among zeros.
    assert count(torch.diag(torch.tensor([2.0, 0, 2, 0, 2]))).item() == pytest.approx(3)


def test_against_numpy_of_a_non_symmetric_route() -> None:
    # The eigenvalues of J Jᵀ are the squared singular values of J.
    J = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = np.linalg.svd(J.numpy(), compute_uv=False) ** 2
    K = J @ J.mT
    np.testing.assert_allclose(eigenvalues(K)[:, :4], values, rtol=1e-12)
    np.testing.assert_allclose(eigenvalues(K)[:, 4:], 0, atol=1e-13)
    p = values / values.sum(1, keepdims=True)
    np.testing.assert_allclose(entropy_rank(K), np.prod(p**-p, axis=1), rtol=1e-10)
    np.testing.assert_allclose(participation_ratio(K), values.sum(1) ** 2 / (values**2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(intrinsic_dimension(K), values.sum(1) / values.max(1), rtol=1e-12)
    np.testing.assert_allclose(top_mass(K, 2), p[:, :2].sum(1), rtol=1e-12)
    traces = torch.einsum("bii->b", K) ** 2 / torch.einsum("bij,bij->b", K, K)
    torch.testing.assert_close(participation_ratio(K), traces)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-200, 1e-3, 1e200]))
def test_invariant_under_scale_and_rotation_and_ordered(seed: int, scale: float) -> None:
    K = psd(5, 3, seed=seed)
    Q = torch.linalg.qr(psd(5, 5, seed=seed + 1)).Q
    for count in COUNTS:
        expected = count(K)
        torch.testing.assert_close(count(scale * K), expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(count(Q @ K @ Q.mT), expected, rtol=1e-9, atol=0)
    # Rényi entropies of order 1, 2 and ∞ fall in this order.
    ranks = [count(K).item() for count in COUNTS]
    assert 3 + 1e-9 >= ranks[0] >= ranks[1] >= ranks[2] >= 1


def test_one_decomposition_serves_all_and_batches_are_kernel_by_kernel() -> None:
    K = torch.stack([psd(5, 5, seed=s) for s in range(6)]).reshape(2, 3, 5, 5)
    whole = spectrum(K)
    assert whole.values.shape == (2, 3, 5)
    assert bool((whole.values.diff(dim=-1) <= 0).all())
    assert whole.top_mass(5) == pytest.approx(1)
    for i in range(2):
        for j in range(3):
            assert whole.entropy_rank[i, j].item() == pytest.approx(entropy_rank(K[i, j]).item(), rel=1e-12)


@pytest.mark.parametrize("k", [0, 6, -1])
def test_top_mass_refuses_k(k: int) -> None:
    with pytest.raises(ConfigError, match=f"k={k} .* 1 to 5"):
        top_mass(torch.eye(5), k)


def test_non_square_and_mixed_kernels_are_refused() -> None:
    with pytest.raises(KernelError, match="square"):
        spectrum(torch.ones(2, 3))
    K = psd(4, 4)
    K[0, 1] += 1e-3 * K.abs().max()
    with pytest.raises(KernelError, match="not symmetric.*float64"):
        spectrum(K)


def test_one_asymmetric_kernel_is_seen_beside_larger_ones() -> None:
    small = torch.tensor([[1.0, 0.5], [0.4, 1.0]])
    with pytest.raises(KernelError, match="not symmetric"):
        spectrum(torch.stack([1e6 * torch.eye(2), small]))


@pytest.mark.parametrize(
    ("dtype", "below", "above"),
    [(torch.float64, 1e-9, 1e-7), (torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.05, 0.2)],
)
def test_tolerances_follow_the_dtype(dtype: torch.dtype, below: float, above: float) -> None:
    def asymmetric(by: float) -> torch.Tensor:
        return torch.tensor([[1.0, 0.5 + by], [0.5, 1.0]], dtype=torch.float64).to(dtype)

    def negative(by: float) -> torch.Tensor:
        return torch.diag(torch.tensor([1.0, -by], dtype=torch.float64)).to(dtype)

    spectrum(asymmetric(below))
    with pytest.raises(KernelError, match="not symmetric"):
        spectrum(asymmetric(above))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert eigenvalues(negative(below)).tolist() == [1.0, 0.0]
    with pytest.warns(NegativeEigenvalueWarning, match="1 eigenvalues of 2"):
        assert eigenvalues(negative(above)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("K", "message"),
    [
        (torch.zeros(2, 3, 3), "2 kernels of 2 that are zero"),
        (-torch.eye(3), "1 kernels of 1 without a positive"),
        (torch.tensor([[math.nan, 0.0], [0.0, 1.0]]), "1 entries of 4"),
    ],
)
def test_kernels_without_a_spectrum_are_refused(K: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        entropy_rank(K)


def test_integer_kernels_and_kernels_that_require_grad() -> None:
    assert entropy_rank(3 * torch.eye(4, dtype=torch.int64)).item() == pytest.approx(4)
    assert not entropy_rank(torch.eye(4, requires_grad=True)).requires_grad
