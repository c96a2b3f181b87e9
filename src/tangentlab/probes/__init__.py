"""Probes: what is measured along a run, and what is concluded from it."""

from tangentlab.probes.accuracy import accuracy
from tangentlab.probes.change import (
    AdversarialChange,
    OutputChange,
    adversarial_change,
    drift_only,
    output_change,
)
from tangentlab.probes.kernel_probe import KernelProbe
from tangentlab.probes.lazy_switch import LazySwitch, Look
from tangentlab.probes.overfitting_alarm import AlarmLook, OverfittingAlarm
from tangentlab.probes.signals import (
    SignedSum,
    fgsm_pgd_gap,
    gradient_signals,
    linearity_error,
    linearity_signals,
    one_and_two_steps,
    right_confidences,
    update_products,
    update_signals,
)

__all__ = [
    "AdversarialChange",
    "AlarmLook",
    "KernelProbe",
    "LazySwitch",
    "Look",
    "OutputChange",
    "OverfittingAlarm",
    "SignedSum",
    "accuracy",
    "adversarial_change",
    "drift_only",
    "fgsm_pgd_gap",
    "gradient_signals",
    "linearity_error",
    "linearity_signals",
    "one_and_two_steps",
    "output_change",
    "right_confidences",
    "update_products",
    "update_signals",
]
