"""What the spectrum of a symmetric operator says, from its products alone: estimates with intervals.

With random ω, E ω ωᵀ = I, the trace is E ωᵀAω (Hutchinson 1989). Nearly all of its variance comes from the
top of the spectrum; so that part is taken exactly and only the rest at random: Hutch++ (Meyer, Musco, Musco &
Woodruff 2021, arXiv 2010.09649), for the trace XTrace (Epperly, Tropp & Webber 2024, arXiv 2301.07825), where
every ω serves for the top and for the rest. Sums Σ f(λ) are stochastic Lanczos quadrature (Ubaru, Chen & Saad
2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature") in the complement of the top
eigenpairs. Intervals are Student's over the ω; of functions of several sums, the jackknife's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tangentlab.errors import ConfigError, KernelError
from tangentlab.metrics.intervals import jackknife, mean_interval
from tangentlab.metrics.lanczos import Krylov, Operator, gaussian, prepared, rounding, top_eigenpairs

# Quadrature stops where a product more changes the entropy's sum by less.
_QUADRATURE = 1e-4


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, and the products with the operator that were made.

    Both ends are the value where nothing was left to chance.
    """

    value: float
    low: float
    high: float
    products: int


@dataclass(frozen=True)
class SpectrumEstimate:
    """Counts of :class:`Spectrum`, estimated together.

    Attributes:
        values: the top eigenvalues, descending, float64.
        trace, frobenius_norm: Σλ and (Σλ²)^½.
        entropy_rank, participation_ratio, intrinsic_dimension: as for :class:`Spectrum`.
        top_mass: Σ ``values`` / Σλ.
    """

    values: Tensor
    trace: Estimate
    frobenius_norm: Estimate
    entropy_rank: Estimate
    participation_ratio: Estimate
    intrinsic_dimension: Estimate
    top_mass: Estimate


def estimate_trace(op: Operator, *, vectors: int = 20, seed: int = 0) -> Estimate:
    """tr A of a symmetric operator by XTrace; its error falls as the eigenvalues beyond the vectors do.

    Args:
        op: a symmetric ``tl.NTKOperator`` or matrix [N, N], or anything symmetric with such products.
        vectors: random vectors, two products each; at least 2.
        seed: of the vectors.

    Raises:
        ConfigError: too few vectors.
        KernelError: the operator is not symmetric.

    Example:
        >>> estimate_trace(torch.diag(torch.tensor([4.0, 2.0, 1.0]))).value
        7.0
    """
    op, N, device = prepared(op)
    _check_vectors(vectors)
    if vectors >= N:
        return Estimate(*_exactly(float((op @ _identity(N, device)).double().trace())), N)
    omega = _gaussians(N, vectors, seed, device)
    Y = (op @ omega).double()
    Q, R = torch.linalg.qr(Y)
    Z = (op @ Q).double()
    H = Q.T @ Z
    pivots = R.diagonal().abs()
    if float(pivots.min()) < 100 * rounding(op) * float(pivots.max()):
        # The vectors span the whole range: nothing is left to chance.
        return Estimate(*_exactly(float(H.trace())), 2 * vectors)
    # Π_i projects on what the products but the i-th span: Q's span without the direction Q s_i.
    S = torch.linalg.solve_triangular(R.T, torch.eye(vectors).to(R), upper=False)
    S = S / S.norm(dim=0)
    W = Q.T @ omega
    along = (S * W).sum(0)
    residual = omega - Q @ (W - S * along)
    product = Y - Z @ (W - S * along)
    rest = (residual * product).sum(0) / residual.square().sum(0)
    traces = H.trace() - (S * (H @ S)).sum(0) + (N - vectors + 1) * rest
    return Estimate(*_student(traces), 2 * vectors)


def estimate_spectrum(op: Operator, *, top: int = 10, vectors: int = 10, seed: int = 0) -> SpectrumEstimate:
    """The counts of a positive semi-definite operator's spectrum.

    Args:
        op: as for :func:`estimate_trace`.
        top: eigenpairs that are taken out first.
        vectors: of the quadrature on the rest, at least 2; each costs ten to forty products.
        seed: of the vectors.

    Raises:
        ConfigError: ``top`` out of range, or too few vectors.
        KernelError: the operator is not symmetric, or has no positive eigenvalue.

    Example:
        >>> found = estimate_spectrum(torch.diag(torch.tensor([2.0, 1.0, 1.0])), top=3)
        >>> round(found.entropy_rank.value, 4), found.intrinsic_dimension.value
        (2.8284, 2.0)
    """
    op, N, device = prepared(op)
    _check_vectors(vectors)
    pairs = top_eigenpairs(op, top, seed=seed)
    largest = float(pairs.values[0])
    if not largest > 0:
        raise KernelError("the operator has no positive eigenvalue")
    products = pairs.products
    rest = torch.zeros(vectors, 3, dtype=torch.float64)
    if top < N:
        for number in range(vectors):
            sums, made = _quadrature(op, gaussian(N, seed, N + number, device), pairs.vectors, largest)
            rest[number] = (N - top) * sums
            products += made
    known = _powers(pairs.values / largest).sum(1)

    def estimate(function: Callable[[Tensor], Tensor], scale: float = 1.0) -> Estimate:
        value, low, high = _jackknife(rest, lambda mean: scale * function(known + mean))
        return Estimate(value, low, high, products)

    # Of eigenvalues in units of the largest: Σλ, Σλ², Σλ log λ.
    trace = estimate(lambda sums: sums[0])
    error = float(pairs.errors[0]) / largest  # λ_max lies between the Ritz value and that beyond it
    dimension = Estimate(trace.value, trace.low / (1 + error), trace.high, products)
    return SpectrumEstimate(
        pairs.values,
        estimate(lambda sums: sums[0], largest),
        estimate(lambda sums: sums[1].sqrt(), largest),
        estimate(lambda sums: (sums[0].log() - sums[2] / sums[0]).exp()),
        estimate(lambda sums: sums[0].square() / sums[1]),
        dimension,
        estimate(lambda sums: known[0] / sums[0]),
    )


