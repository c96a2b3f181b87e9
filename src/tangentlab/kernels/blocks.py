"""Blocks: the parameters that a kernel is summed over, the work on a tile, and who is given it when.

The kernel is additive over parameters, so each block makes its share K = G G'ᵀ by itself, as soon as the
cotangents at its sites have arrived, and they need not live together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tangentlab.kernels.capture import Tape
from tangentlab.kernels.costs import Costs
from tangentlab.kernels.products import gram
from tangentlab.kernels.replay import Replay
from tangentlab.kernels.sites import Site


class Option(NamedTuple):
    """One route for a block on one tile: what it costs for all sets of cotangents.

    ``kept``, ``space`` and ``most`` are elements: held as long as the tile, the least that the transients
    need, and what more of would gain nothing.
    """

    route: str
    flops: float
    seconds: float
    kept: int
    space: int
    most: int


@dataclass(frozen=True)
class Shape:
    """The work on a tile: ``left`` examples meet ``right`` others, or each other; and the rates of it.

    ``sets`` times ``rows`` cotangents are pulled.
    """

    left: int
    right: int | None
    rows: int
    sets: int
    dtype: torch.dtype
    products: str | None
    costs: Costs

    @property
    def examples(self) -> int:
        """Examples in the tile."""
        return self.left + (self.right or 0)

    @property
    def pairs(self) -> float:
        """Pairs of examples that meet."""
        return self.left * (self.left / 2 if self.right is None else self.right)

    @property
    def met(self) -> int:
        """Entries of what is kept for each pair; where all meet all, also those above the diagonal."""
        return self.left * (self.left if self.right is None else self.right)


@dataclass
class Tile:
    """A tape with its cotangents pulled, and what a block may use to make its share.

    Attributes:
        split: the first ``split`` examples meet the others, or None: all meet all.
        dtype: of the sums; ``factors`` of what is multiplied.
        space: elements of ``dtype`` that the transients may hold.
        cache: what is kept from one set of cotangents to the next.
    """

    tape: Tape
    split: int | None
    dtype: torch.dtype
    factors: torch.dtype
    space: float
    cache: dict[object, Tensor] = field(default_factory=dict)
    _scratch: Tensor | None = None

    @property
    def sides(self) -> tuple[slice, slice]:
        """The examples on the left and on the right."""
        n = len(self.tape)
        return (
            (slice(0, n), slice(0, n)) if self.split is None else (slice(0, self.split), slice(self.split, n))
        )

    def scratch(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialised tensor, valid until the next one: fresh memory is slow memory."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._scratch is None or len(self._scratch) < size:
            self._scratch = None
            self._scratch = self.tape.output.new_empty(size, dtype=torch.uint8)
        return self._scratch[:size].view(dtype).view(shape)

    def product(self, G: Tensor) -> Tensor:
        """The Gram of G [n, R, P]."""
        if self.split is None:
            return gram(G, None, self.dtype)
        return gram(G[: self.split], G[self.split :], self.dtype)


class Block(Protocol):
    """The parameters ``names``, flattened one after the other, and their share of the kernel.

    Attributes:
        route: one of the options'; the plan sets it.
    """

    names: list[str]
    route: str

    def sites(self, tape: Tape) -> list[Site]:
        """Where the parameters act."""
        ...

    def gradient(self, tape: Tape, dtype: torch.dtype) -> Tensor | None:
        """G [n, R, P] in ``dtype``, None if the outputs do not depend on the parameters."""
        ...

    def gram(self, tile: Tile) -> Tensor | None:
        """K[i,r,j,s] = ⟨G_ir, G_js⟩, [n, R, m, R]; where all meet all, valid for i ≥ j."""
        ...

    def options(self, tape: Tape, shape: Shape) -> list[Option]:
        """The routes, from a tape of one example with its cotangents pulled; none if it acts nowhere."""
        ...


def in_turn(found: Sequence[Block], tape: Tape, cotangents: Tensor, take: Callable[[Block], None]) -> None:
    """Pull the cotangents, call ``take`` on each block once all of its own have arrived, and let them go."""
    sites = {block: block.sites(tape) for block in found}
    waiting = {block: len(listed) for block, listed in sites.items()}
    users: dict[Site, list[Block]] = defaultdict(list)
    for block, listed in sites.items():
        for site in listed:
            users[site].append(block)

    def finish(block: Block) -> None:
        waiting[block] = 0
        take(block)
        for site in sites[block]:
            if not any(waiting[user] for user in users[site]):
                site.delta = None

    def arrived(site: Site) -> None:
        for block in users[site]:
            waiting[block] -= 1
            if waiting[block] == 0:
                finish(block)

    tape.pull(cotangents, arrived)
    for block in found:  # those with sites on which the outputs do not depend
        if waiting[block]:
            finish(block)


class Replayed:
    """Parameters that act through modules which are run again: exact for every module."""

    def __init__(self, names: list[str], size: int, replays: list[Replay]) -> None:
        self.names = names
        self.route = "replay"
        self._size = size
        self._replays = replays
        self.modules = [replay.module for replay in replays]

    def sites(self, tape: Tape) -> list[Site]:
        return [call for module in self.modules for call in tape.calls[module]]

    def gradient(self, tape: Tape, dtype: torch.dtype) -> Tensor | None:
        return self._gradient(tape, dtype, 0)

    def gram(self, tile: Tile) -> Tensor | None:
        n = len(tile.tape)
        rows = max(
            (site.delta.shape[1] for site in self.sites(tile.tape) if site.delta is not None), default=0
        )
        G = self._gradient(tile.tape, tile.factors, tile.space - 2 * n * rows * self._size)
        return None if G is None else tile.product(G)

    def _gradient(self, tape: Tape, dtype: torch.dtype, space: float) -> Tensor | None:
        total: Tensor | None = None
        for replay in self._replays:
            share = replay.gradient(tape, dtype, space)
            if share is not None:
                total = share if total is None else total.add_(share)
        return total

    def options(self, tape: Tape, shape: Shape) -> list[Option]:
        if all(site.delta is None for site in self.sites(tape)):
            return []
        n, R, S, P = shape.examples, shape.rows, shape.sets, self._size
        products = 2 * S * shape.pairs * R * R * P
        transient = max(replay.transient(tape) for replay in self._replays)
        costs, item = shape.costs, shape.dtype.itemsize
        seconds = products / (costs.product * costs.speed(shape.dtype, shape.products))
        seconds += item * S * n * (4 * transient + R * P) / costs.bandwidth + S * 500 * costs.call
        return [
            Option("replay", products, seconds, 0, 2 * n * R * P + transient, n * (2 * R * P + transient))
        ]
