"""Learning-rate schedules: functions of progress in [0, 1), the share of all steps already made."""

from __future__ import annotations

from collections.abc import Callable


def constant(progress: float) -> float:
    """1 throughout: the control without decay."""
    return 1.0


def piecewise(progress: float) -> float:
    """Divided by 10 at one half and again at three quarters (Rice et al. 2020)."""
    return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))


def cyclic(progress: float) -> float:
    """Up linearly over the first 40 %, down to zero over the rest (Wong et al. 2020)."""
    return progress / 0.4 if progress < 0.4 else (1.0 - progress) / 0.6


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "piecewise": piecewise,
    "cyclic": cyclic,
}
