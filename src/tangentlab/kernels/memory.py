"""Amounts of memory as people write them, and the memory that a graph keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError

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


# What libraries keep aside however small the work is: oneDNN's scratch pads, holes in the allocator's heap.
_ASIDE = 4 * 2**20


def countable(limit: int, share: float) -> float:
    """Bytes that a count may fill of a bound: a share of it but for a fixed part, or half of a small one.

    >>> countable(2 * 2**30, 0.75) / 2**20, countable(2**20, 0.75) / 2**20
    (1532.0, 0.5)
    """
    return max(limit / 2, share * limit - _ASIDE)


def bound_for(counted: float, share: float) -> int:
    """The least bound in whole MiB of which so many bytes are :func:`countable`.

    >>> bound_for(1532 * 2**20, 0.75), bound_for(0.5 * 2**20, 0.75)
    (2048, 1)
    """
    return math.ceil(min(2 * counted, (counted + _ASIDE) / share) / 2**20)


class Saved:
    """Weighs what the graph of a module's forward keeps alive, each storage once, but for the module's own.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> saved = Saved(model)
        >>> with saved.recording():
        ...     output = model(torch.zeros(8, 4))
        >>> saved.sizes()
        [128]
    """

    def __init__(self, module: nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self._kept: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """Count the tensor's storage too."""
        storage = tensor.untyped_storage()
        try:
            place = storage.data_ptr()
        except RuntimeError:  # torch.func's wrappers have none
            return tensor
        if place not in self._own:
            self._kept[place] = storage
        return tensor.detach()  # itself, it would hold its own graph in a cycle that is never freed

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count what is saved for a backward meanwhile."""
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor):
            yield

    def sizes(self) -> list[int]:
        """Bytes of each storage, in the order of the forward."""
        return [storage.nbytes() for storage in self._kept.values()]
