"""One parameter that acts through functions with a rule, and the routes to its share K = G G'ᵀ.

A weight that meets a vector a_p in R^D at the positions p = 1 … T of an example, with cotangents δ_p in R^O,
has the gradient G = Σ_p δ_p a_pᵀ, and its Gram has these exact routes (multiply-adds for a pair of examples,
R cotangents each):

    explicit   ⟨G, G'⟩, a slice of channels at a time                          R² O D, + forming R T O D each
    ghost      Σ_pq (δ_p·δ'_q)(a_p·a'_q), G never formed                       T² D + R² T² O
    mixed      Σ_p δ_p · (Σ_q (a_p·a'_q) δ'_q)                                 T² D + R T² O + R² T O

The a_p·a'_q do not depend on the cotangents and are kept from one set of them to the next. (Goodfellow 2015,
arXiv 1510.01799, for T = 1; Rochette et al. 2019, arXiv 1912.06015; Novak et al. 2022, arXiv 2206.08720.)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tangentlab.kernels.blocks import Option, Shape, Tile
from tangentlab.kernels.capture import Tape
from tangentlab.kernels.products import chunks, formed, lower_blocks, one_by_one, outer, row_blocks
from tangentlab.kernels.sites import Site
from tangentlab.kernels.uses import Convolution, Embedding, Positional, Use

# Elements of patches made at once: they are read again while they lie in a cache.
_CACHED = 2**20
# Elements of gradients multiplied at once: of longer ones the product is slow.
_LARGEST = 2**27


class Direct:
    """One parameter that acts through functions with a rule."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.names = [name]
        self.route = "explicit"
        self.parameter = parameter

    def sites(self, tape: Tape) -> list[Site]:
        return list(tape.uses[id(self.parameter)])

    def gradient(self, tape: Tape, dtype: torch.dtype) -> Tensor | None:
        live = self.live(tape)
        return self._total(live, len(tape), slice(0, len(tape)), dtype) if live else None

    def gram(self, tile: Tile) -> Tensor | None:
        live = self.live(tile.tape)
        if not live:
            return None
        weights = self.positions(live)
        if self.route == "explicit" or weights is None:
            return self._explicit(tile, live)
        if self.route not in ("ghost", "mixed"):
            return self._sliced(tile, weights)
        A = self._inner(tile, weights)
        return self._ghost(tile, weights, A) if self.route == "ghost" else self._mixed(tile, weights, A)

    def live(self, tape: Tape) -> list[Use]:
        """The uses that the outputs depend on."""
        return [use for use in tape.uses[id(self.parameter)] if use.delta is not None]

    def positions(self, live: list[Use]) -> list[Positional] | None:
        """The uses if they are positions of one kind, to be joined; else None."""
        weights = [use for use in live if isinstance(use, Positional) and use.positional]
        if len(weights) < len(live) or any(use.roles.get("weight") is not self.parameter for use in weights):
            return None
        if any(use.roles.get("bias") is self.parameter for use in weights):
            return None
        kinds = {(use.channels, use.features, use.swapped, isinstance(use, Embedding)) for use in weights}
        return weights if len(kinds) == 1 else None

    def _total(self, live: list[Use], n: int, part: slice, dtype: torch.dtype) -> Tensor:
        total: Tensor | None = None
        for use in live:
            for role, parameter in use.roles.items():
                if parameter is self.parameter:
                    share = use.gradient(role, n, part, dtype)  # may be the cotangents themselves
                    total = share if total is None else total + share
        assert total is not None
        return total

    def _explicit(self, tile: Tile, live: list[Use]) -> Tensor:
        n, rows = len(tile.tape), _rows(live)
        G = tile.scratch(tile.factors, n, rows, self.parameter.numel())
        dense = 3 * rows * self.parameter.numel()  # of one use, of two added, and cast
        for part in chunks(n, tile.space / 2 / (self._transient(live, n) + dense)):
            G[part] = self._total(live, n, part, tile.dtype)
        return tile.product(G)

    def _sliced(self, tile: Tile, weights: list[Positional]) -> Tensor:
        """A slice of output channels of G at a time: the kernel is additive over parameters."""
        n, rows, D = len(tile.tape), _rows(weights), weights[0].features
        K: Tensor | None = None
        beside = min(tile.space / 2, max(_CACHED, 2 * self._transient(weights, n)))
        most = min(tile.space - beside, _LARGEST) / (n * rows * D)
        for some in chunks(weights[0].channels, _even(weights[0].channels, most)):
            width = some.stop - some.start
            G = tile.scratch(tile.factors, n, rows * width, D)
            if "patches" in self.route:
                self._from_patches(tile, weights, some, G)
            else:
                self._from_convolutions(tile, weights, some, G)
            share = tile.product(G.view(n, rows, width * D))
            K = share if K is None else K.add_(share)
        assert K is not None
        return K

    def _from_patches(self, tile: Tile, weights: list[Positional], some: slice, G: Tensor) -> None:
        n = len(tile.tape)
        if self.route == "kept patches" and self not in tile.cache:
            tile.cache[self] = self._patches(tile, weights, slice(0, n))
        for part in chunks(n, min(tile.space / 2, _CACHED) / self._transient(weights, n)):
            a = tile.cache[self][part] if self in tile.cache else self._patches(tile, weights, part)
            formed(self._columns(tile, weights, part, some).flatten(1, 2), a, G[part])

    def _from_convolutions(self, tile: Tile, weights: list[Positional], some: slice, G: Tensor) -> None:
        n, rows = len(tile.tape), _rows(weights)
        for index, use in enumerate(weights):
            assert isinstance(use, Convolution)
            together = max(1, int(tile.space / 4 / use.transient("weight", n)))
            a = use.front(use.inputs[0], n)
            assert use.delta is not None
            target = G.view(n, rows, -1) if index == 0 else torch.empty_like(G).view(n, rows, -1)
            use.convolve(a, use.delta, some, together if self.route == "grouped" else 1, target)
            if index:
                G += target.view_as(G)

    def _inner(self, tile: Tile, weights: list[Positional]) -> Tensor:
        """A[i,p,j,q] = a_ip·a_jq of the left and the right examples."""
        if self in tile.cache:
            return tile.cache[self]
        left, right = tile.sides
        n = len(tile.tape)
        if isinstance(weights[0], Embedding):
            s, t = (
                _joined([u.tokens(n, side) for u in weights if isinstance(u, Embedding)], 1)
                for side in tile.sides
            )
            A = ((s[:, :, None, None] == t) & (s >= 0)[:, :, None, None]).to(tile.dtype)
        else:
            T = sum(use.positions(n) for use in weights)
            A = tile.tape.output.new_empty(left.stop, T, right.stop - right.start, T, dtype=tile.dtype)
            if n * self._transient(weights, n) <= tile.space / 2:
                self._inner_at_once(tile, weights, A)
            else:
                self._inner_in_chunks(tile, weights, A)
        tile.cache[self] = A
        return A

    def _inner_at_once(self, tile: Tile, weights: list[Positional], A: Tensor) -> None:
        flat = self._vectors(tile, weights, slice(None)).flatten(0, 1)
        n, T, m, _ = A.shape
        into = A.view(n * T, m * T)
        if tile.split is not None:
            into.copy_(outer(flat[: n * T], flat[n * T :], tile.dtype))
            return
        for blocks in lower_blocks(n, T):
            rows, below = (slice(block.start * T, block.stop * T) for block in blocks)
            into[rows, below] = outer(flat[rows], flat[below], tile.dtype)

    def _inner_in_chunks(self, tile: Tile, weights: list[Positional], A: Tensor) -> None:
        left, right = tile.sides
        T, n = A.shape[1], len(tile.tape)
        size = tile.space / 4 / self._transient(weights, n)
        for part in chunks(right.stop, size, right.start):
            b = self._vectors(tile, weights, part).flatten(0, 1)
            here = slice(part.start - right.start, part.stop - right.start)
            low = part.start if tile.split is None else 0  # below the diagonal only
            for some in chunks(left.stop, size, low):
                a = self._vectors(tile, weights, some).flatten(0, 1)
                A[some, :, here] = outer(a, b, tile.dtype).view(-1, T, part.stop - part.start, T)

    def _ghost(self, tile: Tile, weights: list[Positional], A: Tensor) -> Tensor:
        """⟨G_ir, G_js⟩ = Σ_od (Σ_p δ_irpo a_ipd)(Σ_q δ_jsqo a_jqd) = Σ_pq (δ_irp·δ_jsq)(a_ip·a_jq)."""
        left, right = tile.sides
        n, T, m, _ = A.shape
        d = self._columns(tile, weights, slice(None), slice(None)).transpose(2, 3).contiguous()
        rows = d.shape[1]
        K = A.new_zeros(n, rows, m, rows)
        room = max(1.0, tile.space / 2 - 2 * d.numel())
        for block in [left] if tile.split is not None else row_blocks(n, rows * T):
            stop = right.stop if tile.split is not None else block.stop
            flat = d[right.start : stop].flatten(0, 2)
            width = stop - right.start
            for some in chunks(block.stop, room / (2 * rows * T * width * rows * T), block.start):
                B = outer(d[some].flatten(0, 2), flat, tile.dtype).view(-1, rows, T, width, rows, T)
                K[some, :, :width] = B.mul_(A[some, None, :, :width, None]).sum(5).sum(2)
        return K

    def _mixed(self, tile: Tile, weights: list[Positional], A: Tensor) -> Tensor:
        """⟨G_ir, G_js⟩ = Σ_po δ_irpo H_ijspo with H = Σ_q (a_ip·a_jq) δ_jsqo, for one j at a time."""
        right = tile.sides[1]
        n, T, m, _ = A.shape
        columns = self._columns(tile, weights, slice(None), slice(None))
        d = columns.transpose(2, 3).to(tile.dtype).contiguous()  # [·, R, T, O]
        rows, channels = d.shape[1], d.shape[3]
        K = A.new_zeros(n, rows, m, rows)
        for j in range(m):
            low = j if tile.split is None else 0
            for some in chunks(n, tile.space / 2 / (rows * T * channels), low):
                # H lies as [s, i, p, o]: written and read in the order in which it is stored.
                H = tile.scratch(tile.dtype, rows, (some.stop - some.start) * T, channels)
                inner = A[some, :, j].reshape(1, -1, T).expand(rows, -1, -1)
                torch.bmm(inner, d[right.start + j], out=H)
                H = H.view(rows, -1, T * channels).permute(1, 2, 0)
                K[some, :, j] = torch.bmm(d[some].view(-1, rows, T * channels), H)
        return K

    def _patches(self, tile: Tile, weights: list[Positional], part: slice) -> Tensor:
        n = len(tile.tape)
        return _joined([use.patches(n, part, tile.factors) for use in weights], 2)

    def _vectors(self, tile: Tile, weights: list[Positional], part: slice) -> Tensor:
        n = len(tile.tape)
        return _joined([use.vectors(n, part, tile.factors) for use in weights], 1)

    def _columns(self, tile: Tile, weights: list[Positional], part: slice, some: slice) -> Tensor:
        return _joined([use.columns(part, some, tile.factors) for use in weights], 3)

    def _transient(self, uses: Iterable[Use], n: int) -> int:
        """Elements that one example's patches, cotangents and their copies take."""
        return max(1, sum(use.transient("weight", n) for use in uses))

    def options(self, tape: Tape, shape: Shape) -> list[Option]:
        live = [use for use in self.live(tape) if use.delta is not None and use.delta.numel()]
        if not live:
            return []
        weights = self.positions(live)
        if weights is None:
            return [self._whole(live, shape)]
        n, costs = shape.examples, shape.costs
        speed = costs.speed(shape.dtype, shape.products)
        T = sum(use.positions(1) for use in weights)
        D, O, R, S = weights[0].features, weights[0].channels, shape.rows, shape.sets  # noqa: E741
        transient, item = self._transient(weights, 1), shape.dtype.itemsize
        found: list[Option] = []
        inner = 2 * shape.pairs * T * T * D
        once = inner / costs.product / speed + 2 * item * n * T * D / costs.bandwidth
        B = 2 * S * shape.pairs * R * R * T * T * O
        touched = 3 * item * S * shape.pairs * R * R * T * T / costs.bandwidth
        found.append(
            Option(
                "ghost",
                inner + B,
                once + B / (costs.product * speed) * (1 + 64 / O) + touched + S * 20 * costs.call,
                shape.met * T * T,
                2 * max(2 * transient, 2 * n * R * T * O + 2 * R * R * T * T * (shape.right or n)),
                4 * max(n * transient, n * R * T * O + R * R * T * T * shape.met),
            )
        )
        if R > 1 and T > 1:
            H = 2 * S * shape.pairs * (R * T * T * O + R * R * T * O)
            found.append(
                Option(
                    "mixed",
                    inner + H,
                    once
                    + H / (costs.product * speed) * (1 + 64 / T)
                    + item * S * shape.pairs * T * R * O / costs.bandwidth
                    + S * (shape.right or n) * 4 * costs.call,
                    shape.met * T * T,
                    2 * max(2 * transient, 2 * n * R * T * O + 2 * T * R * O),
                    4 * n * max(transient, R * T * O),
                )
            )
        if isinstance(weights[0], Embedding):
            return found
        forming, products = 2 * S * n * R * T * O * D, 2 * S * shape.pairs * R * R * O * D
        moved = item * S * n * R * O * D / costs.bandwidth
        base = products / (costs.product * speed) + moved + S * 10 * costs.call
        space, most = 2 * max(n * R * D, transient), 2 * n * max(R * O * D, transient)
        single = one_by_one(R * O, T, D) and shape.dtype == torch.float32 and shape.products is None
        rate = (costs.single if single else costs.batched) * speed * T / (T + 16)
        kept = n * T * D
        for held in (kept, 0) if S > 1 else (0,):
            unfolding = item * n * T * D * (1 if held else S) / (2 * costs.bandwidth)  # into a cache
            route = "kept patches" if held else "patches"
            found.append(
                Option(route, forming + products, base + forming / rate + unfolding, held, space, most)
            )
        if all(isinstance(use, Convolution) for use in weights) and shape.dtype == torch.float32:
            found += self._convolutions(
                weights, shape, Option("", forming + products, base, 0, space, most), forming
            )
        return found

    def _convolutions(
        self, weights: list[Positional], shape: Shape, base: Option, forming: float
    ) -> list[Option]:
        """The weight gradient's own kernel: an example at a time, or few channels in groups."""
        n, costs = shape.examples, shape.costs
        T, O = sum(use.positions(1) for use in weights), weights[0].channels  # noqa: E741
        speed = costs.speed(shape.dtype, shape.products)
        slices = shape.sets * len(weights)
        one = forming / (costs.convolution * speed) * (1 + 64 / T) + slices * n * 2 * costs.call
        found = [base._replace(route="convolution", seconds=base.seconds + one)]
        if O <= 32 and T >= 4 * O:
            all_ = forming / (costs.grouped * speed) + slices * 4 * costs.call
            found.append(base._replace(route="grouped", seconds=base.seconds + all_))
        return found

    def _whole(self, live: list[Use], shape: Shape) -> Option:
        n, R, S, P = shape.examples, shape.rows, shape.sets, self.parameter.numel()
        costs, item = shape.costs, shape.dtype.itemsize
        transient = self._transient(live, 1)
        products = 2 * S * shape.pairs * R * R * P
        seconds = products / (costs.product * costs.speed(shape.dtype, shape.products))
        seconds += item * S * n * (2 * transient + R * P) / costs.bandwidth + S * 10 * costs.call
        one = transient + 3 * R * P
        return Option("explicit", products, seconds, 0, 2 * max(n * R * P, one), 2 * n * one)


def _rows(live: Iterable[Site]) -> int:
    return next(site.delta.shape[1] for site in live if site.delta is not None)


def _even(channels: int, most: float) -> int:
    """The width of slices of at most ``most`` channels: about equal, and what vector units like."""
    if most < 16:
        return max(1, int(most))
    width = -(-channels // -(-channels // int(most)))
    return int(min(-(-width // 16), most // 16) * 16)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
