"""The kernel as an operator: products with Θ = J(x) J(x2)ᵀ by a backward and a forward, Θ never formed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError, KernelError
from tangentlab.kernels.alone import Alone, pair
from tangentlab.kernels.inputs import Inputs, moved
from tangentlab.kernels.jacobian import Jacobian
from tangentlab.kernels.ntk import checked, ntk
from tangentlab.kernels.products import chunks
from tangentlab.kernels.reproducible import coarsest, mixing, reproducible
from tangentlab.kernels.sides import Side
from tangentlab.kernels.undisturbed import undisturbed

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class NTKOperator:
    """Θ(x, x2) of all outputs, from R^{mC} to R^{nC}; row i·C + c is output c of example i.

    ``op @ v`` is J(x) [J(x2)ᵀ v]: a forward and a backward on x2, and on x a forward with tangents, which
    costs about three plain ones. Graphs are kept from one product to the next where memory allows. Products
    are made in the model's dtype, of the weights as they are at the time.

    Args:
        model: any module; it comes back as it was.
        x: [n, ...], or a tuple or dict of such tensors; moved to the model's device.
        x2: [m, ...], or None for x2 = x.
        batchnorm: as for :func:`tangentlab.ntk`: "running", "batch" or ("running", "batch"); with the last
            the operator is not symmetric.
        memory: bound on the growth of working memory, kept graphs and products included: bytes, or "2GiB".

    Attributes:
        shape: (nC, mC).
        symmetric: whether Θ is.
        dtype, device: of the products.

    Raises:
        ConfigError, ModelError, KernelError: as :func:`tangentlab.ntk`. With batch statistics the whole batch
            is run at once and must fit.

    Example:
        >>> model = nn.Linear(2, 3)  # Θ = (x_i·x_j + 1)·I
        >>> op = NTKOperator(model, torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> op @ torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        tensor([2., 0., 0., 2., 0., 0.])
    """

    def __init__(
        self,
        model: nn.Module,
        x: Inputs,
        x2: Inputs | None = None,
        *,
        batchnorm: str | tuple[str, str] = "running",
        memory: int | str = "2GiB",
    ) -> None:
        parameter, self.dtype, limit = checked(model, x, x2, "full", batchnorm, memory, None, None)
        self.device = parameter.device
        x, x2 = moved(x, self.device), None if x2 is None else moved(x2, self.device)
        self._dense = model, x, x2, batchnorm, memory
        self._transposed = False
        self.symmetric = x2 is None and isinstance(batchnorm, str)
        batches = (batchnorm, batchnorm) if isinstance(batchnorm, str) else batchnorm
        with undisturbed(model, self.device):
            self._left = _jacobian(model, x, batches[0] == "batch", limit)
            self._right = self._left
            if not self.symmetric:
                self._right = _jacobian(model, x if x2 is None else x2, batches[1] == "batch", limit)
        self._sizes()

    @property
    def T(self) -> NTKOperator:
        """Θᵀ = J(x2) J(x)ᵀ."""
        if self.symmetric:
            return self
        other = copy.copy(self)
        other._left, other._right = self._right, self._left
        other._transposed = not self._transposed
        other._sizes()
        return other

    def __matmul__(self, v: Tensor) -> Tensor:
        """Θv, of a vector [mC] or of columns [mC, k]; in v's dtype.

        Raises:
            ConfigError: not a floating-point tensor of that shape.
            KernelError: the product is not finite.
        """
        rows, columns = self.shape
        if not isinstance(v, Tensor) or not v.is_floating_point():
            kind = v.dtype if isinstance(v, Tensor) else type(v).__name__
            raise ConfigError(f"v is of {kind}; give a floating-point tensor [{columns}] or [{columns}, k]")
        if v.dim() not in (1, 2) or len(v) != columns:
            raise ConfigError(f"v has shape {list(v.shape)}; give [{columns}] or [{columns}, k]")
        u = v.detach().view(columns, -1).T.to(self.device, self.dtype)
        left, right = self._left, self._right
        if left is not right:
            left.forget()  # the bound is for the graph of one side
        found = u.new_empty(len(u), rows)
        with undisturbed(left.side.model, self.device):
            for part in chunks(len(u), min(left.columns, right.columns)):
                classes = right.side.weighed.classes
                w = right.transposed(u[part].view(-1, right.side.n, classes))
                found[part] = left.times(w).reshape(-1, rows)
        if not found.isfinite().all():
            raise KernelError(f"{int((~found.isfinite()).sum())} entries of the product are not finite")
        result: Tensor = found.T.to(v).reshape(rows, *v.shape[1:])
        return result

    def to_dense(self) -> Tensor:
        """Θ [nC, mC], by :func:`tangentlab.ntk`."""
        model, x, x2, batchnorm, memory = self._dense
        full = ntk(model, x, x2, kind="full", batchnorm=batchnorm, memory=memory)
        n, m, classes, _ = full.shape
        dense = full.permute(0, 2, 1, 3).reshape(n * classes, m * classes)
        return dense.T if self._transposed else dense

    def to_scipy(self) -> LinearOperator:
        """The same operator on NumPy arrays, for SciPy's solvers."""
        from scipy.sparse.linalg import LinearOperator

        def product(op: NTKOperator) -> Any:
            return lambda v: (op @ torch.from_numpy(v)).cpu().numpy()

        forth, back = product(self), product(self.T)
        return LinearOperator(
            self.shape,
            matvec=forth,
            matmat=forth,
            rmatvec=back,
            rmatmat=back,
            dtype=torch.empty(0, dtype=self.dtype).numpy().dtype,
        )

    def _sizes(self) -> None:
        left, right = self._left.side, self._right.side
        self.shape = (left.n * left.weighed.classes, right.n * right.weighed.classes)


def _jacobian(model: nn.Module, x: Inputs, batch: bool, limit: int) -> Jacobian:
    """Of examples that are a function's: not random, and alone what they are together."""
    side = Side(model, x, batch)
    with side.mode():
        if batch:
            reproducible(model, x)
        else:
            two = pair(x, None)
            outputs = reproducible(model, two)
            alone = torch.cat([Alone(model, two, i).output for i in range(2)])
            if float((outputs - alone).norm()) > coarsest(model, outputs) ** 0.5 * float(outputs.norm()):
                raise KernelError(
                    f"{mixing(model, two)} mixes examples: an output depends on the other examples in the "
                    "batch, so that the kernel of single examples is undefined"
                )
    return Jacobian(side, limit)
