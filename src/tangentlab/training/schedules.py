"""Schedules: factors of the learning rate or of eps, by progress in [0, 1), the share of the steps made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def constant(progress: float) -> float:
    """1 throughout: the control without decay."""
    return 1.0


def piecewise(progress: float, milestones: Sequence[float] = (0.5, 0.75)) -> float:
    """Divided by 10 at each milestone: one half and three quarters in Rice et al. (2020)."""
    return float(0.1 ** sum(progress >= milestone for milestone in milestones))


def cyclic(progress: float) -> float:
    """Up linearly over the first 40 %, down to zero over the rest (Wong et al. 2020)."""
    return progress / 0.4 if progress < 0.4 else (1.0 - progress) / 0.6


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    return (1 + math.cos(math.pi * progress)) / 2


def one_cycle(progress: float) -> float:
    """From 1/25 up to 1 over 30 % along half a cosine, down to 4e-6 over the rest (PyTorch's OneCycleLR)."""
    low, end = 1 / 25, 1 / 25 / 1e4
    if progress < 0.3:
        return 1 + (low - 1) * cosine(progress / 0.3)
    return end + (1 - end) * cosine((progress - 0.3) / 0.7)


def linear(progress: float) -> float:
    """From 0 up to 1 over the first half, then 1: a warm-up, of eps for instance."""
    return min(1.0, 2 * progress)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "piecewise": piecewise,
    "cyclic": cyclic,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "linear": linear,
}
