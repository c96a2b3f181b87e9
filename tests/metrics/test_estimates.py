"""Estimates from products against the dense truth: they converge to it, and their intervals cover it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tangentlab import metrics
from tangentlab.errors import ConfigError, ConvergenceWarning, KernelError
from tangentlab.metrics import Estimate, estimate_distance, estimate_spectrum, estimate_trace, top_eigenpairs

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "quadratic decay": lambda i: i**-2.0,
    "slow decay": lambda i: i**-0.5,
    "exponential": lambda i: torch.exp(-i / 8),
    "each ten times": lambda i: ((i - 1) // 10 + 1) ** -1.5,
    "low rank": lambda i: torch.where(i <= 12, 1 / i, 0.0),
}


def matrix(name: str, N: int = 80, seed: int = 0) -> Tensor:
    """With the spectrum, and random eigenvectors."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=torch.float64)).Q
    return Q @ torch.diag(SPECTRA[name](torch.arange(1.0, N + 1, dtype=torch.float64))) @ Q.T


class Counting:
    """A matrix of which only products can be had; counts them."""

    def __init__(self, A: Tensor) -> None:
        self._A, self.shape, self.products = A, tuple(A.shape), 0

    def __matmul__(self, v: Tensor) -> Tensor:
        self.products += 1 if v.dim() == 1 else v.shape[1]
        return self._A.to(v) @ v


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 4, 15])
def test_top_eigenpairs_come_as_often_as_they_are(name: str, k: int) -> None:
    A = matrix(name)
    op = Counting(A)
    found = top_eigenpairs(op, k, tolerance=1e-4)
    values, vectors = found
    expected = torch.linalg.eigvalsh(A).flip(0)[:k]
    assert float((values - expected).abs().max()) < 1e-6 * float(expected[0])
    assert float((vectors.T @ vectors - torch.eye(k, dtype=torch.float64)).abs().max()) < 1e-12
    residuals = (A @ vectors - vectors * values).norm(dim=0)
    torch.testing.assert_close(residuals, found.errors, rtol=1e-6, atol=1e-12)
    assert bool((residuals <= 1e-4 * expected + 1e-12).all())
    assert op.products == found.products


def test_few_products_for_the_largest() -> None:
    assert top_eigenpairs(matrix("quadratic decay"), 1, tolerance=0.01).products <= 5


def test_all_eigenpairs() -> None:
    A = matrix("each ten times", 20)
    found = top_eigenpairs(A, 20)
    torch.testing.assert_close(found.vectors @ torch.diag(found.values) @ found.vectors.T, A)


