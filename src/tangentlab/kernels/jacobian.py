"""Products with the Jacobian J = ∂vec f(x)/∂θ and with its transpose, in bounded memory; no row is formed.

Jᵀu is a backward. J w is a forward that carries tangents (forward-mode differentiation). Where a function has
no forward mode it is the derivative of u ↦ Jᵀu, a backward of the backward (Townsend 2017, "A new trick for
calculating Jacobian vector products"); where that fails too, products with the rows of J one by one. The
route is found by ⟨u, J w⟩ = ⟨Jᵀu, w⟩ on a few of the examples, with a w to which every parameter adds alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangentlab.errors import KernelError
from tangentlab.kernels.alone import dot
from tangentlab.kernels.inputs import Inputs, apply, count, select
from tangentlab.kernels.memory import bound_for, countable
from tangentlab.kernels.products import chunks, most
from tangentlab.kernels.reproducible import coarsest
from tangentlab.kernels.sides import Side
from tangentlab.kernels.sites import dense
from tangentlab.randomness import generator

Vector = list[Tensor]
"""A vector of parameter space, a tensor a parameter."""

Route = Callable[[Side, Inputs, Sequence[Vector]], Tensor]

# The share of the bound that the count may fill; the rest is for what allocators keep aside.
_COUNTED = 0.75

# Bytes of a graph that is kept, beyond which examples are cut in parts: a larger one is no faster.
_PART = 2**28

# Activations that a forward with tangents holds besides: BatchNorm's derivative is many small steps.
_TANGENTS = 8

# Examples that the routes are tried on; a batch of too few has degenerate statistics.
_TRIED = 8

# The graph of a backward over that of its forward.
_DOUBLE = 4

# A route is wrong where it is off by this many times √eps.
_TOLERANCE = 32


class Jacobian:
    """J(x) of one side [n C, P], by products alone.

    Graphs are kept from one product to the next where they fit, and made anew where a parameter or a buffer
    has changed since.

    Args:
        side: its examples; the caller keeps the model in evaluation mode around every product.
        limit: bound in bytes on the growth of working memory, products' results included.

    Attributes:
        columns: vectors that a product should take at once.

    Raises:
        KernelError: too little memory; names the least that would do.
    """

    def __init__(self, side: Side, limit: int) -> None:
        self.side = side
        self._parameters = list(side.parameters.values())
        vector = sum(p.nbytes for p in self._parameters)

        def needed(n: int) -> int:
            weight = side.weighed.at(n)
            return weight.total + _TANGENTS * weight.largest

        # Beside the work stand a sum, the gradient added to it, and one in the making.
        room = int(countable(limit, _COUNTED)) - 3 * vector
        self._kept = needed(side.n) <= room
        if side.batch:
            self._size = side.n
        elif self._kept:
            self._size = max(1, side.n * _PART // max(side.weighed.at(side.n).graph, _PART))
        else:  # half for the graph, half for more vectors at once
            self._size = most(lambda n: needed(n) <= room / 2, side.n)
        together = needed(side.n if self._kept else self._size)
        if together > room:
            raise KernelError(
                f"memory of {limit / 2**20:.1f} MiB is too small: products with the Jacobian of "
                f"{self._size} examples at once need {bound_for(together + 3 * vector, _COUNTED)} MiB"
            )
        self.columns = 1 + (room - together) // vector
        self._graphs: list[tuple[slice, Tensor]] = []
        self._state: object = None
        self._route: Route | None = None

    def transposed(self, u: Tensor) -> list[Vector]:
        """Jᵀu of u [k, n, C], for each of the k."""
        sums: list[Vector | None] = [None] * len(u)
        with self.side.mode():
            for part, output in self._outputs():
                for k, v in enumerate(u[:, part].to(output) if output.requires_grad else ()):
                    gradients = _pulled(output, self._parameters, v)
                    sums[k] = _added(sums[k], gradients, self._parameters)
        return [[torch.zeros_like(p) for p in self._parameters] if total is None else total for total in sums]

    def times(self, w: Sequence[Vector]) -> Tensor:
        """J w [k, n, C] of k vectors."""
        with self.side.mode():
            if self._route is None:
                self._route = _route(self.side)
            parts = [self._route(self.side, select(self.side.x, part), w) for part in self._parts()]
        return torch.cat(parts, dim=1)

    def forget(self) -> None:
        """Free the graphs."""
        self._graphs, self._state = [], None

    def _parts(self) -> Iterator[slice]:
        return chunks(self.side.n, self._size)

    def _outputs(self) -> Iterator[tuple[slice, Tensor]]:
        """(examples, their outputs with a graph), part by part."""
        made = ((part, self.side.outputs(select(self.side.x, part))) for part in self._parts())
        if not self._kept:
            yield from made
            return
        model = self.side.model
        state = [(t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers())]
        if state != self._state:
            self.forget()
            self._graphs, self._state = list(made), state
        yield from self._graphs


def _added(total: Vector | None, gradients: Iterator[Tensor | None], parameters: Sequence[Tensor]) -> Vector:
    """The sum; not in place, for two gradients may be one tensor."""
    if total is None:
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            total[i] = total[i] + gradient
    return total


def _pulled(output: Tensor, parameters: Sequence[Tensor], v: Tensor) -> Iterator[Tensor | None]:
    """The gradients of ⟨output, v⟩, each freed by who takes it."""
    found = list(torch.autograd.grad(output, parameters, v, retain_graph=True, allow_unused=True))
    while found:
        gradient = found.pop(0)
        yield None if gradient is None else dense(gradient)


# --- routes of J w: (side, some of its examples, k vectors) -> [k, n, C], inside side.mode() ----------------


def _forward(side: Side, x: Inputs, w: Sequence[Vector]) -> Tensor:
    """Forwards with tangents."""
    found = []
    for vector in w:
        with torch.no_grad(), forward_ad.dual_level(), _plain_attention():
            point = {
                name: forward_ad.make_dual(p.detach(), tangent)
                for (name, p), tangent in zip(side.parameters.items(), vector, strict=True)
            }
            output = apply(partial(_called, side.model, point), x)
            tangent = forward_ad.unpack_dual(output).tangent
            found.append(torch.zeros_like(output) if tangent is None else tangent)
    return torch.stack(found)


def _called(model: nn.Module, point: dict[str, Tensor], *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The model with these parameters."""
    output: Tensor = functional_call(model, point, args, kwargs)
    return output


