"""What every metric asks of its input: finite kernels of the right shape, labels, curves over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tangentlab.errors import ConfigError, KernelError

Curve = Sequence[float] | NDArray[np.floating] | NDArray[np.integer] | Tensor


def resolution(K: Tensor) -> float:
    """√ε of the kernel's dtype, half of its digits: 1.5e-8 (float64), 3.5e-4 (float32), 0.03 (float16).

    A kernel's entries are sums of many products, whose rounding exceeds ε but stays well below √ε; what a
    wrong kernel breaks, symmetry or a positive spectrum, it breaks by far more.
    """
    dtype = K.dtype if K.dtype.is_floating_point else torch.float64
    return float(torch.finfo(dtype).eps ** 0.5)


def as_kernel(K: Tensor, name: str = "K") -> Tensor:
    """K [..., n, m] in float64: real, finite, nowhere a kernel of zeros."""
    if K.ndim < 2 or K.numel() == 0:
        raise KernelError(f"{name} has shape {list(K.shape)}; a kernel is [..., n, m], none of them 0")
    if K.is_complex():
        raise KernelError(f"{name} has dtype {K.dtype}; a kernel is real")
    K = K.detach().to(torch.float64)
    bad = int((~torch.isfinite(K)).sum())
    if bad:
        raise KernelError(f"{name} has {bad} entries of {K.numel()} that are NaN or infinite")
    empty = ~K.ne(0).any(-1).any(-1)
    if bool(empty.any()):
        raise KernelError(
            f"{name} has {int(empty.sum())} kernels of {empty.numel()} that are zero everywhere"
        )
    return K


def as_square(K: Tensor, name: str = "K") -> Tensor:
    """:func:`as_kernel`, refusing kernels between two different sets."""
    if K.ndim < 2 or K.shape[-1] != K.shape[-2]:
        raise KernelError(f"{name} has shape {list(K.shape)}; this metric needs square kernels [..., n, n]")
    return as_kernel(K, name)


def as_symmetric(K: Tensor, name: str = "K") -> Tensor:
    """:func:`as_square`, refusing asymmetry above √ε of a kernel's largest entry; then exactly symmetric."""
    square = as_square(K, name)
    asymmetry = float(((square - square.mT).abs().amax((-2, -1)) / square.abs().amax((-2, -1))).max())
    if asymmetry > resolution(K):
        raise KernelError(
            f"{name} is not symmetric: entries differ from their mirror by {asymmetry:.2g} of the largest, "
            f"above {resolution(K):.2g} for {K.dtype}; a mixed kernel has no spectrum"
        )
    return (square + square.mT) / 2


def unit(K: Tensor) -> Tensor:
    """K / ‖K‖ (Frobenius); by its largest entry first, so that no square overflows or vanishes."""
    K = K / K.abs().amax(dim=(-2, -1), keepdim=True)
    scaled: Tensor = K / torch.linalg.matrix_norm(K, keepdim=True)
    return scaled


def as_labels(y: Tensor, n: int) -> Tensor:
    """Integer class labels [n], from 0."""
    if y.ndim != 1 or len(y) != n:
        raise KernelError(f"y has shape {list(y.shape)}; the kernel needs labels of shape [{n}]")
    if y.dtype.is_floating_point or y.dtype.is_complex:
        raise KernelError(f"y has dtype {y.dtype}; labels are integers from 0")
    y = y.detach().long()
    if int(y.min()) < 0:
        raise KernelError(f"y holds the label {int(y.min())}; labels are integers from 0")
    return y


def as_curve(values: Curve, name: str) -> NDArray[np.float64]:
    """A one-dimensional float64 array of finite numbers."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    curve = np.asarray(values, dtype=np.float64)
    if curve.ndim != 1:
        raise ConfigError(f"{name} has shape {list(curve.shape)}; a curve has one axis")
    bad = int((~np.isfinite(curve)).sum())
    if bad:
        raise ConfigError(f"{name} has {bad} values of {len(curve)} that are NaN or infinite")
    return curve


def as_times(values: Curve, name: str, length: int | None = None) -> NDArray[np.float64]:
    """A curve that increases strictly, with one value for each of ``length`` others."""
    times = as_curve(values, name)
    if length is not None and len(times) != length:
        raise ConfigError(f"{name} has {len(times)} values for {length} points")
    stuck = np.flatnonzero(np.diff(times) <= 0)
    if len(stuck):
        k = int(stuck[0])
        raise ConfigError(f"{name} must increase strictly, but {times[k + 1]:g} follows {times[k]:g}")
    return times
