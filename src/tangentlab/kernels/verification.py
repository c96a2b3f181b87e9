"""A self-check: the routes' shares against random contractions that an independent path computes.

For random cotangents v of two examples the entry ⟨G_i v_i, G_j v_j⟩ of every block's share, taken by the very
route that the plan has chosen, is compared with the product of gradients that autograd computes of each
example alone. A wrong share, of relative size ε against the rounding that is allowed, √eps, goes unseen with
a probability of about √eps/ε over the draw of v: 4e-4/ε in float32, 2e-8/ε in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tangentlab.errors import KernelError
from tangentlab.kernels.blocks import Block, Tile, in_turn
from tangentlab.kernels.inputs import Inputs, count, outputs, select
from tangentlab.kernels.products import mirrored
from tangentlab.kernels.sites import dense
from tangentlab.kernels.structure import Structure, taped, trained
from tangentlab.randomness import generator

# The blocks and routes found right, of each model and structure.
_verified: WeakKeyDictionary[nn.Module, tuple[Structure, set[object]]] = WeakKeyDictionary()


def verify(
    model: nn.Module,
    structure: Structure,
    found: Sequence[Block],
    x: Inputs,
    rows: int,
    dtype: torch.dtype,
    factors: torch.dtype,
    space: float,
) -> None:
    """Compare every block's share on the first two examples, once for a model, a route and a precision.

    Takes about two forwards and four backwards of a single example for each of min(rows, 2) cotangents.

    Raises:
        KernelError: a share is wrong; names the parameter and the route.
    """
    rows = min(rows, 2)
    if model not in _verified or _verified[model][0] is not structure:
        _verified[model] = (structure, set())
    known = _verified[model][1]
    keys = {(tuple(block.names), block.route, rows, dtype, factors) for block in found}
    if keys <= known:
        return
    pair = select(x, slice(0, 2))
    tape = taped(model, structure, pair)
    n, classes = tape.output.shape
    v = torch.randn(rows, n, classes, generator=generator(0, "kernels.verification")).to(tape.output)
    tile = Tile(tape, None, dtype, factors, space)
    shares: dict[Block, Tensor | None] = {}

    def take(block: Block) -> None:
        shares[block] = block.gram(tile)

    with torch.no_grad():
        in_turn(found, tape, v, take)
    parameters = trained(model)
    relative = math.sqrt(max(torch.finfo(t).eps for t in (factors, v.dtype)))
    wrong: dict[Block, tuple[float, float]] = {}
    whole = 0.0
    for block in found:
        G = _alone(model, pair, v, [parameters[name] for name in block.names]).to(dtype)
        expected = torch.einsum("irp,jsp->irjs", G, G)
        share = shares[block]
        K = torch.zeros_like(expected) if share is None else mirrored(share)
        norms = G.norm(dim=2).flatten()
        excess = (K - expected).abs() - relative * (norms[:, None] * norms).view_as(expected)
        wrong[block] = float(excess.max()), float((K - expected).norm() / expected.norm())
        whole += float(norms.max()) ** 2
    for block, (excess, error) in wrong.items():
        # A share that cancels to nearly nothing holds the rounding of the whole, which it does not change.
        if not excess <= 64 * torch.finfo(v.dtype).eps * whole:
            raise KernelError(
                f"self-check: the share of parameter {block.names[0]!r} by the route {block.route!r} differs "
                f"from its gradients' product by {error:.1e}; please report this model"
            )
    known |= keys


def _alone(model: nn.Module, pair: Inputs, v: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """G [n, R, P] by autograd, of every example by itself."""
    G = []
    for i in range(count(pair)):
        with torch.enable_grad():
            output = outputs(model, select(pair, slice(i, i + 1)))
        for row in v[:, i]:
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if output.requires_grad:
                gradients = torch.autograd.grad(
                    [output], parameters, [row[None]], retain_graph=True, allow_unused=True
                )
            G.append(
                torch.cat(
                    [
                        torch.zeros_like(p).flatten() if g is None else dense(g).flatten()
                        for p, g in zip(parameters, gradients, strict=True)
                    ]
                )
            )
    return torch.stack(G).view(count(pair), len(v), -1)