def estimate_distance(
    op: Operator, op2: Operator, *, sketch: int = 5, vectors: int = 20, seed: int = 0
) -> Estimate:
    """Kernel distance 1 − ⟨A, B⟩/(‖A‖ ‖B‖) of two operators, by the same random vectors for both.

    Args:
        op, op2: of one shape [N, M]: two networks, or two sets of inputs; need not be symmetric.
        sketch: random vectors whose images, six products each, make the part that is taken exactly.
        vectors: random vectors for the rest, two products each; at least 2.
        seed: of all of them.

    Raises:
        ConfigError: too few vectors.
        KernelError: the shapes differ, or an operator is zero.

    Example:
        >>> A, B = torch.eye(2), torch.ones(2, 2)
        >>> round(estimate_distance(A, B).value, 6)  # 1 − 1/√2
        0.292893
    """
    if tuple(op.shape) != tuple(op2.shape):
        raise KernelError(f"operators have shapes {list(op.shape)} and {list(op2.shape)}; they must agree")
    _check_vectors(vectors)
    A, B = (each.double() if isinstance(each, Tensor) else each for each in (op, op2))
    N, M = A.shape
    device = getattr(A, "device", torch.device("cpu"))
    products = 0

    def images(columns: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal products
        products += 2 * columns.shape[1]
        return (A @ columns).double(), (B @ columns).double()

    if 2 * sketch + vectors >= M:
        value = _distance(_inner(*images(_identity(M, device))).sum(0))
        return Estimate(*_exactly(float(value)), products)
    Q = torch.empty(M, 0, dtype=torch.float64, device=device)
    if N == M and sketch:
        Q = torch.linalg.qr(torch.cat(images(_gaussians(M, sketch, seed, device)), dim=1)).Q
    omega = _gaussians(M, vectors, seed, device, first=sketch)
    omega = omega - Q @ (Q.T @ omega)
    rest = _inner(*images(omega / omega.norm(dim=0))) * (M - Q.shape[1])
    known = _inner(*images(Q)).sum(0)
    return Estimate(*_jackknife(rest, lambda mean: _distance(known + mean)), products)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """‖a‖², ‖b‖² and ⟨a, b⟩ of each pair of columns, [columns, 3]."""
    return torch.stack([(a * a).sum(0), (b * b).sum(0), (a * b).sum(0)], dim=1).cpu()


def _distance(sums: Tensor) -> Tensor:
    if not (sums[0] > 0 and sums[1] > 0):
        raise KernelError("an operator is zero: its distance is undefined")
    return 1 - sums[2] / (sums[0] * sums[1]).sqrt()


def _quadrature(op: Operator, start: Tensor, against: Tensor, scale: float) -> tuple[Tensor, int]:
    """zᵀf(A/scale)z for the f of :func:`_powers`, z the unit vector along ``start`` in the complement.

    And the products made.
    """
    space = Krylov(op, start, against)
    sums = torch.zeros(3, dtype=torch.float64)
    while space.grow():
        values, coordinates, _ = space.ritz()
        before, sums = sums, _powers(values / scale) @ coordinates[0].square()
        if len(space) > 2 and abs(float(sums[2] - before[2])) <= _QUADRATURE * abs(float(sums[2])):
            break
    return sums, len(space)


def _powers(values: Tensor) -> Tensor:
    """λ, λ² and λ log λ, [3, k]; rounding's negative ones are zero."""
    values = values.clamp(min=0)
    return torch.stack([values, values.square(), torch.special.xlogy(values, values)])


def _jackknife(samples: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """Of samples [m, q], those of a spectrum without a rest alike."""
    if not bool((samples != samples[0]).any()):
        return _exactly(float(function(samples[0])))
    value, low, high = jackknife(function, samples)
    return float(value), float(low), float(high)


def _student(values: Tensor) -> tuple[float, float, float]:
    low, high = mean_interval(values.tolist())
    return float(values.mean()), low, high


def _exactly(value: float) -> tuple[float, float, float]:
    return value, value, value


def _identity(N: int, device: torch.device) -> Tensor:
    return torch.eye(N, dtype=torch.float64, device=device)


def _gaussians(N: int, count: int, seed: int, device: torch.device, first: int = 0) -> Tensor:
    return torch.stack([gaussian(N, seed, first + number, device) for number in range(count)], dim=1)


def _check_vectors(vectors: int) -> None:
    if vectors < 2:
        raise ConfigError(f"vectors={vectors}; an interval takes at least 2")
