"""The plan of a kernel: tiles, passes and routes, settled before the work within the memory allowed.

A tile of u examples holds its graph, its recorded inputs, what the blocks keep, and for several cotangents at
once the cotangents of every site; beside it stand the backward's own transients and a workspace for the
Gram, which every block can shrink to a least size. What an example holds is measured, the rest is counted.
The largest tile is taken for which all of it fits, and in it the fastest routes that fit together.

Two tiles of b examples meet in one tile of u = 2b, forward and backward. So n examples in t = n/b tiles are
run t − 1 times each, and once where one tile holds them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tangentlab.errors import KernelError
from tangentlab.kernels.blocks import Block, Option, Replayed, Shape
from tangentlab.kernels.capture import Tape, consumers
from tangentlab.kernels.costs import Costs
from tangentlab.kernels.inputs import Inputs, apply, mapped, select
from tangentlab.kernels.memory import Saved, bound_for, countable
from tangentlab.kernels.products import chunks
from tangentlab.kernels.structure import Structure, blocks, taped
from tangentlab.kernels.uses import Convolution, Use

# Two slices of examples that meet in one tile; right None where a slice meets itself.
Pass = tuple[slice, slice | None]

# The share of the bound that the count may fill; the rest is for what allocators and BLAS keep aside.
_COUNTED = 0.85


@dataclass(frozen=True)
class Layer:
    """How the share of some parameters is made: the route, and its work over the whole kernel.

    ``reason`` says why the parameters are replayed, where they are.
    """

    names: tuple[str, ...]
    acts: str
    route: str
    flops: float
    seconds: float
    kept: int
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """What a kernel will take.

    Attributes:
        n, m: examples on the left and right; m None for x2 = x.
        kind, dtype, products, limit: as they were asked for; the limit in bytes.
        passes: pairs (left, right) of slices that meet in a tile; right None where a slice meets itself.
        backwards: for each forward of a tile.
        layers: the parameters and their routes.
        network_flops, gram_flops: of the forwards and backwards, and of the Gram part.
        seconds: expected by ``costs``.
        bytes: expected growth of working memory.
        space: elements that the transients of the Gram may hold.
        footprint: elements of an example's graph.
        idle: parameters on which no output depends.
        made_for: what of the model and the examples the plan holds for.
    """

    n: int
    m: int | None
    kind: str
    dtype: torch.dtype
    products: str | None
    limit: int
    passes: tuple[Pass, ...]
    backwards: int
    layers: tuple[Layer, ...]
    network_flops: float
    seconds: float
    bytes: int
    space: float
    costs: Costs
    footprint: int
    idle: tuple[tuple[str, ...], ...]
    made_for: object = field(repr=False)

    @property
    def tile(self) -> int:
        """The most examples run at once."""
        return max(left + (right or 0) for left, right in map(_sizes, self.passes))

    @property
    def runs(self) -> int:
        """Forwards of single examples."""
        return sum(left + (right or 0) for left, right in map(_sizes, self.passes))

    @property
    def gram_flops(self) -> float:
        """Of forming gradients and of their products."""
        return sum(layer.flops for layer in self.layers)

    def __str__(self) -> str:
        sizes = f"{self.n} × {self.n if self.m is None else self.m}"
        lines = [
            f"{self.kind} kernel of {sizes} examples, {str(self.dtype).removeprefix('torch.')}"
            + (f", {self.products} products" if self.products else ""),
            f"{len(self.passes)} pass{'es' * (len(self.passes) > 1)}, tiles of up to {self.tile} examples; "
            f"{self.runs} forwards of an example, {self.backwards} backwards each",
            f"expected {_time(self.seconds)} ({self.costs.source} costs), "
            f"{self.bytes / 2**20:,.0f} MiB of {self.limit / 2**20:,.0f}; network "
            f"{self.network_flops / 1e9:,.1f} GFLOP, Gram {self.gram_flops / 1e9:,.1f} GFLOP",
        ]
        rows = [("parameters", "through", "route", "GFLOP", "time", "kept")]
        for layer in self.layers:
            name = layer.names[0] + (f" and {len(layer.names) - 1} more" if len(layer.names) > 1 else "")
            rows.append(
                (
                    name,
                    layer.acts + (f" ({shorten(layer.reason, 48, placeholder='…')})" if layer.reason else ""),
                    layer.route,
                    f"{layer.flops / 1e9:.2f}",
                    _time(layer.seconds),
                    f"{layer.kept / 2**20:.1f} MiB",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        for row in rows:
            cells = [
                cell.rjust(width) if i > 2 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"


def settle(
    model: nn.Module,
    structure: Structure,
    x: Inputs,
    sizes: tuple[int, int | None],
    kind: str,
    cotangents: tuple[int, int],
    dtype: torch.dtype,
    products: str | None,
    limit: int,
    costs: Costs,
    signature: object,
) -> Plan:
    """The plan for a model in evaluation mode.

    Args:
        x: examples, of which the first is run.
        sizes: (n, m); m None for x2 = x.
        cotangents: (sets, rows) of them.
        dtype: of the sums.
        limit: bytes.
        signature: what of the model and the examples the plan holds for.

    Raises:
        KernelError: not even tiles of the least size fit; names the least memory that would do.
    """
    sets, rows = cotangents
    found = blocks(model, structure)
    first = select(x, slice(0, 1))
    once, twice = (_weighed(model, structure, found, first, k, rows) for k in (1, 2))
    tape = once.tape
    item = max(dtype.itemsize, tape.output.element_size())
    each = max(twice.graph - once.graph, 0)
    fixed = max(once.graph - each, 0)  # weights that a parametrization made
    tape.footprint = -(-each // item)

    def options(left: int, right: int | None) -> list[list[Option]]:
        shape = Shape(left, right, rows, sets, dtype, products, costs)
        return [block.options(tape, shape) for block in found]

    for passes in _tilings(*sizes):
        tile = max(left + (right or 0) for left, right in map(_sizes, passes))
        held = fixed + tile * (each + once.pending + once.backward) + 6 * item * (tile * rows) ** 2
        room = (countable(limit, _COUNTED) - held) / item
        shape = (tile, None) if any(right is None for _, right in passes) else _sizes(passes[0])
        if room > 0:
            chosen, total = _chosen(options(*shape), room, costs.workspace)
            if total <= room:
                break
    else:
        needed = held + item * _chosen(options(*shape), 0.0, costs.workspace)[1]
        raise KernelError(
            f"memory of {limit / 2**20:.1f} MiB is too small: tiles of the least size need "
            f"{bound_for(needed, _COUNTED)} MiB for this model and kernel"
        )
    kept = sum(option.kept for option in chosen if option is not None)
    least = max((option.space for option in chosen if option is not None), default=0)
    most = max((option.most for option in chosen if option is not None), default=0)
    space = min(room - kept, max(least, min(most, costs.workspace)))
    layers = {
        i: Layer(
            tuple(block.names),
            _acts(block, tape),
            option.route,
            0.0,
            0.0,
            option.kept * item,
            structure[block.names[0]].reason,
        )
        for i, (block, option) in enumerate(zip(found, chosen, strict=True))
        if option is not None
    }
    for shape, times in Counter(map(_sizes, passes)).items():
        listed = options(*shape)
        for i, layer in layers.items():
            option = next(o for o in listed[i] if o.route == layer.route)
            layers[i] = replace(
                layer,
                flops=layer.flops + times * option.flops,
                seconds=layer.seconds + times * option.seconds,
            )
    runs = sum(left + (right or 0) for left, right in map(_sizes, passes))
    network = runs * (1 + sets * rows) * _forward_flops(model, first)
    speed = costs.double if tape.output.dtype == torch.float64 else 1.0
    return Plan(
        *sizes,
        kind,
        dtype,
        products,
        limit,
        tuple(passes),
        sets * rows,
        tuple(layers.values()),
        network,
        network / (costs.forward * speed) + sum(layer.seconds for layer in layers.values()),
        int(held + item * (kept + space)),
        space,
        costs,
        tape.footprint,
        tuple(tuple(block.names) for i, block in enumerate(found) if i not in layers),
        signature,
    )


def _chosen(listed: list[list[Option]], room: float, workspace: int) -> tuple[list[Option | None], float]:
    """Of every block the fastest option such that together they fit, if they can; the elements they take."""
    chosen = [min(options, key=lambda o: o.seconds, default=None) for options in listed]
    reserve = min(workspace, room / 2)

    def total(options: Sequence[Option | None]) -> float:
        kept = sum(o.kept for o in options if o is not None)
        return kept + max(reserve, max((o.space for o in options if o is not None), default=0))

    while (now := total(chosen)) > room:
        best: tuple[float, int, Option] | None = None
        for i, (current, options) in enumerate(zip(chosen, listed, strict=True)):
            for option in options:
                if current is None or option is current:
                    continue
                saved = now - total([*chosen[:i], option, *chosen[i + 1 :]])
                worth = saved / (1e-9 + max(0.0, option.seconds - current.seconds))
                if saved > 0 and (best is None or worth > best[0]):
                    best = (worth, i, option)
        if best is None:
            break
        chosen[best[1]] = best[2]
    return chosen, now


def _tilings(n: int, m: int | None) -> Iterator[list[Pass]]:
    """Ways to let all examples meet, from one tile of all to tiles of two.

    >>> [len(passes) for passes in _tilings(4, None)]
    [1, 6]
    """
    if m is None:
        yield [(slice(0, n), None)]
        for parts in _partitions(n):
            if len(parts) > 2:
                yield _triangle(parts)
        return
    yield [(slice(0, n), slice(0, m))]
    for parts in _partitions(max(n, m)):
        size = _length(parts[0])
        # The smaller set stays whole as long as it fits beside half of the room.
        small = min(n, m, size)
        large = max(n, m) if small == size else 2 * size - small
        low, high = list(chunks(min(n, m), small)), list(chunks(max(n, m), min(size, large)))
        yield [(a, b) if n <= m else (b, a) for a in low for b in high]


def _triangle(parts: list[slice]) -> list[Pass]:
    """Neighbours meet all in one tile, the others across."""
    passes: list[Pass] = []
    for i, part in enumerate(parts):
        if i % 2:
            passes.append((slice(parts[i - 1].start, part.stop), None))
        elif i == len(parts) - 1:
            passes.append((part, None))
        passes += [(part, other) for other in parts[: i - i % 2]]
    return passes


def _partitions(n: int) -> Iterator[list[slice]]:
    """Even slices of n, 2, 3, 4, … of them, then in steps of a tenth."""
    count, last = 2, 0
    while last != 1:
        size = -(-n // min(count, n))
        if size != last:
            yield list(chunks(n, size))
        last, count = size, max(count + 1, int(1.1 * count))


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _sizes(part: Pass) -> tuple[int, int | None]:
    left, right = part
    return _length(left), None if right is None else _length(right)


def _acts(block: Block, tape: Tape) -> str:
    """Through what, in words."""
    kinds = Counter(type(site).__name__ if isinstance(site, Use) else "replay" for site in block.sites(tape))
    if isinstance(block, Replayed):
        kinds = Counter(
            {f"module {type(module).__name__}": len(tape.calls[module]) for module in block.modules}
        )
    return ", ".join(kind + (f" ×{times}" if times > 1 else "") for kind, times in kinds.items())


def _forward_flops(model: nn.Module, x: Inputs) -> float:
    counter = _Flops()
    with torch.enable_grad(), counter:  # some models differentiate
        apply(model, x)
    return counter.total


class _Flops(TorchDispatchMode):
    """Adds up the operations of products. FlopCounterMode would also hook modules, which some mind."""

    def __init__(self) -> None:
        super().__init__()
        self.total: float = 0.0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


@dataclass(frozen=True)
class _Weighed:
    """A recorded tile and bytes: of its graph; of an example's waiting cotangents, and the backward's own."""

    tape: Tape
    graph: int
    pending: int
    backward: int


def _weighed(
    model: nn.Module, structure: Structure, found: list[Block], example: Inputs, copies: int, rows: int
) -> _Weighed:
    """Run a small tile and weigh what its graph and its sites keep alive, each storage once."""
    x = mapped(example, lambda t: t.expand(copies, *t.shape[1:]))
    saved = Saved(model)
    try:
        with saved.recording():
            tape = taped(model, structure, x)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        # A forward with torch.func inside takes no such hooks.
        tape = taped(model, structure, x)
        for tensor in _shown(tape.output):
            saved.keep(tensor)
    tape.pull(tape.output.new_ones(rows, tape.output.shape[1]))
    sites = tape.sites()
    for site in sites:
        for tensor in site.inputs:
            saved.keep(tensor)
    sizes = saved.sizes()
    arrived = {site: site.delta.nbytes for site in sites if site.delta is not None}
    # One cotangent is dealt with as it arrives; it waits only where a block has several sites.
    waiting = [s for b in found if len(b.sites(tape)) > 1 for s in b.sites(tape)] if rows == 1 else sites
    pending = sum(arrived.get(site, 0) for site in dict.fromkeys(waiting))
    # A few of the largest activation, the unfolded input of a convolution (CPU kernels without oneDNN unfold
    # the whole batch), and one row of cotangents before it joins the others.
    backward = 4 * max(sizes, default=0) + _unfolded(tape) + (pending // rows if rows > 1 else 0)
    return _Weighed(tape, sum(sizes), pending // copies, backward // copies)


def _shown(output: Tensor) -> Iterator[Tensor]:
    """What the nodes of a graph show of their saved tensors."""
    for node in {user for users in consumers(output).values() for user in users}:
        names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        for value in (getattr(node, name) for name in names):
            for tensor in value if isinstance(value, tuple | list) else [value]:
                if isinstance(tensor, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                    yield tensor


def _unfolded(tape: Tape) -> int:
    """Bytes of the largest unfolded convolution input."""
    sizes = [
        site.positions(len(tape)) * site.features * site.inputs[0].element_size()
        for site in tape.sites()
        if isinstance(site, Convolution) and site.inputs and site.delta is not None
    ]
    return len(tape) * max(sizes, default=0)
