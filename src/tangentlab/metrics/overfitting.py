"""When catastrophic overfitting struck, and when the kernels of FGSM and PGD inputs parted.

Catastrophic overfitting (Wong et al. 2020, arXiv 2001.03994): under single-step training, robust accuracy
against PGD collapses within a fraction of an epoch while FGSM accuracy goes on rising.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tangentlab.errors import ConfigError
from tangentlab.metrics._checks import Curve, as_curve, as_times

# Share of the best robust accuracy that is left, and lead of FGSM over PGD, from which a fall is a collapse.
COLLAPSE_SHARE = 0.5
COLLAPSE_LEAD = 0.2
# Epochs below half from which a network counts as lost: others recover at once, and noise looks the same.
LASTING_EPOCHS = 1.5

# A network that never exceeded chance by this never learned. One standard error at chance 0.1 on 200 points
# is 0.02.
LEARNED_MARGIN = 0.05

# Kernel distance between FGSM and PGD inputs above which the two kernels have parted. On digits, networks
# trained with PGD stay below 0.07 and all those trained with FGSM exceed 0.14 (four seeds each,
# results/demo/calibration.json).
PARTING_DISTANCE = 0.1
PARTING_SNAPSHOTS = 3


@dataclass(frozen=True)
class Collapse:
    """Catastrophic overfitting: when, from where, to where.

    Attributes:
        epoch: when robust accuracy crossed half of its best, interpolated between evaluations.
        best_epoch: the evaluation it fell from.
        best_robust_accuracy: robust accuracy then.
        robust_accuracy, fgsm_accuracy: at the first evaluation that meets the definition.
        lasted: from the crossing to where robust accuracy rose above half of that best again, interpolated,
            or else to the last evaluation.
    """

    epoch: float
    best_epoch: float
    best_robust_accuracy: float
    robust_accuracy: float
    fgsm_accuracy: float
    lasted: float


def catastrophic_overfitting(
    epochs: Curve, fgsm_accuracy: Curve, robust_accuracy: Curve, *, chance: float = 0.1, lasting: float = 0.0
) -> Collapse | None:
    """The first collapse of a run, or None.

    An evaluation t is a collapse if, with the best robust accuracy up to t reached last at s,

    - the network had learned: best > chance + 0.05;
    - robust accuracy fell by at least half: robust(t) ≤ best/2;
    - FGSM accuracy did not fall: fgsm(t) ≥ fgsm(s), at the moment that the fall is measured from. FGSM's own
      best would be the wrong measure: it may lie in an earlier collapse that the run recovered from;
    - gradients are masked: fgsm(t) − robust(t) > 0.2.

    The collapse is dated to the start of the stretch below half that t belongs to.

    Args:
        epochs: evaluations [T] in epochs (or steps), increasing.
        fgsm_accuracy, robust_accuracy: accuracies [T] in [0, 1] under FGSM and PGD on the same points.
        chance: accuracy of guessing, 1/C.
        lasting: the first that lasted as long, in the unit of ``epochs``; LASTING_EPOCHS tells networks that
            were lost from those that recovered at once, or whose training ended too soon to tell.

    Raises:
        ConfigError: lengths differ, values out of range, epochs that do not increase.

    >>> collapse = catastrophic_overfitting([1, 2, 3, 4], [0.4, 0.5, 0.8, 0.9], [0.3, 0.4, 0.1, 0.0])
    >>> round(collapse.epoch, 3), collapse.best_epoch, collapse.robust_accuracy
    (2.667, 2.0, 0.1)
    """
    if not 0 <= chance < 1:
        raise ConfigError(f"chance={chance} is out of range; choose 1/C, in [0, 1)")
    robust = _accuracies(robust_accuracy, "robust_accuracy")
    fgsm = _accuracies(fgsm_accuracy, "fgsm_accuracy")
    t = as_times(epochs, "epochs", len(robust))
    if len(fgsm) != len(robust):
        raise ConfigError(f"fgsm_accuracy has {len(fgsm)} values for {len(robust)} of robust_accuracy")

    found = _collapses(t, fgsm, robust, chance)
    return next((collapse for collapse in found if collapse.lasted >= lasting), None)


def _collapses(t: np.ndarray, fgsm: np.ndarray, robust: np.ndarray, chance: float) -> Iterator[Collapse]:
    """What each evaluation that meets the definition says."""
    best = 0
    for k in range(len(t)):
        if robust[k] >= robust[best]:
            best = k
        half = COLLAPSE_SHARE * robust[best]
        if (
            robust[best] > chance + LEARNED_MARGIN
            and robust[k] <= half
            and fgsm[k] >= fgsm[best]
            and fgsm[k] - robust[k] > COLLAPSE_LEAD
        ):
            above = int(np.flatnonzero(robust[:k] > half)[-1])
            begun = _crossing(t, robust, above, half)
            again = np.flatnonzero(robust[k:] > half)
            ended = _crossing(t, robust, k + int(again[0]) - 1, half) if len(again) else float(t[-1])
            yield Collapse(
                epoch=begun,
                best_epoch=float(t[best]),
                best_robust_accuracy=float(robust[best]),
                robust_accuracy=float(robust[k]),
                fgsm_accuracy=float(fgsm[k]),
                lasted=ended - begun,
            )


def parting_epoch(epochs: Curve, distances: Curve, *, threshold: float = PARTING_DISTANCE) -> float | None:
    """When the kernels of FGSM and of PGD inputs parted for good, interpolated, or None.

    Their distance rises above the threshold and stays there for three consecutive snapshots, or for all that
    are left: a single one above it earlier is noise.

    Args:
        epochs: snapshots [T] in epochs (or steps), increasing.
        distances: kernel distances [T] between FGSM and PGD inputs, not negative.
        threshold: kernel distance, positive.

    Returns:
        The epoch of the crossing; the first snapshot's own epoch where the distance starts out above.

    Raises:
        ConfigError: lengths differ, values out of range, epochs that do not increase.

    >>> parting_epoch([1, 2, 3, 4, 5], [0.01, 0.18, 0.01, 0.19, 0.3])
    3.5
    """
    if not threshold > 0:
        raise ConfigError(f"threshold={threshold} is out of range; choose a positive kernel distance")
    distance = as_curve(distances, "distances")
    if bool((distance < 0).any()):
        raise ConfigError(f"distances holds {distance.min():g}; kernel distances are not negative")
    t = as_times(epochs, "epochs", len(distance))
    above = distance > threshold
    for k in range(len(t)):
        if above[k : k + PARTING_SNAPSHOTS].all():
            return float(t[0]) if k == 0 else _crossing(t, distance, k - 1, threshold)
    return None


def _accuracies(values: Curve, name: str) -> np.ndarray:
    curve = as_curve(values, name)
    wrong = curve[(curve < 0) | (curve > 1)]
    if len(wrong):
        raise ConfigError(f"{name} holds {wrong[0]:g}; accuracies are in [0, 1]")
    return curve


def _crossing(t: np.ndarray, values: np.ndarray, k: int, level: float) -> float:
    """Where the line from snapshot k to k + 1 meets the level."""
    share = (level - values[k]) / (values[k + 1] - values[k])
    return float(t[k] + share * (t[k + 1] - t[k]))
