"""Named random generators: a stream is a function of (seed, name, step, rank) and of nothing else.

No state is carried from one draw to the next, so a resumed run draws what the uninterrupted one would
have drawn, and PyTorch's global generator stays untouched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


class PartGenerator(torch.Generator):
    """The generator of a process that holds part ``rank`` of ``world_size`` of a batch.

    :func:`drawn` draws the whole batch's numbers from it and takes the part's, so that the parts of several
    processes get what a single one would get.
    """

    rank: int = 0
    world_size: int = 1


def drawn(
    draw: Callable[..., Tensor], shape: torch.Size | tuple[int, ...], generator: torch.Generator
) -> Tensor:
    """``draw(shape, generator=..., device=...)``, its rows [n, ...] those of this part of the batch.

    >>> whole = drawn(torch.rand, (4,), generator(0, "attack"))
    >>> part = drawn(torch.rand, (2,), generator(0, "attack", part=(1, 2)))
    >>> bool((part == whole[2:]).all())
    True
    """
    rank, parts = (generator.rank, generator.world_size) if isinstance(generator, PartGenerator) else (0, 1)
    n = shape[0]
    whole = draw((parts * n, *shape[1:]), generator=generator, device=generator.device)
    return whole[rank * n : (rank + 1) * n]


def derive_seed(seed: int, name: str, step: int = 0, rank: int = 0) -> int:
    """A 63-bit seed for the stream ``name`` at ``step`` on process ``rank``.

    SHA-256 of the four values, so that neighbouring seeds and steps give unrelated streams (PyTorch's
    CPU generator, a Mersenne twister, is seeded from 32 bits of it).
    """
    key = f"{seed}\x00{name}\x00{step}\x00{rank}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def generator(
    seed: int,
    name: str,
    step: int = 0,
    rank: int = 0,
    *,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
) -> torch.Generator:
    """A generator on ``device`` for the stream (seed, name, step, rank); ``part``: (rank, world_size) of a
    batch whose parts share the stream, see :func:`drawn`.

    >>> a = torch.rand(2, generator=generator(0, "attack", step=3))
    >>> b = torch.rand(2, generator=generator(0, "attack", step=3))
    >>> bool((a == b).all())
    True
    """
    made = PartGenerator(device=device)
    made.manual_seed(derive_seed(seed, name, step, rank))
    made.rank, made.world_size = part
    return made
