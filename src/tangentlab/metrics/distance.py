"""How far a kernel has moved: kernel distance, its angle, and velocity along a run.

Kernel distance is 1 − the Frobenius cosine (Fort et al. 2020, "Deep learning versus kernel learning",
arXiv 2010.15110). All kernels are [..., n, m]; leading axes (classes) are kept, or averaged where it says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tangentlab.errors import ConfigError, KernelError
from tangentlab.metrics._checks import Curve, as_kernel, as_symmetric, as_times, unit


def kernel_distance(K1: Tensor, K2: Tensor) -> Tensor:
    """KD = 1 − ⟨K1, K2⟩ / (‖K1‖ ‖K2‖), Frobenius, over the last two axes.

    Computed as ½ ‖K1/‖K1‖ − K2/‖K2‖‖², the same number: 1 − cosine loses every digit once the kernels agree
    to 8 of them, and the slow end of training is what the distance is for.

    Args:
        K1, K2: kernels [..., n, m] of the same n and m; leading axes broadcast.

    Returns:
        float64 [...], in [0, 2]: 0 for proportional kernels, 1 for orthogonal ones.

    Raises:
        KernelError: shapes differ, NaN or infinite entries, or a kernel that is zero everywhere.

    >>> K = torch.eye(2)
    >>> round(kernel_distance(K, torch.ones(2, 2)).item(), 12)  # 1 − 1/√2
    0.292893218813
    >>> nearby = K + 1e-9 * torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    >>> print(f"{kernel_distance(K, nearby).item():.3g}")
    5e-19
    """
    u, v = unit(as_kernel(K1, "K1")), unit(as_kernel(K2, "K2"))
    if u.shape[-2:] != v.shape[-2:]:
        raise KernelError(
            f"K1 and K2 have shapes {list(K1.shape)} and {list(K2.shape)}; the last two must agree"
        )
    return (u - v).square().sum(dim=(-2, -1)) / 2


def kernel_angle(K1: Tensor, K2: Tensor) -> Tensor:
    """Angle arccos(1 − KD) between two kernels, in radians, accurate however small.

    Computed as 2 arcsin √(KD/2). Where the kernel moves at a steady pace the angle grows in proportion to
    the movement, the distance with its square.

    Args, raises: as :func:`kernel_distance`. Returns float64 [...], in [0, π].

    >>> round(kernel_angle(torch.eye(2), torch.ones(2, 2)).item(), 12)  # π/4
    0.785398163397
    """
    return _angle(kernel_distance(K1, K2))


def difference_in_top(K1: Tensor, K2: Tensor, k: int) -> Tensor:
    """‖VᵀDV‖² / ‖D‖², D = K2/‖K2‖ − K1/‖K1‖: the part of a kernel distance along K1's top k eigenvectors V.

    A difference without preferred directions has about (k/n)² there. ‖D‖² is twice the kernel distance.

    Args:
        K1, K2: symmetric kernels [..., n, n] of the same shape.
        k: 1 to n.

    Returns:
        float64 [...], in [0, 1].

    Raises:
        ConfigError: k out of range.
        KernelError: shapes differ, a kernel that is not symmetric, NaN or infinite entries, or kernels that
            are zero or proportional: there is no difference to divide.

    >>> K1, K2 = torch.diag(torch.tensor([4.0, 3.0])), torch.diag(torch.tensor([3.0, 4.0]))
    >>> round(difference_in_top(K1, K2, 1).item(), 12)  # D = diag(−1, 1)/5
    0.5
    """
    a, b = as_symmetric(K1, "K1"), as_symmetric(K2, "K2")
    if a.shape != b.shape:
        raise KernelError(f"K1 and K2 have shapes {list(K1.shape)} and {list(K2.shape)}; both need the same")
    if not 1 <= k <= a.shape[-1]:
        raise ConfigError(f"k={k} eigenvectors were asked of {a.shape[-1]}; choose from 1 to {a.shape[-1]}")
    difference = unit(b) - unit(a)
    whole = difference.square().sum(dim=(-2, -1))
    if bool((whole == 0).any()):
        raise KernelError("K1 and K2 are proportional: there is no difference between them")
    top = torch.linalg.eigh(a).eigenvectors[..., -k:]
    inside: Tensor = (top.mT @ difference @ top).square().sum(dim=(-2, -1)) / whole
    return inside


def distance_matrix(kernels: Tensor) -> Tensor:
    """Kernel distances between all snapshots, averaged over the axes between the first and the last two.

    Args:
        kernels: snapshots [T, ..., n, m]; the middle axes are classes.

    Returns:
        float64 [T, T], exactly symmetric, with a diagonal of exact zeros.

    Raises:
        KernelError: as :func:`kernel_distance`, or fewer than three axes.

    >>> eye, ones = torch.eye(2), torch.ones(2, 2)
    >>> distance_matrix(torch.stack([eye, ones, 3 * eye])).round(decimals=4).tolist()
    [[0.0, 0.2929, 0.0], [0.2929, 0.0, 0.2929], [0.0, 0.2929, 0.0]]
    """
    units = unit(as_kernel(_snapshots(kernels), "kernels")).flatten(-2)
    by_class = units.flatten(1, -2).movedim(1, 0) if units.ndim > 2 else units[None]
    # Distances by subtraction; the product form, torch's default for many rows, cancels.
    gaps = torch.cdist(by_class, by_class, compute_mode="donot_use_mm_for_euclid_dist")
    upper = gaps.square().mean(0).div(2).triu(diagonal=1)
    return upper + upper.mT


@dataclass(frozen=True)
class Velocity:
    """Movement of the kernel between consecutive snapshots, one entry [T − 1] an interval, class-averaged.

    Attributes:
        steps: the step at which each interval ends; a velocity is known only once the interval is over.
        distance_per_step: kernel distance over the interval, divided by its steps.
        angle_per_step: angle over the interval in radians, divided by its steps.
        angle_per_learning_rate: angle divided by the learning rates summed over the interval, or None.
            A learning rate that decays slows a kernel down by itself; this takes it out.
    """

    steps: Tensor
    distance_per_step: Tensor
    angle_per_step: Tensor
    angle_per_learning_rate: Tensor | None


def kernel_velocity(kernels: Tensor, steps: Curve, *, summed_learning_rates: Curve | None = None) -> Velocity:
    """Kernel distance and angle per step, between consecutive snapshots at a fixed gap of steps.

    The gap is fixed because 1 − cos is quadratic in the movement: over twice the gap a steady kernel is four
    times as far, so distances per step over different gaps do not compare. Distance and angle are taken per
    class and then averaged.

    Args:
        kernels: snapshots [T, ..., n, m], T at least 2.
        steps: optimizer updates before each snapshot [T], equally spaced, the last gap included.
        summed_learning_rates: sum of the learning rates of all updates before each snapshot [T].

    Returns:
        :class:`Velocity`, float64 [T − 1].

    Raises:
        ConfigError: steps are too few, not whole, not increasing or not equally spaced; the summed learning
            rates do not increase; lengths differ.
        KernelError: as :func:`kernel_distance`.

    >>> eye, ones = torch.eye(2), torch.ones(2, 2)
    >>> velocity = kernel_velocity(torch.stack([eye, ones, ones]), [0, 10, 20])
    >>> velocity.steps.tolist(), velocity.angle_per_step.round(decimals=4).tolist()
    ([10, 20], [0.0785, 0.0])
    """
    kernels = _snapshots(kernels)
    at = as_times(steps, "steps", len(kernels))
    if len(at) < 2:
        raise ConfigError(f"steps has {len(at)} values; a velocity takes at least 2 snapshots")
    fraction = next((step for step in at if step != round(step)), None)
    if fraction is not None:
        raise ConfigError(f"steps holds {fraction:g}; steps are whole optimizer updates")
    gaps = sorted({int(after - before) for before, after in pairwise(at)})
    if len(gaps) > 1:
        raise ConfigError(
            f"steps has gaps of {', '.join(map(str, gaps))}; kernel distances compare over one gap only"
        )
    distance = kernel_distance(kernels[:-1], kernels[1:]).reshape(len(at) - 1, -1)
    angle = _angle(distance).mean(1)

    per_rate = None
    if summed_learning_rates is not None:
        summed = as_times(summed_learning_rates, "summed_learning_rates", len(at))
        per_rate = angle / torch.from_numpy(summed).diff().to(angle.device)
    return Velocity(
        steps=torch.from_numpy(at[1:]).long(),
        distance_per_step=distance.mean(1) / gaps[0],
        angle_per_step=angle / gaps[0],
        angle_per_learning_rate=per_rate,
    )


def _angle(distance: Tensor) -> Tensor:
    # Rounding may put opposite kernels a hair beyond distance 2.
    return 2 * torch.asin((distance / 2).clamp(max=1).sqrt())


def _snapshots(kernels: Tensor) -> Tensor:
    if kernels.ndim < 3:
        raise KernelError(f"kernels has shape {list(kernels.shape)}; snapshots are [T, ..., n, m]")
    return kernels
