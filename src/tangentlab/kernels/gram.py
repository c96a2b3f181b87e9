"""Products of per-example gradients: the Gram of two tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# A symmetric product is made in this many row blocks, each up to the diagonal: (1 + 1/4)/2 of the work.
_ROW_BLOCKS = 4


def chunks(stop: int, size: float, start: int = 0) -> Iterator[slice]:
    """start … stop in slices of at most ``size``, at least one each.

    >>> list(chunks(7, 3))
    [slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)]
    """
    step = max(1, int(size))
    return (slice(low, min(low + step, stop)) for low in range(start, stop, step))


def row_blocks(n: int) -> Iterator[slice]:
    """The row blocks of a symmetric product."""
    return chunks(n, -(-n // _ROW_BLOCKS))


def product(left: Tensor, right: Tensor | None) -> Tensor:
    """K[i,r,j,s] = ⟨G_ir, G'_js⟩ of gradients G [n, R, P] and G' [m, R, P].

    With ``right`` None, G' is G and only i ≥ j is computed: what lies above the diagonal blocks is zero.
    """
    n, rows, size = left.shape
    flat = left.reshape(n * rows, size)
    if right is not None:
        return (flat @ right.reshape(-1, size).T).view(n, rows, len(right), rows)
    K = flat.new_zeros(n * rows, n * rows)
    for block in row_blocks(n * rows):
        torch.mm(flat[block], flat[: block.stop].T, out=K[block, : block.stop])
    return K.view(n, rows, n, rows)


def mirrored(K: Tensor) -> Tensor:
    """The symmetric K [n, R, n, R] from its lower triangle over the rows (i, r): exact, bit for bit."""
    n, rows = K.shape[:2]
    lower = K.view(n * rows, n * rows).tril()
    return (lower + lower.tril(-1).T).view(n, rows, n, rows)
