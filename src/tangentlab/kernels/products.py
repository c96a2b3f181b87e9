"""Matrix products of per-example gradients, and the precision they are made in."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

PRODUCTS = ("tf32", "bf16")

# A symmetric product is halved down to blocks of at most this many rows: smaller ones are slow.
_ROWS = 64
_MOST_BLOCKS = 8

# Columns summed at once where a product's own result is rounded to bf16; and where a product of few rows adds
# a long sum up in one go, which in float32 loses three digits at ten million.
_BF16_COLUMNS = 8192
_LONG, _FEW = 2**16, 16


def chunks(stop: int, size: float, start: int = 0) -> Iterator[slice]:
    """start … stop in slices of at most ``size``, at least one each.

    >>> list(chunks(7, 3))
    [slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)]
    """
    step = max(1, int(size))
    return (slice(low, min(low + step, stop)) for low in range(start, stop, step))


def most(fits: Callable[[int], bool], n: int) -> int:
    """The largest number of 1 … n that fits, or 1.

    >>> most(lambda k: k <= 5, 8)
    5
    """
    return max(1, bisect_left(range(1, n + 1), True, key=lambda k: not fits(k)))


def row_blocks(n: int, each: int = 1) -> Iterator[slice]:
    """The row blocks of a symmetric product of n examples with ``each`` rows."""
    return chunks(n, max(-(-_ROWS // each), -(-n // _MOST_BLOCKS)))


def lower_blocks(n: int, each: int = 1, start: int = 0) -> Iterator[tuple[slice, slice]]:
    """Blocks (rows, columns) that cover the lower triangle of a symmetric product likewise.

    Squares below the diagonal, as large as can be, and few entries above it.

    >>> list(lower_blocks(100))  # doctest: +NORMALIZE_WHITESPACE
    [(slice(50, 100, None), slice(0, 50, None)), (slice(0, 50, None), slice(0, 50, None)),
     (slice(50, 100, None), slice(50, 100, None))]
    """
    if n - start < 2 or (n - start) * each <= _ROWS:
        yield slice(start, n), slice(start, n)
        return
    middle = (start + n) // 2
    yield slice(middle, n), slice(start, middle)
    yield from lower_blocks(middle, each, start)
    yield from lower_blocks(n, each, middle)


def outer(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a bᵀ [p, q] of a [p, k] and b [q, k], in ``dtype``; bf16 factors are summed in float32.

    On a GPU the sums leave the product as float32; a CPU rounds them to bf16, so k is cut in slices whose
    sums are added in ``dtype``.
    """
    if a.dtype != torch.bfloat16:
        if a.shape[1] <= _LONG or min(len(a), len(b)) >= _FEW:
            return _exact(a, b).to(dtype)
        return torch.stack([_exact(a[:, s], b[:, s]) for s in chunks(a.shape[1], _LONG)]).sum(0).to(dtype)
    if a.is_cuda:
        return torch.mm(a, b.T, out_dtype=torch.float32).to(dtype)
    K = torch.zeros(len(a), len(b), dtype=dtype)
    for part in chunks(a.shape[1], _BF16_COLUMNS):
        K += a[:, part] @ b[:, part].T
    return K


def _exact(a: Tensor, b: Tensor) -> Tensor:
    return _onednn(a, b) if wide(a) else a @ b.T


def formed(d: Tensor, a: Tensor, out: Tensor) -> None:
    """Write d_i a_iᵀ [p, q] of each example's d_i [p, T] and a_i [q, T] into out [n, p, q]."""
    if wide(d) and one_by_one(d.shape[1], d.shape[2], a.shape[1]):
        d = d.contiguous()  # oneDNN needs it; of all at once it is a third of the work
        for one, other, into in zip(d, a, out, strict=True):
            into.copy_(_onednn(one, other))
    else:
        torch.bmm(d, a.transpose(1, 2), out=out)


def one_by_one(p: int, T: int, q: int) -> bool:
    """Whether products [p, T] [T, q] are large enough to be made one by one, where that is faster at all."""
    return T > 16 and p * T * q >= 5e6


def wide(a: Tensor) -> bool:
    """Whether oneDNN makes the products of a."""
    # MKL keeps to half of the vector width on CPUs that are not Intel's; oneDNN does not.
    return a.dtype == torch.float32 and not a.is_cuda and _ONEDNN is not None


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    b = b if b.is_contiguous() or b.T.is_contiguous() else b.contiguous()
    product: Tensor = _ONEDNN(a.contiguous(), b, None, "none", [], "")
    return product


_ONEDNN: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def gram(left: Tensor, right: Tensor | None, dtype: torch.dtype) -> Tensor:
    """K[i,r,j,s] = ⟨G_ir, G'_js⟩ in ``dtype`` of gradients G [n, R, P] and G' [m, R, P].

    With ``right`` None, G' is G and only i ≥ j is computed: what lies above the diagonal blocks is zero.
    """
    n, rows, size = left.shape
    flat = left.reshape(n * rows, size)
    if right is not None:
        return outer(flat, right.reshape(-1, size), dtype).view(n, rows, len(right), rows)
    K = flat.new_zeros(n * rows, n * rows, dtype=dtype)
    for block, below in lower_blocks(n * rows):
        K[block, below] = outer(flat[block], flat[below], dtype)
    return K.view(n, rows, n, rows)


def mirrored(K: Tensor) -> Tensor:
    """The symmetric K [n, R, n, R] from its lower triangle over the rows (i, r): exact, bit for bit."""
    n, rows = K.shape[:2]
    lower = K.view(n * rows, n * rows).tril()
    return (lower + lower.tril(-1).T).view(n, rows, n, rows)


@contextmanager
def precision(rounding: str = "ieee") -> Iterator[None]:
    """float32 arithmetic as it is written, whatever the caller allows; or "tf32" on GPUs.

    PyTorch rounds the factors of convolutions on GPUs to TF32 by default.
    """
    backends: Any = torch.backends
    settings = {backends.cuda.matmul: rounding, backends.cudnn.conv: rounding}
    settings |= {backends.mkldnn.matmul: "ieee", backends.mkldnn.conv: "ieee"}
    with ExitStack() as stack:
        for setting, value in settings.items():
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
            setting.fp32_precision = value
        yield
