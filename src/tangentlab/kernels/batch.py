"""The batch-statistics kernel J(x) J(x2)ᵀ and the mixed kernel J_eval(x) J_batch(x2)ᵀ, exact.

F(X; θ) [n, C] is the model on a whole batch, BatchNorm in training mode on it (buffers left alone), all else
in evaluation mode; J = ∂vec F/∂θ, derivative through the statistics. An output then depends on every example
of its batch, so that each row of J is an ordinary gradient of the whole batch: one backward a row. J is never
held whole. θ is cut into ranges of columns; for each range the rows of one side are held, those of the other
stream past them, and the products add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tangentlab.errors import KernelError
from tangentlab.kernels.inputs import Inputs, cotangents
from tangentlab.kernels.memory import bound_for, countable
from tangentlab.kernels.products import chunks
from tangentlab.kernels.reproducible import reproducible, require_statistics
from tangentlab.kernels.sides import Side

# The share of the bound that the count may fill; the rest is for what allocators and BLAS keep aside, and for
# the holes that many backwards leave in the heap.
_COUNTED = 0.75

# Fewer columns a pass are refused: each pass repeats every backward.
_LEAST_COLUMNS = 1024

# The streaming rows are multiplied this part of the held rows at a time; a symmetric product is made in as
# many row blocks, each up to the diagonal: (1 + 1/4)/2 of the work.
_BLOCKS = 4


class Piece(NamedTuple):
    """The elements start … stop of a parameter, flattened."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class BatchPlan:
    """How the kernel is computed, and what that costs.

    Attributes:
        groups: the ranges of columns, one a pass; neighbours in the model are neighbours here, so that ranges
            near the output need short backwards only.
        classes: C.
        sets: the times that a pass goes over the examples: C for the class kernels, else once.
        held: rows held at once.
        block: rows of the other side taken at once; 0 where x2 is x.
        holds_x2: whether the held side is x2, the streaming side x.
        bytes: at the peak, by count.
        backwards: in all passes; each is of a whole batch, or of one example on the side of J_eval.
        flops: of the products, 2 a multiply-add.
    """

    groups: tuple[tuple[Piece, ...], ...]
    classes: int
    sets: int
    held: int
    block: int
    holds_x2: bool
    bytes: int
    backwards: int
    flops: int

    @property
    def passes(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        lines = [
            f"kernel with batch statistics, {self.passes} pass{'es' * (self.passes > 1)} over columns: "
            f"{self.backwards} backwards, {self.held} rows held",
            f"expected {self.bytes / 2**20:,.0f} MiB; products {self.flops / 1e9:,.1f} GFLOP",
        ]
        for group in self.groups:
            first, last = group[0], group[-1]
            lines.append(f"{first.name}[{first.start}] … {last.name}[{last.stop - 1}]")
        return "\n".join(lines)


def batch_ntk(
    model: nn.Module,
    x: Inputs,
    x2: Inputs | None,
    *,
    kind: str,
    mixed: bool,
    limit: int,
    dtype: torch.dtype,
    advance: Callable[[], None],
    plan: BatchPlan | None = None,
) -> Tensor:
    """Θ = J(x) J(x2)ᵀ of batches, or J_eval(x) J_batch(x2)ᵀ, over the parameters that require grad.

    With n and m examples, R = C rows an example for "full", else 1, and S = C sets of rows for "class" and
    "trace", else 1, a pass costs S R (n + m) backwards (S R n with x2 None, not mixed) and there are about
    P R min(n, m) · itemsize / limit passes. The symmetric kernel is symmetric bit for bit.

    Args:
        model: in evaluation mode and preserved by the caller.
        x, x2: examples on the model's device. None for x2 = x, which is symmetric unless mixed.
        kind: "full", "class", "trace" or "pseudo", as for :func:`tangentlab.ntk`.
        mixed: whether x is taken in evaluation mode, every example on its own.
        limit: bound in bytes on the growth of working memory, the result not counted.
        dtype: of the result, of the held rows and of the sums.
        advance: called after every backward.
        plan: what :func:`batch_plan` gave for the same arguments; made if None.

    Returns:
        "full" [n, m, C, C], "class" [C, n, m], "trace" or "pseudo" [n, m].

    Raises:
        KernelError: a batch too small for its BatchNorm; with ``mixed``, a BatchNorm without running
            statistics; randomness; a forward that changes a parameter; too little memory (names the least
            that would do).
        ModelError: the model does not map x to a floating-point [n, C].
    """
    left, right = _sides(model, x, x2, mixed)
    plan = plan or _planned(left, right, kind, limit, dtype)
    for side in (left, right):
        if side is not None:
            with side.mode():
                reproducible(model, next(side.parts()))
    sets = cotangents(kind, plan.classes, left.dtype, left.device)
    n, m, rows = left.n, (right or left).n, sets.shape[1]
    K = torch.zeros(
        plan.classes if kind == "class" else 1, n * rows, m * rows, dtype=dtype, device=left.device
    )
    with torch.no_grad():
        if right is None:
            _fill_symmetric(K, left, sets, plan, advance)
        else:
            _fill(K, left, right, sets, plan, advance)
    if kind == "full":
        return _by_examples(K[0], n, m, rows)
    if kind == "trace":
        K /= plan.classes
    return K if kind == "class" else K[0]


def batch_plan(
    model: nn.Module,
    x: Inputs,
    x2: Inputs | None,
    *,
    kind: str,
    mixed: bool,
    limit: int,
    dtype: torch.dtype,
) -> BatchPlan:
    """The fewest passes whose working memory stays within ``limit`` bytes; arguments as of :func:`batch_ntk`.

    The graphs are weighed on batches of two and three examples and extrapolated.

    Raises:
        KernelError: as :func:`batch_ntk`, randomness apart.
    """
    return _planned(*_sides(model, x, x2, mixed), kind, limit, dtype)


def _gradients(side: Side, group: Sequence[Piece], sets: Tensor) -> Iterator[tuple[Tensor | None, ...]]:
    """Σ_c v_c ∂F_ic/∂θ for every parameter of the group: set by set, then example by example, then v.

    To be consumed inside ``side.mode()``: a checkpointed module runs again in its backward.
    """
    targets = [side.parameters[piece.name] for piece in group]
    for rows in sets:
        # The batch's graph is kept for all passes. That of an example alone is made every time: little
        # beside a backward of the other side's batch.
        for part in side.parts():
            yield from _rows(side.whole if side.batch else side.outputs(part), targets, rows)


def _rows(F: Tensor, targets: Sequence[Tensor], rows: Tensor) -> Iterator[tuple[Tensor | None, ...]]:
    for i in range(len(F)):
        for v in rows:
            if not F.requires_grad:
                yield (None,) * len(targets)
                continue
            seed = torch.zeros_like(F)
            seed[i] = v
            yield torch.autograd.grad(F, targets, seed, retain_graph=True, allow_unused=True)


def _sides(model: nn.Module, x: Inputs, x2: Inputs | None, mixed: bool) -> tuple[Side, Side | None]:
    if not mixed:
        return Side(model, x, True), None if x2 is None else Side(model, x2, True)
    require_statistics(model, "the mixed kernel")
    return Side(model, x, False), Side(model, x if x2 is None else x2, True)


def _fill_symmetric(
    K: Tensor, side: Side, sets: Tensor, plan: BatchPlan, advance: Callable[[], None]
) -> None:
    """Add J Jᵀ to K[k] for each of the sets of cotangents; each set has its slot k, or all share one."""
    for group, (rows, _) in zip(plan.groups, _buffers(plan, K), strict=True):
        with side.mode():
            gradients = _gradients(side, group, sets)
            for k in range(len(sets)):
                _write(rows, group, gradients, advance)
                for block in _row_blocks(len(rows)):
                    K[k % len(K), block, : block.stop].addmm_(rows[block], rows[: block.stop].T)
    for i in range(1, K.shape[1]):
        K[:, :i, i] = K[:, i, :i]


def _fill(
    K: Tensor, left: Side, right: Side, sets: Tensor, plan: BatchPlan, advance: Callable[[], None]
) -> None:
    """Add J(x) J(x2)ᵀ to K[k] likewise."""
    held, streamed = (right, left) if plan.holds_x2 else (left, right)
    # Row blocks of K, or of its transpose, are the streaming side's.
    into = K if plan.holds_x2 else K.mT
    for group, (rows, block) in zip(plan.groups, _buffers(plan, K), strict=True):
        first, second = (_gradients(side, group, sets) for side in (held, streamed))
        for k in range(len(sets)):
            with held.mode():
                _write(rows, group, first, advance)
            with streamed.mode():
                for part in chunks(into.shape[1], plan.block):
                    some = block[: part.stop - part.start]
                    _write(some, group, second, advance)
                    into[k % len(K), part].addmm_(some, rows.T)


def _buffers(plan: BatchPlan, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each group, room for the held rows and for a block of streaming ones: always the same memory."""
    columns = [sum(piece.stop - piece.start for piece in group) for group in plan.groups]
    held, block = (like.new_empty(rows * max(columns)) for rows in (plan.held, plan.block))
    for size in columns:
        yield held[: plan.held * size].view(-1, size), block[: plan.block * size].view(-1, size)


def _write(
    rows: Tensor,
    group: Sequence[Piece],
    gradients: Iterator[tuple[Tensor | None, ...]],
    advance: Callable[[], None],
) -> None:
    """The next gradients, a row each."""
    widths = [piece.stop - piece.start for piece in group]
    for row in rows:
        # Not held by a name here while the next backward runs.
        _copy(row.split(widths), group, next(gradients))
        advance()


def _copy(row: Sequence[Tensor], group: Sequence[Piece], gradients: Sequence[Tensor | None]) -> None:
    for into, (_, start, stop), gradient in zip(row, group, gradients, strict=True):
        if gradient is None:
            into.zero_()
        else:
            into.copy_(gradient.to_dense().reshape(-1)[start:stop])


def _by_examples(K: Tensor, n: int, m: int, classes: int) -> Tensor:
    """[n C, m C] → [n, m, C, C], example by example in place: the result is not held twice."""
    for example in K.view(n, classes, m, classes):
        example.view(m, classes, classes).copy_(example.transpose(0, 1).clone())
    return K.view(n, m, classes, classes)


def _planned(left: Side, right: Side | None, kind: str, limit: int, dtype: torch.dtype) -> BatchPlan:
    sides = [side for side in (left, right) if side is not None]
    weights = [side.weighed.at(side.n if side.batch else 1) for side in sides]
    classes = left.weighed.classes
    sets, rows, _ = cotangents(kind, classes, dtype, torch.device("cpu")).shape
    n, m = left.n * rows, (right or left).n * rows
    holds_x2 = m <= n
    held = min(n, m)
    block = 0 if right is None else min(-(-held // _BLOCKS), max(n, m))
    parameters = list(left.parameters.items())
    total = sum(p.numel() for _, p in parameters)
    # A backward makes whole gradients: at most two reach beyond the range, and one is in the making.
    fixed = sum(weight.graph for weight in weights) + max(weight.transients for weight in weights)
    fixed += 3 * max(p.nbytes for _, p in parameters)
    column = (held + block) * dtype.itemsize + max(p.element_size() for _, p in parameters)
    least = min(total, _LEAST_COLUMNS)
    columns = min(total, int(countable(limit, _COUNTED) - fixed) // column)
    if columns < least:
        raise KernelError(
            f"memory of {limit / 2**20:.1f} MiB is too small: this model, kernel and batch "
            f"need {bound_for(fixed + least * column, _COUNTED)} MiB"
        )
    groups = _groups([(name, p.numel()) for name, p in parameters], columns)
    if right is None:
        multiplied = sum((part.stop - part.start) * part.stop for part in _row_blocks(n))
    else:
        multiplied = n * m
    return BatchPlan(
        groups=groups,
        classes=classes,
        sets=sets,
        held=held,
        block=block,
        holds_x2=holds_x2,
        bytes=fixed + -(-total // len(groups)) * column,
        backwards=len(groups) * sets * (n if right is None else n + m),
        flops=2 * sets * total * multiplied,
    )


def _groups(sizes: Sequence[tuple[str, int]], columns: int) -> tuple[tuple[Piece, ...], ...]:
    """The flattened parameters, one after the other, in the fewest even ranges of at most ``columns``.

    >>> _groups([("a", 3), ("b", 4)], 4)
    ((Piece(name='a', start=0, stop=3),), (Piece(name='b', start=0, stop=4),))
    """
    total = sum(size for _, size in sizes)
    passes = -(-total // columns)
    groups = []
    for g in range(passes):
        low, high = total * g // passes, total * (g + 1) // passes
        pieces, offset = [], 0
        for name, size in sizes:
            start, stop = max(low - offset, 0), min(high - offset, size)
            if start < stop:
                pieces.append(Piece(name, start, stop))
            offset += size
        groups.append(tuple(pieces))
    return tuple(groups)


def _row_blocks(rows: int) -> Iterator[slice]:
    return chunks(rows, -(-rows // _BLOCKS))
