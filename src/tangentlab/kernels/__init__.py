"""The NTK engine: exact empirical neural tangent kernels of any module, in bounded memory."""

from tangentlab.kernels.linearized import Linearized
from tangentlab.kernels.ntk import ntk, plan

__all__ = ["Linearized", "ntk", "plan"]
