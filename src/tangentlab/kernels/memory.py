"""How large a tile may be: what an example holds is measured, what the Gram needs is counted.

A tile of b examples holds its graph, its recorded inputs and the cotangents of every watched call; two
tiles live at once. Beside them stand the backward's own transients and a workspace for the Gram, which every
block can shrink to a least size. The largest tile is taken for which all of it fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError, KernelError
from tangentlab.kernels.capture import Tape, record
from tangentlab.kernels.rules import Block

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

# The part of the bound that the count may fill; the rest is for what allocators and BLAS keep aside.
_COUNTED = 0.8


def bytes_of(memory: int | str) -> int:
    """A number of bytes, or a number with a unit.

    Raises:
        ConfigError: not a positive number of bytes, or the unit is unknown.

    >>> bytes_of("512MiB"), bytes_of("1.5GB"), bytes_of(4096)
    (536870912, 1500000000, 4096)
    """
    size = None
    if isinstance(memory, int) and not isinstance(memory, bool):
        size = memory
    elif isinstance(memory, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", memory)):
        size = int(float(found[1]) * _UNITS.get(found[2], 0))
    if size is None or size <= 0:
        raise ConfigError(
            f"memory={memory!r} is not a size; give bytes as an int, or a number with one of "
            f"{', '.join(_UNITS)}, as in '2GiB'"
        )
    return size


@dataclass(frozen=True)
class Plan:
    """Examples a tile, and the elements that the transients of the Gram may hold."""

    tile: int
    space: float


def plan(
    model: nn.Module,
    blocks: Sequence[Block],
    x: Tensor,
    sizes: tuple[int, int | None],
    rows: int,
    sets: int,
    dtype: torch.dtype,
    limit: int,
) -> Plan:
    """The largest even tile whose working memory stays within ``limit`` bytes.

    Args:
        model, blocks, x: the model in evaluation mode, its blocks, and examples of which the first is run.
        sizes: (n, m); m None for x2 = x.
        rows, sets: ``sets`` times ``rows`` cotangents at once.
        dtype: of the sums.
        limit: bytes.

    Raises:
        KernelError: not even tiles of one example fit; names the least memory that would do.
    """
    once, twice = (_measured(model, blocks, x[:1].expand(n, *x.shape[1:]), rows) for n in (1, 2))
    tape = once.tape
    item = max(dtype.itemsize, tape.output.element_size())
    # What a second example does not add again is of the model: weights that a parametrization made.
    each = max(twice.graph - once.graph, 0)
    fixed = max(once.graph - each, 0)
    tape.footprint = -(-each // item)
    n, m = sizes
    largest = n if m is None else max(n, m)
    for tile in _tiles(largest):
        sides = 1 if m is None and tile == largest else 2
        plans = [block.plan(tape, tile, sides, rows, sets) for block in blocks]
        cached = sum(kept for kept, _ in plans) + 3 * (tile * rows) ** 2
        least = max(space for _, space in plans)
        held = sides * (fixed + tile * (each + once.cotangents)) + tile * once.backward + item * cached
        # Half for the tiles, half for the workspace, unless nothing smaller is left to try.
        if held + item * least <= _COUNTED * limit and (tile == 1 or held <= _COUNTED * limit / 2):
            return Plan(tile, (_COUNTED * limit - held) / item)
    needed = -(-(held + item * least) / _COUNTED // 2**20)
    raise KernelError(
        f"memory of {limit / 2**20:.1f} MiB is too small: tiles of one example need "
        f"{needed:.0f} MiB for this model and kernel"
    )


@dataclass(frozen=True)
class _Measured:
    """A recorded tile and its bytes: of graph and inputs, of cotangents, of the backward's transients."""

    tape: Tape
    graph: int
    cotangents: int
    backward: int


def _measured(model: nn.Module, blocks: Sequence[Block], x: Tensor, rows: int) -> _Measured:
    """Run a small tile and weigh what its graph and its calls keep alive, each storage once."""
    kept: dict[int, torch.UntypedStorage] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tape = record(model, watched(blocks), x)
        tape.pull(tape.output.new_ones(rows, tape.output.shape[1]))
    calls = [call for listed in tape.calls.values() for call in listed]
    for call in calls:
        for tensor in call.inputs:
            keep(tensor)
    sizes = [storage.nbytes() for storage in kept.values()]
    cotangents = sum(delta.nbytes for call in calls if (delta := call.delta) is not None)
    # A few of the largest activation, the unfolded input of a convolution (CPU kernels without oneDNN unfold
    # the whole batch), and one row of cotangents before it joins the others.
    backward = 4 * max(sizes, default=0) + _unfolded(tape) + (cotangents // rows if rows > 1 else 0)
    return _Measured(tape, sum(sizes), cotangents, backward)


def _unfolded(tape: Tape) -> int:
    """Bytes of the largest unfolded convolution input: C_in·k² values at each output position."""
    largest = 0
    for module, calls in tape.calls.items():
        if isinstance(module, nn.modules.conv._ConvNd):
            for call in calls:
                positions = call.shape[2:].numel() if call.shape is not None else 0
                largest = max(largest, positions * module.weight[0].numel() * call.inputs[0].element_size())
    return largest


def watched(blocks: Sequence[Block]) -> list[nn.Module]:
    """The modules whose calls the blocks read, each once."""
    return list(dict.fromkeys(module for block in blocks for module in block.modules))


def _tiles(n: int) -> Iterator[int]:
    """The sizes of even tiles, from one tile of n to n tiles of one."""
    last = 0
    for count in range(1, n + 1):
        size = -(-n // count)
        if size != last:
            yield size
        last = size
