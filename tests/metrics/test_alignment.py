"""Kernel-target alignment and CKA against explicit Y Yᵀ and H K H."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tangentlab.errors import KernelError
from tangentlab.metrics import centered_alignment, kernel_target_alignment

Y = torch.tensor([0, 2, 1, 1, 0, 2, 2])


def psd(n: int = 7, seed: int = 0) -> torch.Tensor:
    J = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return J @ J.mT


def cosine(A: np.ndarray, B: np.ndarray) -> float:
    return float((A * B).sum() / np.sqrt((A * A).sum() * (B * B).sum()))


def test_target_alignment_is_the_cosine_with_the_labels_kernel() -> None:
    K = psd()
    one_hot = np.eye(3)[Y.numpy()]
    assert kernel_target_alignment(K, Y).item() == pytest.approx(
        cosine(K.numpy(), one_hot @ one_hot.T), rel=1e-13
    )


def test_target_alignment_is_one_for_the_target_and_blind_to_names_and_scale() -> None:
    one_hot = torch.nn.functional.one_hot(Y).double()
    assert kernel_target_alignment(3 * one_hot @ one_hot.mT, Y).item() == pytest.approx(1)
    K = psd()
    renamed = torch.tensor([7, 0, 4])[Y]
    torch.testing.assert_close(kernel_target_alignment(1e-200 * K, renamed), kernel_target_alignment(K, Y))
    batch = torch.stack([K, psd(seed=1)])
    assert kernel_target_alignment(batch, Y).shape == (2,)
    assert kernel_target_alignment(batch, Y)[1] == kernel_target_alignment(batch[1], Y)


def test_cka_matches_explicit_centring() -> None:
    K1, K2 = psd(seed=1), psd(seed=2)
    H = np.eye(7) - 1 / 7
    expected = cosine(H @ K1.numpy() @ H, H @ K2.numpy() @ H)
    assert centered_alignment(K1, K2).item() == pytest.approx(expected, rel=1e-12)


def test_cka_is_invariant_under_what_centring_and_scaling_remove() -> None:
    K1, K2 = psd(seed=1), psd(seed=2)
    expected = centered_alignment(K1, K2)
    shift = torch.arange(7.0, dtype=torch.float64)
    torch.testing.assert_close(centered_alignment(K1 + shift[:, None] + shift[None, :] + 5, 3 * K2), expected)
    assert centered_alignment(K1, K1 + 2).item() == pytest.approx(1)
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    torch.testing.assert_close(centered_alignment(K1[order][:, order], K2[order][:, order]), expected)
    # Uncentred, the shift would dominate.
    assert abs(cosine((K1 + 100).numpy(), K2.numpy()) - expected.item()) > 0.05


def test_cka_broadcasts_over_classes() -> None:
    K = torch.stack([psd(seed=s) for s in range(3)])
    result = centered_alignment(K, psd(seed=9))
    assert result.shape == (3,)
    torch.testing.assert_close(result[2], centered_alignment(K[2], psd(seed=9)))


def test_refusals() -> None:
    with pytest.raises(KernelError, match="square"):
        kernel_target_alignment(torch.ones(3, 2), Y)
    with pytest.raises(KernelError, match=r"shape \[7\]"):
        kernel_target_alignment(torch.eye(3), Y)
    with pytest.raises(KernelError, match="K2 has 1 kernels of 1 of which centring"):
        centered_alignment(psd(), torch.full((7, 7), 0.1))
    with pytest.raises(KernelError, match="same n"):
        centered_alignment(psd(7), psd(6))
