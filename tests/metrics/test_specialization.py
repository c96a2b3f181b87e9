"""The specialization matrix against its definition, written out in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tangentlab.errors import KernelError
from tangentlab.metrics import kernel_specialization, specialization_score

Y = torch.tensor([0, 2, 1, 1, 0, 2, 2])


def class_kernels(seed: int = 0) -> torch.Tensor:
    J = torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return J @ J.mT


def slow(kernels: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    def cosine(A: np.ndarray, B: np.ndarray) -> float:
        return np.trace(A @ B) / (np.linalg.norm(A) * np.linalg.norm(B))

    C = len(kernels)
    target = [np.outer(y.numpy() == c, y.numpy() == c).astype(float) for c in range(C)]
    A = np.array([[cosine(kernels[m].numpy(), target[k]) for k in range(C)] for m in range(C)])
    return np.array([[A[m, k] / (sum(A[:, k]) / C) for k in range(C)] for m in range(C)])


def test_matches_the_definition() -> None:
    kernels = class_kernels()
    ksm = kernel_specialization(kernels, Y)
    np.testing.assert_allclose(ksm, slow(kernels, Y), rtol=1e-12)
    np.testing.assert_allclose(ksm.mean(0), 1, rtol=1e-12)
    assert specialization_score(ksm).item() == pytest.approx(np.trace(slow(kernels, Y)) / 3)


def test_rows_are_kernels_and_columns_are_labels() -> None:
    kernels = class_kernels()
    # The kernel of output 0 sees nothing but class 2.
    kernels[0] = torch.outer((Y == 2).double(), (Y == 2).double())
    ksm = kernel_specialization(kernels, Y)
    assert ksm[0, 2] > 1
    assert ksm[0, 0] == ksm[0, 1] == 0


def test_complete_and_absent_specialization() -> None:
    one_hot = torch.nn.functional.one_hot(Y).double()
    complete = torch.einsum("ic,jc->cij", one_hot, one_hot)
    torch.testing.assert_close(kernel_specialization(complete, Y), 3 * torch.eye(3, dtype=torch.float64))
    assert specialization_score(kernel_specialization(complete, Y)).item() == pytest.approx(3)
    same = class_kernels()[:1] * torch.tensor([1.0, 2.0, 5.0])[:, None, None]
    torch.testing.assert_close(kernel_specialization(same, Y), torch.ones(3, 3, dtype=torch.float64))


def test_invariant_under_scales_and_the_order_of_examples() -> None:
    kernels, order = class_kernels(), torch.tensor([3, 1, 6, 0, 5, 2, 4])
    expected = kernel_specialization(kernels, Y)
    scaled = kernels * torch.tensor([1e-3, 1.0, 1e4])[:, None, None]
    torch.testing.assert_close(kernel_specialization(scaled, Y), expected)
    torch.testing.assert_close(kernel_specialization(kernels[:, order][:, :, order], Y[order]), expected)


def test_a_time_axis_is_kept() -> None:
    kernels = torch.stack([class_kernels(0), class_kernels(1)])
    ksm = kernel_specialization(kernels, Y)
    assert ksm.shape == (2, 3, 3)
    torch.testing.assert_close(ksm[1], kernel_specialization(kernels[1], Y))
    assert specialization_score(ksm).shape == (2,)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 1, 0, 0, 1, 1]), "no example of class 2"),
        (torch.tensor([0, 0, 0, 0, 0, 0, 0]), "no example of class 1, 2"),
        (torch.tensor([0, 1, 2, 3, 0, 0, 0]), "label 3; 3 class kernels take 0 to 2"),
        (torch.tensor([0, 1, 2, -1, 0, 0, 0]), "label -1"),
        (torch.tensor([0, 1, 2]), r"labels of shape \[7\]"),
        (torch.zeros(7), "float32"),
    ],
)
def test_bad_labels_are_refused(y: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        kernel_specialization(class_kernels(), y)


def test_bad_kernels_are_refused() -> None:
    with pytest.raises(KernelError, match=r"\[\.\.\., C, n, n\]"):
        kernel_specialization(torch.eye(7), Y)
    with pytest.raises(KernelError, match="square"):
        kernel_specialization(torch.ones(3, 7, 6), Y)
    with pytest.raises(KernelError, match="aligns with class 1 on average"):
        kernel_specialization((1 - torch.outer(Y == 1, Y == 1).double()).expand(3, 7, 7), Y)
    with pytest.raises(KernelError, match="specialization matrix"):
        specialization_score(torch.ones(3, 2))
