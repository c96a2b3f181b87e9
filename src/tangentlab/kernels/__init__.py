"""The NTK engine: exact empirical neural tangent kernels of any module, in bounded memory."""

from tangentlab.kernels.gap import KernelGap, kernel_gap
from tangentlab.kernels.linearized import Linearized
from tangentlab.kernels.ntk import ntk, plan
from tangentlab.kernels.operator import NTKOperator
from tangentlab.kernels.regression import Regression, kernel_regression
from tangentlab.kernels.sketch import sketched_ntk
from tangentlab.kernels.tangent import pullback, sgd_change, tangent_change

__all__ = [
    "KernelGap",
    "Linearized",
    "NTKOperator",
    "Regression",
    "kernel_gap",
    "kernel_regression",
    "ntk",
    "plan",
    "pullback",
    "sgd_change",
    "sketched_ntk",
    "tangent_change",
]
