"""The self-check: random contractions vᵀΘw against an independent path, autograd on each example alone.

At every call an entry of one tile, drawn at random, and the outputs of two examples of every tile. Once a
model, kind and plan every block's share, by the route that the plan has chosen for it, between two examples
with random cotangents: this names a faulty parameter, however small its share is. And then entries of the
finished kernel, which covers symmetry and what tiles add up to.

A fault is found where it moves an entry by more than √eps of the product of the gradients' norms (3e-4 in
float32, 1e-8 in float64; 4·eps, 3e-2, with bf16 factors). A fault of scale is found at that size for certain;
one of another kind, of relative size ε, is missed with a probability of about √eps/ε over the draw. What is
wrong only for entries that were not drawn stays unseen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tangentlab.errors import KernelError
from tangentlab.kernels.alone import Alone, dot, grouped
from tangentlab.kernels.blocks import Block, Tile, in_turn
from tangentlab.kernels.inputs import Inputs, count
from tangentlab.kernels.products import mirrored
from tangentlab.kernels.reproducible import coarsest, mixing
from tangentlab.kernels.structure import Structure, forget, trained
from tangentlab.randomness import generator

# What was found right, of each model and structure.
_verified: WeakKeyDictionary[nn.Module, tuple[Structure, set[object]]] = WeakKeyDictionary()

# Entries of the finished kernel that are compared.
_ENTRIES = 2


class Disproved(KernelError):
    """The self-check has found something wrong."""


class Verifier:
    """The self-check of one kernel.

    Args:
        key: what the outcome depends on beside the model and its structure; each is checked once.
        elements: how much of the gradients may be held at once.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, key: object, factors: torch.dtype, elements: float
    ) -> None:
        self._model, self._structure, self._key = model, structure, key
        self._parameters, self._factors = trained(model), factors
        self._elements = elements / 4  # of two examples, two cotangents each
        eps = coarsest(model)
        rounded = torch.finfo(factors).eps
        self._relative = 4 * rounded if rounded > math.sqrt(eps) else math.sqrt(max(eps, rounded))
        self._floor = 64 * eps
        if model not in _verified or _verified[model][0] is not structure:
            _verified[model] = (structure, set())

    @property
    def needed(self) -> bool:
        """Whether this has not been checked before."""
        return self._key not in _verified[self._model][1]

    def done(self) -> None:
        """Not to be checked again."""
        _verified[self._model][1].add(self._key)

    def blocks(self, found: Sequence[Block], pair: Inputs, tile: Tile, rows: int) -> None:
        """Compare every block's share between two examples: a few forwards and backwards of each.

        Raises:
            Disproved: a share is wrong; names the parameter and the route.
        """
        rows = min(rows, 2)
        n, classes = tile.tape.output.shape
        v = torch.randn(rows, n, classes, generator=generator(0, "kernels.verification"))
        v = v.to(tile.tape.output)
        shares: dict[Block, Tensor | None] = {}

        def take(block: Block) -> None:
            shares[block] = block.gram(tile)

        with torch.no_grad():
            in_turn(found, tile.tape, v, take)
        alone = [Alone(self._model, pair, i) for i in range(n)]
        sizes = {b: sum(self._parameters[name].numel() for name in b.names) for b in found}
        excess: dict[Block, float] = {}
        whole = 0.0
        for group in grouped(sizes, self._elements / rows):
            names = [name for block in group for name in block.names]
            parameters = {name: self._parameters[name] for name in names}
            gradients = [alone[i].gradients(parameters, v[r, i]) for i in range(n) for r in range(rows)]
            for block in group:
                expected = torch.tensor(
                    [[sum(dot(a[k], b[k]) for k in block.names) for b in gradients] for a in gradients],
                    dtype=torch.float64,
                )
                share = shares[block]
                K = torch.zeros_like(expected)
                if share is not None:
                    K = mirrored(share).double().cpu().view_as(expected)
                norms = expected.diagonal().sqrt()
                allowed = self._relative * norms.outer(norms)
                excess[block] = float(((K - expected).abs() - allowed).max())
                whole += float(norms.max()) ** 2
        for block, size in excess.items():
            # A share that cancels to nearly nothing holds the rounding of the whole: it changes nothing.
            if not size <= self._floor * whole:
                raise Disproved(
                    f"self-check: the share of parameter {block.names[0]!r} by the route {block.route!r} "
                    "is not the product of its gradients; please report this model"
                )

    def outputs(self, tile: Tile, x: Inputs) -> None:
        """Compare the outputs of two examples of a tile with theirs alone.

        Raises:
            KernelError: they depend on the others, or on the call.
        """
        n = len(tile.tape)
        together = tile.tape.output.detach()
        if not together.isfinite().all():
            return  # the kernel will not be finite, and say so
        allowed = math.sqrt(coarsest(self._model, together)) * float(together.norm(dim=1).max())
        for i in {int(torch.randint(n, (), generator=generator(0, "kernels.outputs", n))), n - 1}:
            output = Alone(self._model, x, i).output[0]
            if not float((output - together[i]).norm()) <= allowed:
                forget(self._model)
                raise KernelError(
                    f"{mixing(self._model, x)} mixes examples or changes between calls: the outputs of an "
                    "example alone are others, so that the kernel of single examples is undefined"
                )

    def entry(self, K: Tensor | None, x: Inputs, split: int | None, cotangents: Tensor) -> None:
        """Compare one entry of a tile's kernel K[i,r,j,s], drawn at random; valid for i ≥ j without a split.

        Raises:
            Disproved: it is wrong.
        """
        n, g = count(x), generator(0, "kernels.entry", count(x))

        def drawn(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=g))

        i = drawn(0, n if split is None else split)
        j = drawn(0, i + 1) if split is None else drawn(split, n)
        r, s = drawn(0, len(cotangents)), drawn(0, len(cotangents))
        if i == j:
            r, s = max(r, s), min(r, s)
        found = 0.0 if K is None else float(K[i, r, j - (split or 0), s])
        left, right = Alone(self._model, x, i), Alone(self._model, x, j)
        expected, scale = self._products(left, right, [(cotangents[r], cotangents[s])])
        if not abs(found - expected) <= (self._relative + self._floor) * scale and math.isfinite(found):
            raise Disproved(
                f"self-check: an entry of the kernel, {found:.6g}, is not the product of the examples' "
                f"gradients, {expected:.6g}; please report this model"
            )

    def entries(self, K: Tensor, x: Inputs, x2: Inputs, kind: str) -> None:
        """Compare entries of the finished kernel, drawn at random.

        Raises:
            Disproved: one is wrong.
        """
        classes = int(K.shape[0] if kind == "class" else K.shape[-1] if kind == "full" else 0)
        g = generator(0, "kernels.entries")

        def drawn(size: int) -> int:
            return int(torch.randint(size, (), generator=g))

        n, m = count(x), count(x2)
        for entry in range(_ENTRIES):
            i, j = (n - 1, drawn(m)) if entry == 0 else (drawn(n), drawn(m))
            left, right = Alone(self._model, x, i), Alone(self._model, x2, j)
            unit = torch.eye(left.output.shape[1]).to(left.output)
            c, d = drawn(max(classes, 1)), drawn(max(classes, 1))
            if kind == "full":
                found, pairs = K[i, j, c, d], [(unit[c], unit[d])]
            elif kind == "class":
                found, pairs = K[c, i, j], [(unit[c], unit[c])]
            elif kind == "trace":
                found, pairs = K[i, j] * len(unit), [(v, v) for v in unit]
            else:
                v = unit.sum(0) / math.sqrt(len(unit))
                found, pairs = K[i, j], [(v, v)]
            expected, scale = self._products(left, right, pairs)
            if not abs(float(found) - expected) <= (self._relative + self._floor) * scale:
                raise Disproved(
                    f"self-check: the entry ({i}, {j}) of the kernel, {float(found):.6g}, is not the product "
                    f"of the examples' gradients, {expected:.6g}; please report this model"
                )

    def _products(
        self, left: Alone, right: Alone, cotangents: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[float, float]:
        """Σ ⟨∇(v·f), ∇(w·f')⟩, and Σ of the products of their norms."""
        product, scale = 0.0, 0.0
        for v, w in cotangents:
            own, other = 0.0, 0.0
            for names in grouped({name: p.numel() for name, p in self._parameters.items()}, self._elements):
                parameters = {name: self._parameters[name] for name in names}
                a, b = left.gradients(parameters, v), right.gradients(parameters, w)
                product += sum(dot(a[name], b[name]) for name in names)
                own += sum(dot(a[name], a[name]) for name in names)
                other += sum(dot(b[name], b[name]) for name in names)
            scale += math.sqrt(own * other)
        return product, scale
