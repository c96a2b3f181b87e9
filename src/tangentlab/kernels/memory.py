"""Amounts of memory as people write them."""

from __future__ import annotations

import re

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