def test_out_of_products() -> None:
    with pytest.warns(ConvergenceWarning, match="6 products are too few for 5 eigenpairs to 0.0001: 5 were"):
        found = top_eigenpairs(matrix("slow decay"), 5, tolerance=1e-4, max_products=6)
    A = matrix("slow decay")
    residuals = (A @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(residuals, found.errors)
    with pytest.warns(ConvergenceWarning, match="3 products .*: 3 were found"):
        assert len(top_eigenpairs(matrix("slow decay"), 5, max_products=3).values) == 3


def truths(A: Tensor, top: int) -> dict[str, float]:
    s = metrics.spectrum(A)
    return {
        "trace": float(A.trace()),
        "frobenius_norm": float(A.norm()),
        "entropy_rank": float(s.entropy_rank),
        "participation_ratio": float(s.participation_ratio),
        "intrinsic_dimension": float(s.intrinsic_dimension),
        "top_mass": float(s.top_mass(top)),
    }


@pytest.mark.parametrize("name", SPECTRA)
def test_estimates_converge(name: str) -> None:
    A = matrix(name)
    traces = [estimate_trace(A, vectors=m) for m in (5, 60)]
    assert abs(traces[1].value / float(A.trace()) - 1) < 0.005
    assert traces[1].high - traces[1].low <= traces[0].high - traces[0].low
    found = estimate_spectrum(A, top=15, vectors=150)
    for key, expected in truths(A, 15).items():
        assert abs(getattr(found, key).value / expected - 1) < 0.02, key
    B = A + 0.3 * matrix(name, seed=1)
    distance = float(metrics.kernel_distance(A, B))
    assert abs(estimate_distance(A, B, sketch=10, vectors=40).value - distance) < 0.05 * distance + 1e-4


@pytest.mark.parametrize("name", SPECTRA)
def test_nothing_is_left_to_chance(name: str) -> None:
    A = matrix(name, 30)
    truth = truths(A, 30)
    for found, key in ((estimate_trace(A, vectors=30), "trace"), (estimate_trace(A, vectors=99), "trace")):
        assert found.low == found.high == found.value == pytest.approx(truth[key])
    spectrum = estimate_spectrum(A, top=30)
    for key, expected in truth.items():
        assert getattr(spectrum, key).value == pytest.approx(expected, rel=1e-6)
    B = matrix(name, 30, seed=1)
    distance = estimate_distance(A, B, sketch=10, vectors=10)
    assert distance.low == distance.value == pytest.approx(float(metrics.kernel_distance(A, B)))


def test_a_low_rank_is_found_out() -> None:
    found = estimate_trace(matrix("low rank"), vectors=20)
    assert found.low == found.high == pytest.approx(float(matrix("low rank").trace()))


TIMES = 200
# 190 are expected; a chance below 0.01 % to hit fewer, if each covers with 95 %.
LEAST = 178


def covered(found: Sequence[Estimate], truth: float) -> int:
    """How often the interval holds the truth; the estimates must differ."""
    assert len({each.value for each in found}) > len(found) / 2
    return sum(each.low <= truth <= each.high for each in found)


@pytest.mark.parametrize("name", ["quadratic decay", "slow decay", "each ten times"])
def test_the_traces_interval_covers(name: str) -> None:
    A = matrix(name)
    found = [estimate_trace(A, vectors=8, seed=seed) for seed in range(TIMES)]
    assert covered(found, float(A.trace())) >= LEAST


@pytest.mark.parametrize("name", ["quadratic decay", "slow decay"])
def test_the_counts_intervals_cover(name: str) -> None:
    A = matrix(name)
    found = [estimate_spectrum(A, top=5, vectors=8, seed=seed) for seed in range(TIMES)]
    for key, truth in truths(A, 5).items():
        assert covered([getattr(each, key) for each in found], truth) >= LEAST, key


@pytest.mark.parametrize("other", [0.05, 1.0])
def test_the_distances_interval_covers(other: float) -> None:
    A = matrix("slow decay")
    B = A + other * matrix("slow decay", seed=1)
    truth = float(metrics.kernel_distance(A, B))
    found = [estimate_distance(A, B, sketch=3, vectors=10, seed=seed) for seed in range(TIMES)]
    assert covered(found, truth) >= LEAST


def test_operators_that_are_not_symmetric_have_a_distance() -> None:
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 50, 60, generator=g, dtype=torch.float64)
    truth = float(metrics.kernel_distance(A, A + B))
    found = [estimate_distance(A, A + B, vectors=10, seed=seed) for seed in range(TIMES)]
    assert covered(found, truth) >= LEAST


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda A: top_eigenpairs(A, 81), ConfigError, "k=81 eigenpairs of 80; choose from 1 to 80"),
        (lambda A: top_eigenpairs(A, 1, tolerance=1.0), ConfigError, "tolerance=1.0 is out of range"),
        (lambda A: top_eigenpairs(A, 1, max_products=0), ConfigError, "max_products=0 is out of range"),
        (lambda A: top_eigenpairs(A[:5], 1), KernelError, r"shape \[5, 80\] is not symmetric"),
        (lambda A: top_eigenpairs(A.triu(), 1), KernelError, "not symmetric"),
        (lambda A: estimate_trace(A, vectors=1), ConfigError, "vectors=1; an interval takes at least 2"),
        (lambda A: estimate_spectrum(-A), KernelError, "no positive eigenvalue"),
        (lambda A: estimate_distance(A, A[:5]), KernelError, r"\[80, 80\] and \[5, 80\]; they must agree"),
        (lambda A: estimate_distance(A, 0 * A), KernelError, "an operator is zero"),
    ],
)
def test_bad_input_is_named(call: Callable[[Tensor], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call(matrix("slow decay"))
