"""Eigenpairs of an operator from its products alone: Lanczos, fully reorthogonalised.

Lanczos (1950), "An iteration method for the solution of the eigenvalue problem"; errors after Parlett (1998),
"The symmetric eigenvalue problem", theorem 4.5.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tangentlab.errors import ConfigError, ConvergenceWarning, KernelError
from tangentlab.randomness import generator


class Operator(Protocol):
    """What has products: a ``tl.NTKOperator``, a matrix, or anything like them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, N)."""

    def __matmul__(self, v: Tensor, /) -> Tensor:
        """The product with a vector [N], or with columns [N, k]."""


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and eigenvectors; unpacks into the two.

    Attributes:
        values: [k], descending, float64.
        vectors: [N, k], orthonormal.
        errors: ‖Θv − λv‖ [k]: within it of each value lies an eigenvalue of Θ.
        products: made.
    """

    values: Tensor
    vectors: Tensor
    errors: Tensor
    products: int

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.values, self.vectors))


class Krylov:
    """The Krylov space of a symmetric operator A and a start, grown by a product at a time.

    A Q = Q T + β q eᵀ, with T tridiagonal and Q orthonormal; every new vector is orthogonalised twice against
    all before it and against ``against``, in float64 ("twice is enough", Parlett 1998, section 6.9).

    Args:
        op: A.
        start: [N], float64.
        against: [N, j], orthonormal: the space is that of A in its complement.
    """

    def __init__(self, op: Operator, start: Tensor, against: Tensor) -> None:
        self._op, self._against = op, against
        self._basis = start.new_empty(len(start), 8)
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._next = self._unit(start, 1e-8 * float(start.norm()))

    def __len__(self) -> int:
        return len(self._alphas)

    def grow(self) -> bool:
        """One product; False where the space is invariant, so that there is no more."""
        if self._next is None:
            return False
        n, q = len(self), self._next
        if n == self._basis.shape[1]:
            self._basis = torch.cat([self._basis, torch.empty_like(self._basis)], dim=1)
        self._basis[:, n] = q
        product = (self._op @ q).double()
        self._alphas.append(float(q @ product))
        # What is below the rounding of the product is no direction.
        self._next = self._unit(product, 4 * rounding(self._op) * float(product.norm()))
        return True

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues of T, descending, its eigenvectors as columns, and the errors ‖Aq − λq‖."""
        inner = torch.tensor(self._betas[1 : len(self)], dtype=torch.float64)
        T = torch.diag(torch.tensor(self._alphas, dtype=torch.float64))
        values, vectors = torch.linalg.eigh(T + torch.diag(inner, 1) + torch.diag(inner, -1))
        return values.flip(0), vectors.flip(1), self._betas[-1] * vectors.flip(1)[-1].abs()

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Q times coordinates [len, k]."""
        return self._basis[:, : len(self)] @ coordinates.to(self._basis)

    def _unit(self, v: Tensor, least: float) -> Tensor | None:
        before = self._basis[:, : len(self)]
        for _ in range(2):
            for Q in (self._against, before):
                v = v - Q @ (Q.T @ v)
        length = float(v.norm())
        self._betas.append(length if length > least else 0.0)
        return v / length if length > least else None


