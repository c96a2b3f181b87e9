"""The NTK engine: exact empirical neural tangent kernels of any module, in bounded memory."""

from tangentlab.kernels.ntk import ntk, plan

__all__ = ["ntk", "plan"]