def _double(side: Side, x: Inputs, w: Sequence[Vector]) -> Tensor:
    """Backwards of a backward, whose graph is several times that of a forward: fewer examples at once."""
    size = count(x) if side.batch else -(-count(x) // _DOUBLE)
    found = []
    for part in chunks(count(x), size):
        with torch.enable_grad(), _plain_attention():
            output = side.outputs(select(x, part))
            u = torch.zeros_like(output).requires_grad_()
            gradients = torch.autograd.grad(
                output, list(side.parameters.values()), u, create_graph=True, allow_unused=True
            )
        live = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        found.append(
            torch.stack(
                [
                    torch.autograd.grad(
                        [gradients[i] for i in live], u, [vector[i] for i in live], retain_graph=True
                    )[0]
                    for vector in w
                ]
            )
        )
    return torch.cat(found, dim=1)


def _by_rows(side: Side, x: Inputs, w: Sequence[Vector]) -> Tensor:
    """A backward an output: of the batch, or of each example alone."""
    parameters = list(side.parameters.values())
    rows = []
    for part in [x] if side.batch else (select(x, slice(i, i + 1)) for i in range(count(x))):
        output = side.outputs(part)
        for unit in torch.eye(output.numel()).to(output) if output.requires_grad else ():
            products = torch.zeros(len(w), dtype=torch.float64)
            for i, gradient in enumerate(_pulled(output, parameters, unit.view_as(output))):
                if gradient is not None:
                    products += torch.tensor([dot(gradient, vector[i]) for vector in w], dtype=torch.float64)
            rows.append(products.to(output))
        if not output.requires_grad:
            rows += [output.new_zeros(len(w))] * output.numel()
    return torch.stack(rows, dim=1).view(len(w), count(x), -1)


_ROUTES: tuple[Route, ...] = (_forward, _double, _by_rows)


def _route(side: Side) -> Route:
    """The first route that agrees with Jᵀ on some examples."""
    x = select(side.x, slice(_TRIED if side.batch else 2))
    parameters = list(side.parameters.values())
    output = side.outputs(x)
    g = generator(0, "kernels.jacobian")
    u = torch.randn(output.shape, generator=g).to(output)
    eps = coarsest(side.model, output)
    pulled = list(_pulled(output, parameters, u)) if output.requires_grad else [None] * len(parameters)
    norms = [0.0 if v is None else float(v.norm()) for v in pulled]
    # A parameter whose gradient is rounding, such as a bias before BatchNorm, is not blown up.
    floor = math.sqrt(eps) * max(norms) or 1.0
    w = [
        torch.randn(p.shape, generator=g).to(p) / max(norm, floor)
        for p, norm in zip(parameters, norms, strict=True)
    ]
    parts = [dot(a, b) for a, b in zip(pulled, w, strict=True)]
    allowed = _TOLERANCE * math.sqrt(eps) * max(sum(map(abs, parts)), 1.0)
    for route in _ROUTES[:-1]:
        try:
            found = dot(u, route(side, x, [w])[0])
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            continue
        if abs(found - sum(parts)) <= allowed:
            return route
    return _ROUTES[-1]


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by functions that have a forward mode and a second derivative: fused ones have neither."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
