"""Sketched class kernels: random projections of the per-example gradients, layer by layer, unbiased.

A weight's gradient G = Σ_p δ_p a_pᵀ becomes Φ = Σ_p (S δ_p)(Z a_p)ᵀ = S G Zᵀ with S [s, O] and Z [z, D], the
rows of which are random orthonormal vectors times √(O/s) and √(D/z): E SᵀS = E ZᵀZ = I, E ⟨Φ, Φ'⟩ = ⟨G, G'⟩,
and G is never formed. Z a_p is made once for all outputs. A weight that is no larger than its sketch is taken
exactly; what has no positions is hashed, every entry to a bucket with a sign (Charikar, Chen & Farach-Colton
2002, "Finding frequent items in data streams"). The cost is linear in n: for each output a backward to the
activations and thin products.

Projected per-example gradients: Park et al. 2023, "TRAK", arXiv 2303.14186.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError, KernelError
from tangentlab.kernels.blocks import Block, in_turn
from tangentlab.kernels.capture import Tape
from tangentlab.kernels.direct import Direct
from tangentlab.kernels.inputs import Inputs, moved, select
from tangentlab.kernels.memory import bound_for, countable
from tangentlab.kernels.ntk import Request, checked
from tangentlab.kernels.products import chunks, most
from tangentlab.kernels.sides import Side
from tangentlab.kernels.structure import blocks, taped
from tangentlab.kernels.undisturbed import undisturbed
from tangentlab.kernels.uses import Positional, Use
from tangentlab.randomness import generator

# Rows of an S and of a Z: the error is about √(5/rows) in all, no less with larger ones.
_SIDE = 4

# The share of the bound that the count may fill.
_COUNTED = 0.75


def sketched_ntk(
    model: nn.Module,
    x: Inputs,
    *,
    features: int = 64,
    groups: int = 8,
    seed: int = 0,
    memory: int | str = "2GiB",
) -> Tensor:
    """Independent unbiased estimates of the class kernels on x, BatchNorm with running statistics.

    Their mean is the estimate; :func:`tangentlab.metrics.jackknife` gives functions of it with their errors.

    Args:
        model: any module; it comes back as it was.
        x: [n, ...], or a tuple or dict of such tensors; moved to the model's device.
        features: numbers that stand for a weight's gradient in each group, at least 1; the error falls with
            the root of features · groups.
        groups: independent sketches, at least 2.
        seed: of the projections, which are the same for every x and all weights of the model.
        memory: bound on the growth of working memory, the result not counted: bytes, or "2GiB".

    Returns:
        [groups, C, n, n] on the model's device.

    Raises:
        ConfigError: ``features`` or ``groups`` out of range.
        ConfigError, ModelError, KernelError: as :func:`tangentlab.ntk`.

    Example:
        >>> model = nn.Linear(2, 3)  # so small that it is exact
        >>> sketched_ntk(model, torch.tensor([[1.0, 0.0], [1.0, 2.0]]))[0, 0]
        tensor([[2., 2.],
                [2., 6.]])
    """
    if features < 1:
        raise ConfigError(f"features={features} is out of range; at least 1")
    if groups < 2:
        raise ConfigError(f"groups={groups}; an error takes at least 2")
    parameter, dtype, limit = checked(model, x, None, "class", "running", memory, None, None)
    with undisturbed(model, parameter.device):
        x = moved(x, parameter.device)
        request = Request(model, x, None, "class", dtype, None, limit)
        sketch = _Sketch(features, groups, seed)
        return request.retried(lambda: _kernels(request, x, sketch, limit))


def _kernels(request: Request, x: Inputs, sketch: _Sketch, limit: int) -> Tensor:
    """The sum over the blocks, a tile of examples and some of the outputs at a time."""
    model, structure = request.model, request.structure()
    side = Side(model, x, False)
    n, classes = side.n, side.weighed.classes

    found = blocks(model, structure)
    # What is kept of an example beside its graph, and the largest part of it, made anew for each output.
    tried: dict[Use, Tensor] = {}
    tape = taped(model, structure, select(x, slice(2)))
    unit = torch.eye(classes, dtype=side.dtype, device=side.device)
    with torch.no_grad():
        _features(found, tape, unit[0], sketch, tried)
    sizes = [t.nbytes // len(tape) for t in tried.values()]
    beside = sum(sizes) + 2 * max(sizes, default=0)
    room = int(countable(limit, _COUNTED)) - sketch.nbytes
    del tape, tried

    def needed(k: int) -> int:
        return side.weighed.at(k).total + k * beside

    size = most(lambda k: needed(k) <= room / 2, n)
    if needed(size) > room / 2:
        raise KernelError(
            f"memory of {limit / 2**20:.1f} MiB is too small: a sketch of one example needs "
            f"{bound_for(2 * needed(1) + sketch.nbytes, _COUNTED)} MiB"
        )
    width = sum(min(sum(model.get_parameter(name).numel() for name in b.names), sketch.width) for b in found)
    together = classes if size == n else max(1, room // (2 * n * width * side.dtype.itemsize))
    K = unit.new_zeros(sketch.groups, classes, n, n)
    with torch.no_grad():
        for some in chunks(classes, together):
            held: dict[tuple[int, Block], list[Tensor]] = defaultdict(list)
            for part in chunks(n, size):
                tape = taped(model, structure, select(x, part))
                projected: dict[Use, Tensor] = {}
                for c in range(classes)[some]:
                    for block, phi in _features(found, tape, unit[c], sketch, projected).items():
                        held[c, block].append(phi)
                    if size == n:
                        _add(K, held)
            _add(K, held)
    return (K + K.mT) / 2


def _add(K: Tensor, held: dict[tuple[int, Block], list[Tensor]]) -> None:
    """The products of what is held, which is let go."""
    while held:
        (c, _), parts = held.popitem()
        phi = torch.cat(parts, dim=1)
        K[:, c] += phi @ phi.mT


def _features(
    found: list[Block], tape: Tape, cotangent: Tensor, sketch: _Sketch, projected: dict[Use, Tensor]
) -> dict[Block, Tensor]:
    """Of each block on which the outputs depend."""
    made: dict[Block, Tensor] = {}

    def take(block: Block) -> None:
        phi = sketch.features(block, tape, projected)
        if phi is not None:
            made[block] = phi

    in_turn(found, tape, cotangent[None], take)
    return made


class _Sketch:
    """Projections of the gradients of each block, [groups, n, features], or [1, n, P] where that is exact."""

    def __init__(self, features: int, groups: int, seed: int) -> None:
        self._features, self.groups, self._seed = features, groups, seed
        self.width = features * groups
        self._drawn: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Of the projections drawn so far."""
        return sum(rows.nbytes for rows in self._drawn.values())

    def features(self, block: Block, tape: Tape, projected: dict[Use, Tensor]) -> Tensor | None:
        """Of the cotangents that have arrived, one an example; None where the outputs do not depend on it."""
        if isinstance(block, Direct):
            live = block.live(tape)
            weights = block.positions(live) if live else None
            if weights is not None and weights[0].channels * weights[0].features > self.width:
                return self._products(block.names[0], weights, tape, projected)
        G = block.gradient(tape, tape.output.dtype)
        if G is None:
            return None
        G = G[:, 0]
        return G[None] if G.shape[1] <= self.width else self._hashed(block.names[0], G)

    def _products(
        self, name: str, weights: list[Positional], tape: Tape, projected: dict[Use, Tensor]
    ) -> Tensor:
        """Σ_p (S δ_p)(Z a_p)ᵀ, for as many small S and Z as make up the features."""
        channels, inner = weights[0].channels, weights[0].features
        s = min(channels, _SIDE, self._features)
        z = min(inner, self._features // s, _SIDE**2 // s)
        several = self.groups * max(1, self._features // (s * z))
        total: Tensor | None = None
        for use in weights:
            delta = use.columns(slice(None), slice(None), tape.output.dtype)[:, 0]  # [n, O, T]
            if use not in projected:
                rows = self._rows(f"{name}/in", several, z, inner, delta)
                projected[use] = use.projected(len(tape), rows).unflatten(1, (several, z))
            rows = self._rows(f"{name}/out", several, s, channels, delta)
            share = (rows @ delta).unflatten(1, (several, s)) @ projected[use].mT  # [n, several, s, z]
            total = share if total is None else total + share
        assert total is not None
        by_group: Tensor = total.flatten(1).unflatten(1, (self.groups, -1)).transpose(0, 1)
        return by_group / math.sqrt(several // self.groups)

    def _rows(self, name: str, several: int, count: int, length: int, like: Tensor) -> Tensor:
        """[several · count, length]: each count of rows is orthonormal times √(length/count)."""
        if name not in self._drawn:
            g = generator(self._seed, f"kernels.sketch/{name}")
            rows = like.new_empty(several, count, length)
            for part in rows:  # one by one: what a decomposition holds is many times the rows
                drawn = torch.randn(length, count, generator=g, dtype=torch.float64)
                part.copy_(torch.linalg.qr(drawn).Q.T * math.sqrt(length / count))
            self._drawn[name] = rows.flatten(0, 1)
        return self._drawn[name]

    def _hashed(self, name: str, G: Tensor) -> Tensor:
        """Each entry into one of ``features`` buckets with a sign."""
        g = generator(self._seed, f"kernels.sketch/{name}")
        found = G.new_zeros(self.groups, len(G), self._features)
        for group in found:
            bucket = torch.randint(self._features, G.shape[1:], generator=g).to(G.device)
            sign = torch.randint(2, G.shape[1:], generator=g).to(G) * 2 - 1
            group.index_add_(1, bucket, G * sign)
        return found