def top_eigenpairs(
    op: Operator, k: int, *, tolerance: float = 1e-3, max_products: int | None = None, seed: int = 0
) -> Eigenpairs:
    """The k largest eigenvalues of a symmetric operator and their eigenvectors.

    A Krylov space of one start holds one vector of each eigenspace. For k > 1 the search goes on in the
    complement of what was found until the largest value there is none of the k, so that eigenvalues come as
    often as they are: the C outputs of a wide network have nearly the same kernel.

    Args:
        op: a symmetric ``tl.NTKOperator`` or matrix [N, N], or anything symmetric with such products.
        k: 1 … N.
        tolerance: the error ‖Θv − λv‖ of each pair over its value; no less than the products' rounding.
        max_products: by default (k + 1) N.
        seed: of the starts.

    Raises:
        ConfigError: k, the tolerance or max_products out of range.
        KernelError: the operator is not symmetric.

    Warns:
        ConvergenceWarning: out of products; the errors say how far it is.

    Example:
        >>> values, vectors = top_eigenpairs(torch.diag(torch.tensor([1.0, 3.0, 2.0, 3.0])), 3)
        >>> [round(value, 6) for value in values.tolist()]
        [3.0, 3.0, 2.0]
    """
    op, N, device = prepared(op)
    if not 1 <= k <= N:
        raise ConfigError(f"k={k} eigenpairs of {N}; choose from 1 to {N}")
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance={tolerance} is out of range; choose between 0 and 1, such as 0.001")
    if max_products is not None and max_products < 1:
        raise ConfigError(f"max_products={max_products} is out of range; at least 1")
    values, errors = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    vectors = torch.empty(N, 0, dtype=torch.float64, device=device)

    def allowed(theta: Tensor) -> Tensor:
        largest = float(torch.cat([values, theta]).abs().max())
        return (tolerance * theta.abs()).clamp(min=8 * rounding(op) * largest)

    products, most = 0, (k + 1) * N if max_products is None else max_products
    for number in range(N):
        space = Krylov(op, gaussian(N, seed, number, device), vectors)
        take, converged = 0, False
        while products < most and not converged and space.grow():
            products += 1
            theta, coordinates, error = space.ritz()
            # Those among the k largest; of equal ones the first found.
            above = (values * (1 + tolerance) >= theta[:, None]).sum(1)
            take = int((above + torch.arange(len(theta)) < k).sum())
            # Where none is, the largest must have come near enough to show it.
            goal = allowed(theta[:take] if take else values.min()[None])
            converged = len(values) + take >= k and bool((error[: len(goal)] <= goal).all())
        if not take:
            break
        Q, error = space.vectors(coordinates[:, :take]), error[:take]
        if number:  # what it was found against is not exact
            error = ((op @ Q).double() - Q * theta[:take].to(device)).norm(dim=0).cpu()
            products += take
        vectors = torch.cat([vectors, Q], dim=1)
        values, errors = torch.cat([values, theta[:take]]), torch.cat([errors, error])
        if k == 1 or len(values) == N or products >= most:
            break
    order = values.argsort(descending=True)[:k]
    found = Eigenpairs(values[order], vectors[:, order.to(device)], errors[order], products)
    if len(order) < k or bool((found.errors > allowed(found.values)).any()):
        warnings.warn(
            f"{products} products are too few for {k} eigenpairs to {tolerance:g}: {len(order)} were found, "
            f"the worst to {float((found.errors / found.values).max()):.2g}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return found


def prepared(op: Operator) -> tuple[Operator, int, torch.device]:
    """The operator, a matrix in float64; N; and where its vectors are.

    Raises:
        KernelError: it is not symmetric.
    """
    shape = tuple(op.shape)
    named = f"an operator of shape {list(shape)}"
    if len(shape) != 2 or shape[0] != shape[1]:
        raise KernelError(f"{named} is not symmetric and has no eigenvalues")
    if not getattr(op, "symmetric", True):
        raise KernelError(f"{named} of two sides is not symmetric and has no eigenvalues")
    if isinstance(op, Tensor):
        op = op.double()
        if float((op - op.T).norm()) > 1e-3 * float(op.norm()):
            raise KernelError(f"{named} is not symmetric and has no eigenvalues")
    return op, shape[0], getattr(op, "device", torch.device("cpu"))


def rounding(op: Operator) -> float:
    """eps of the products."""
    return torch.finfo(getattr(op, "dtype", torch.float64)).eps


def gaussian(N: int, seed: int, number: int, device: torch.device) -> Tensor:
    """A standard normal vector [N], float64, the same on every device."""
    stream = generator(seed, "metrics.lanczos", number)
    return torch.randn(N, dtype=torch.float64, generator=stream).to(device)
