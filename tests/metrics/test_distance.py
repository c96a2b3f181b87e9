"""Kernel distance, angle and velocity against plain formulas, in higher precision where it matters."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tangentlab.errors import ConfigError, KernelError
from tangentlab.metrics import (
    difference_in_top,
    distance_matrix,
    kernel_angle,
    kernel_distance,
    kernel_velocity,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_distance(K1: torch.Tensor, K2: torch.Tensor) -> float:
    A, B = K1.double().numpy(), K2.double().numpy()
    return 1 - np.trace(A @ B.T) / math.sqrt(np.trace(A @ A.T) * np.trace(B @ B.T))


@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 3), (1, 4)])
def test_distance_is_one_minus_the_cosine(n: int, m: int) -> None:
    K1, K2 = random(3, n, m, seed=1), random(3, n, m, seed=2)
    expected = [slow_distance(a, b) for a, b in zip(K1, K2, strict=True)]
    result = kernel_distance(K1, K2)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result, expected, rtol=1e-13)


def test_leading_axes_broadcast() -> None:
    K1, K2 = random(4, 1, 5, 5, seed=1), random(3, 5, 5, seed=2)
    result = kernel_distance(K1, K2)
    assert result.shape == (4, 3)
    assert result[2, 1].item() == pytest.approx(slow_distance(K1[2, 0], K2[1]), rel=1e-13)


def test_known_values() -> None:
    eye, ones = torch.eye(4), torch.ones(4, 4)
    assert kernel_distance(eye, ones).item() == pytest.approx(0.5)  # cosine 4/(2·4)
    assert kernel_angle(eye, ones).item() == pytest.approx(math.pi / 3)
    assert kernel_distance(eye, -eye).item() == pytest.approx(2)
    assert kernel_angle(eye, -eye).item() == pytest.approx(math.pi)
    assert kernel_distance(eye, 1 - eye).item() == pytest.approx(1)


@pytest.mark.parametrize("movement", [1e-3, 1e-6, 1e-9, 1e-12])
def test_small_movements_keep_their_digits(movement: float) -> None:
    # Exactly: cos = (1 + ab)/√((1 + a²)(1 + b²)) for diag(1, a) and diag(1, b), so tan(angle) is rational.
    K1 = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
    K2 = torch.diag(torch.tensor([1.0, 0.5 + movement], dtype=torch.float64))
    a, b = Fraction(K1[1, 1].item()), Fraction(K2[1, 1].item())
    tangent = float((b - a) / (1 + a * b))
    # K2's own entries are rounded: ε/movement of the movement.
    rel = max(1e-12, 1e-15 / movement)
    assert kernel_angle(K1, K2).item() == pytest.approx(math.atan(tangent), rel=rel)
    assert kernel_distance(K1, K2).item() == pytest.approx(
        2 * math.sin(math.atan(tangent) / 2) ** 2, rel=2 * rel
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-200, 1e-30, 1.0, 1e30, 1e200]))
def test_invariant_under_scale_and_rotation(seed: int, scale: float) -> None:
    K1, K2 = random(5, 5, seed=seed), random(5, 5, seed=seed + 1)
    Q, R = (torch.linalg.qr(random(5, 5, seed=seed + s)).Q for s in (2, 3))
    expected = kernel_distance(K1, K2)
    torch.testing.assert_close(kernel_distance(scale * K1, K2), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(kernel_distance(Q @ K1 @ R, Q @ K2 @ R), expected, rtol=1e-11, atol=1e-13)
    assert kernel_distance(K1, K2) == kernel_distance(K2, K1)
    assert kernel_distance(K1, 4 * K1) == 0


def test_float32_and_half_kernels_are_computed_in_float64() -> None:
    K1, K2 = random(6, 6, seed=1).float(), random(6, 6, seed=2).half()
    assert kernel_distance(K1, K2).item() == pytest.approx(slow_distance(K1, K2), rel=1e-13)


@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 3, 4, 2), (5, 2, 3, 4, 4)])
def test_distance_matrix_averages_pairs_over_classes(shape: tuple[int, ...]) -> None:
    kernels = random(*shape)
    result = distance_matrix(kernels)
    flat = kernels.reshape(5, -1, *shape[-2:])
    for i in range(5):
        for j in range(5):
            pairs = [slow_distance(a, b) for a, b in zip(flat[i], flat[j], strict=True)]
            assert result[i, j].item() == pytest.approx(np.mean(pairs), abs=1e-14)
    assert torch.equal(result, result.mT)
    assert torch.equal(result.diagonal(), torch.zeros(5, dtype=torch.float64))


def test_distance_matrix_keeps_small_distances_of_many_snapshots() -> None:
    # 40 snapshots: more than the 25 rows from which torch would multiply instead of subtract.
    start, direction = random(6, 6), random(6, 6, seed=1)
    kernels = torch.stack([start + 1e-9 * k * direction for k in range(40)])
    np.testing.assert_allclose(
        distance_matrix(kernels)[0, 1:], [kernel_distance(start, K) for K in kernels[1:]], rtol=1e-6
    )


def turning(angles: list[float]) -> torch.Tensor:
    """Kernels that turn by known angles from the first one, for two classes, the second twice as fast."""
    eye, other = torch.eye(2, dtype=torch.float64), torch.tensor([[0, 1.0], [1.0, 0]], dtype=torch.float64)
    return torch.stack(
        [torch.stack([math.cos(s * a) * eye + math.sin(s * a) * other for s in (1, 2)]) for a in angles]
    )


def test_velocity_of_a_kernel_that_turns() -> None:
    velocity = kernel_velocity(turning([0, 0.1, 0.4]), [5, 15, 25], summed_learning_rates=[1.0, 1.5, 3.5])
    assert velocity.steps.tolist() == [15, 25]
    # Angles 0.1 and 0.3, averaged with twice as much.
    torch.testing.assert_close(velocity.angle_per_step, torch.tensor([0.015, 0.045], dtype=torch.float64))
    expected = [(2 - math.cos(a) - math.cos(2 * a)) / 2 / 10 for a in (0.1, 0.3)]
    np.testing.assert_allclose(velocity.distance_per_step, expected, rtol=1e-12)
    assert velocity.angle_per_learning_rate is not None
    np.testing.assert_allclose(velocity.angle_per_learning_rate, [0.15 / 0.5, 0.45 / 2.0], rtol=1e-12)


def test_velocity_without_learning_rates() -> None:
    velocity = kernel_velocity(random(3, 4, 4), torch.tensor([0, 2, 4]))
    assert velocity.angle_per_learning_rate is None
    assert velocity.angle_per_step.shape == (2,)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([0, 10, 20, 25], "gaps of 5, 10"),
        ([0, 10, 10, 20], "10 follows 10"),
        ([0, 10, 20], "3 values for 4"),
        ([0, 0.5, 1, 1.5], "holds 0.5"),
    ],
)
def test_velocity_refuses_steps(steps: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kernel_velocity(random(4, 3, 3), steps)


def test_velocity_refuses_learning_rates_that_stand_still_and_single_snapshots() -> None:
    with pytest.raises(ConfigError, match="summed_learning_rates must increase"):
        kernel_velocity(random(3, 4, 4), [0, 1, 2], summed_learning_rates=[0, 1, 1])
    with pytest.raises(ConfigError, match="at least 2"):
        kernel_velocity(random(1, 4, 4), [0])


@pytest.mark.parametrize(
    ("K", "message"),
    [
        (torch.zeros(3, 3), "1 kernels of 1 that are zero"),
        (torch.tensor([[1.0, math.nan], [math.inf, 1.0]]), "2 entries of 4"),
        (torch.ones(3), r"shape \[3\]"),
        (torch.ones(0, 3), r"shape \[0, 3\]"),
        (torch.ones(2, 3), r"\[2, 3\] and \[3, 3\]"),
        (torch.ones(3, 3, dtype=torch.complex64), "complex64"),
    ],
)
def test_bad_kernels_are_refused(K: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        kernel_distance(K, torch.eye(3))


def test_a_zero_kernel_in_a_batch_is_counted() -> None:
    kernels = torch.ones(4, 2, 2)
    kernels[1] = 0
    with pytest.raises(KernelError, match="1 kernels of 4"):
        distance_matrix(kernels)
    with pytest.raises(KernelError, match="snapshots are"):
        distance_matrix(torch.eye(3))


def test_the_difference_is_shared_out_over_eigenvectors() -> None:
    n = 9
    basis = torch.linalg.qr(random(n, n)).Q
    values = torch.arange(n, 0, -1, dtype=torch.float64)
    K = basis @ torch.diag(values) @ basis.T
    # All of it in the plane of the two top eigenvectors, whatever the kernels' scales.
    turned = basis[:, :2] @ torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64) @ basis[:, :2].T
    within = 5 * (K + turned)
    shares = [difference_in_top(K, within, k).item() for k in range(1, n + 1)]
    units = [X / X.norm() for X in (K, within)]
    D = basis.T @ (units[1] - units[0]) @ basis
    assert shares == pytest.approx(
        [float((D[:k, :k].norm() / D.norm()) ** 2) for k in range(1, n + 1)], abs=1e-12
    )
    assert shares[-1] == pytest.approx(1)
    both = difference_in_top(torch.stack([K, within]), torch.stack([within, K]), 2)
    assert both[0].item() == pytest.approx(shares[1])


def test_a_difference_without_directions_has_its_share_of_the_plane() -> None:
    n, k = 60, 20
    K = torch.eye(n, dtype=torch.float64) + 0.01 * torch.diag(torch.arange(n, dtype=torch.float64))
    noise = random(20, n, n)
    share = difference_in_top(K.expand(20, n, n), K + 0.01 * (noise + noise.mT), k).mean().item()
    assert share == pytest.approx((k / n) ** 2, rel=0.1)


def test_a_difference_that_does_not_exist_is_refused() -> None:
    eye = torch.eye(3)
    with pytest.raises(KernelError, match="proportional"):
        difference_in_top(eye, 2 * eye, 1)
    with pytest.raises(ConfigError, match="k=4 eigenvectors were asked of 3; choose from 1 to 3"):
        difference_in_top(eye, torch.ones(3, 3), 4)
    with pytest.raises(KernelError, match="both need the same"):
        difference_in_top(eye, torch.eye(4), 1)
