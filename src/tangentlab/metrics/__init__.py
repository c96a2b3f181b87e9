"""Tensors in, numbers out: what a kernel is like, how it moves, and what a training curve says.

Kernel metrics take kernels [..., n, m], act on the last two axes and return float64 [...], computed in
float64 whatever comes in. A metric of class kernels [C, n, n] is thus taken per class; averaging is up to the
caller. :func:`distance_matrix` and :func:`kernel_velocity`, whose leading axis is time, average over classes
themselves. ``estimate_…`` and :func:`top_eigenpairs` take operators, of which only products are asked.
"""

from tangentlab.metrics.alignment import centered_alignment, kernel_target_alignment
from tangentlab.metrics.detection import alarm_threshold, detection_area, first_alarm
from tangentlab.metrics.distance import (
    Velocity,
    difference_in_top,
    distance_matrix,
    kernel_angle,
    kernel_distance,
    kernel_velocity,
)
from tangentlab.metrics.estimates import (
    Estimate,
    SpectrumEstimate,
    estimate_distance,
    estimate_spectrum,
    estimate_trace,
)
from tangentlab.metrics.intervals import (
    Interval,
    clustered_wilson_interval,
    jackknife,
    mean_interval,
    wilson_interval,
)
from tangentlab.metrics.lanczos import Eigenpairs, top_eigenpairs
from tangentlab.metrics.overfitting import (
    COLLAPSE_SHARE,
    LASTING_EPOCHS,
    PARTING_DISTANCE,
    Collapse,
    catastrophic_overfitting,
    parting_epoch,
)
from tangentlab.metrics.specialization import kernel_specialization, specialization_score
from tangentlab.metrics.spectrum import (
    NegativeEigenvalueWarning,
    Spectrum,
    eigenvalues,
    entropy_rank,
    intrinsic_dimension,
    participation_ratio,
    spectrum,
    top_mass,
)
from tangentlab.metrics.stages import Stages, find_stages

__all__ = [
    "COLLAPSE_SHARE",
    "LASTING_EPOCHS",
    "PARTING_DISTANCE",
    "Collapse",
    "Eigenpairs",
    "Estimate",
    "Interval",
    "NegativeEigenvalueWarning",
    "Spectrum",
    "SpectrumEstimate",
    "Stages",
    "Velocity",
    "alarm_threshold",
    "catastrophic_overfitting",
    "centered_alignment",
    "clustered_wilson_interval",
    "detection_area",
    "difference_in_top",
    "distance_matrix",
    "eigenvalues",
    "entropy_rank",
    "estimate_distance",
    "estimate_spectrum",
    "estimate_trace",
    "find_stages",
    "first_alarm",
    "intrinsic_dimension",
    "jackknife",
    "kernel_angle",
    "kernel_distance",
    "kernel_specialization",
    "kernel_target_alignment",
    "kernel_velocity",
    "mean_interval",
    "participation_ratio",
    "parting_epoch",
    "specialization_score",
    "spectrum",
    "top_eigenpairs",
    "top_mass",
    "wilson_interval",
]
