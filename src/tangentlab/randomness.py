"""Named random generators: a stream is a function of (seed, name, step, rank) and of nothing else.

No state is carried from one draw to the next, so a resumed run draws what the uninterrupted one would
have drawn, and PyTorch's global generator stays untouched.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, name: str, step: int = 0, rank: int = 0) -> int:
    """A 63-bit seed for the stream ``name`` at ``step`` on process ``rank``.

    SHA-256 of the four values, so that neighbouring seeds and steps give unrelated streams (PyTorch's
    CPU generator, a Mersenne twister, is seeded from 32 bits of it).
    """
    key = f"{seed}\x00{name}\x00{step}\x00{rank}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def generator(
    seed: int, name: str, step: int = 0, rank: int = 0, *, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator on ``device`` for the stream (seed, name, step, rank).

    >>> a = torch.rand(2, generator=generator(0, "attack", step=3))
    >>> b = torch.rand(2, generator=generator(0, "attack", step=3))
    >>> bool((a == b).all())
    True
    """
    return torch.Generator(device=device).manual_seed(derive_seed(seed, name, step, rank))
