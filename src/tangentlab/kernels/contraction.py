"""Weights of Linear and Conv2d: G = Σ_p δ_p a_pᵀ, whose Gram is taken without holding G whole.

At the output positions p = 1 … T a weight [C_out, D] meets the patch a_p in R^D and the cotangent δ_p in
R^{C_out}. The Gram of two examples has two exact routes:

    explicit   ⟨G, G'⟩ with G formed, a slice of output channels at a time     C_out·D a pair, + forming
    ghost      Σ_pq (δ_p·δ'_q)(a_p·a'_q), G never formed                        T²(D + C_out) a pair

The ghost's a_p·a'_q is shared by all cotangents of a pair of tiles. A module called several times, or a
weight held by several modules, has the positions of all its calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangentlab.kernels.capture import Tape
from tangentlab.kernels.gram import chunks, product, row_blocks


def contracts(module: nn.Module) -> bool:
    """Whether the module is, to the letter of its forward, a Linear or an ungrouped Conv2d."""
    if isinstance(module, nn.Conv2d):
        kind = type(module)
        return (
            module.groups == 1
            and kind.forward is nn.Conv2d.forward
            and kind._conv_forward is nn.Conv2d._conv_forward
        )
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def patches(module: nn.Module, a: Tensor) -> Tensor:
    """What the weight multiplies: [n, T, D] of inputs [n, …, D] (Linear) or [n, C_in, H, W] (Conv2d)."""
    if isinstance(module, nn.Linear):
        return a.reshape(len(a), -1, a.shape[-1])
    assert isinstance(module, nn.Conv2d)
    # Padded by hand, like the module does it, for every padding_mode and for an uneven "same".
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a = F.pad(a, module._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(a, module.kernel_size, module.dilation, 0, module.stride).transpose(1, 2)


def columns(module: nn.Module, delta: Tensor) -> Tensor:
    """The cotangents by position, [n, R, C_out, T]: of [n, R, …, C_out] (Linear) or [n, R, C_out, …]."""
    if isinstance(module, nn.Linear):
        return delta.reshape(*delta.shape[:2], -1, delta.shape[-1]).transpose(2, 3)
    return delta.reshape(*delta.shape[:3], -1)


class Contraction:
    """The weight ``name``, held by ``modules``, and its share of the kernel.

    Attributes:
        ghost: which of the two routes ``gram`` takes; ``plan`` sets it.
    """

    def __init__(self, name: str, modules: list[nn.Module]) -> None:
        self.names = [name]
        self.modules = modules
        self.ghost = False
        weight: Tensor = modules[0].weight  # type: ignore[assignment]
        self._channels, self._features = len(weight), weight[0].numel()

    def gradient(self, tape: Tape, dtype: torch.dtype, space: float) -> Tensor | None:
        """G [n, R, C_out·D], whole."""
        return self._slice(tape, slice(0, self._channels), dtype, space) if tape.live(self.modules) else None

    def gram(
        self, left: Tape, right: Tape | None, dtype: torch.dtype, space: float, cache: dict[object, Tensor]
    ) -> Tensor | None:
        tapes = [left] if right is None else [left, right]
        if not all(tape.live(self.modules) for tape in tapes):
            return None
        if self.ghost:
            return self._ghost(left, right, dtype, space, cache)
        # Half of the space for the slices of G, half for the patches that form them.
        rows = sum(len(tape) for tape in tapes) * left.live(self.modules)[0][2].shape[1]
        K: Tensor | None = None
        for part in chunks(self._channels, space / 2 / (rows * self._features)):
            G = [self._slice(tape, part, dtype, space / 2) for tape in tapes]
            share = product(G[0], None if right is None else G[1])
            K = share if K is None else K.add_(share)
        return K

    def _slice(self, tape: Tape, part: slice, dtype: torch.dtype, space: float) -> Tensor:
        """G[i,r,o,d] = Σ_p δ[i,r,o,p] a[i,p,d] for the output channels o of ``part``, [n, R, |part|·D]."""
        delta = tape.live(self.modules)[0][2]
        n, rows, width = len(tape), delta.shape[1], part.stop - part.start
        G = delta.new_empty(n, rows * width, self._features, dtype=dtype)
        for some in chunks(n, space / self.transient(tape)):
            d = self._columns(tape, some, part, dtype)
            torch.bmm(d.reshape(len(d), rows * width, -1), self._patches(tape, some, dtype), out=G[some])
        return G.view(n, rows, -1)

    def _ghost(
        self, left: Tape, right: Tape | None, dtype: torch.dtype, space: float, cache: dict[object, Tensor]
    ) -> Tensor:
        """⟨G_ir, G_js⟩ = Σ_od (Σ_p δ_irpo a_ipd)(Σ_q δ_jsqo a_jqd) = Σ_pq (δ_irp·δ_jsq)(a_ip·a_jq)."""
        tapes = [left] if right is None else [left, right]
        n, m = len(left), len(tapes[-1])
        if self not in cache:
            a = [self._patches(tape, slice(0, len(tape)), dtype) for tape in tapes]
            cache[self] = (a[0].flatten(0, 1) @ a[-1].flatten(0, 1).T).view(n, a[0].shape[1], m, -1)
        A = cache[self]  # [n, T, m, S]
        T, S = A.shape[1], A.shape[3]
        d = [
            self._columns(tape, slice(0, len(tape)), slice(0, self._channels), dtype).transpose(2, 3)
            for tape in tapes
        ]
        rows = d[0].shape[1]
        K = A.new_zeros(n, rows, m, rows)
        for block in [slice(0, n)] if right is not None else row_blocks(n):
            stop = block.stop if right is None else m  # above the diagonal blocks nothing is needed
            flat = d[-1][:stop].reshape(stop * rows * S, -1).T
            for some in chunks(block.stop, space / (rows * T * stop * rows * S), block.start):
                B = (d[0][some].flatten(0, 2) @ flat).view(-1, rows, T, stop, rows, S)
                K[some, :, :stop] = B.mul_(A[some, None, :, :stop, None]).sum((2, 5))
        return K

    def _patches(self, tape: Tape, some: slice, dtype: torch.dtype) -> Tensor:
        """[n, T, D], T the positions of all calls."""
        return _joined(
            [patches(module, call.inputs[0][some].to(dtype)) for module, call, _ in tape.live(self.modules)],
            1,
        )

    def _columns(self, tape: Tape, some: slice, part: slice, dtype: torch.dtype) -> Tensor:
        """[n, R, |part|, T]."""
        return _joined(
            [
                columns(module, delta[some])[:, :, part].to(dtype)
                for module, _, delta in tape.live(self.modules)
            ],
            3,
        )

    def transient(self, tape: Tape) -> int:
        """Padded inputs, patches and cotangents, cast and joined."""
        live = tape.live(self.modules)
        inputs = sum(call.inputs[0][:1].numel() for _, call, _ in live)
        cotangents = sum(delta[:1].numel() for _, _, delta in live)
        return 2 * (inputs + cotangents + self._positions(tape) * self._features)

    def _positions(self, tape: Tape) -> int:
        return sum(delta[0, 0].numel() for _, _, delta in tape.live(self.modules)) // self._channels

    def plan(self, tape: Tape, tile: int, sides: int, rows: int, sets: int) -> tuple[int, int]:
        if not tape.live(self.modules):
            return 0, 0
        T, D, C = self._positions(tape), self._features, self._channels
        # MAC a pair of examples; forming G costs T·C·D a row and side, shared by the tile's examples.
        explicit = sets * rows * C * D * (rows + 2 * T / tile)
        ghost = T * T * (D + sets * rows * rows * C)
        self.ghost = ghost < explicit
        if not self.ghost:
            return 0, 2 * max(sides * tile * rows * D, self.transient(tape))
        return tile * tile * T * T, sides * tile * self.transient(tape) + rows * rows * T * T * tile


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
