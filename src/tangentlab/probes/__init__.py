"""Probes: what is measured along a run."""

from tangentlab.probes.change import (
    AdversarialChange,
    OutputChange,
    adversarial_change,
    drift_only,
    output_change,
)
from tangentlab.probes.kernel_probe import KernelProbe

__all__ = [
    "AdversarialChange",
    "KernelProbe",
    "OutputChange",
    "adversarial_change",
    "drift_only",
    "output_change",
]
