"""Probes: what is measured along a run."""

from tangentlab.probes.kernel_probe import KernelProbe

__all__ = ["KernelProbe"]
