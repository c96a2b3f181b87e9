"""Auto-PGD: the paper's schedule and losses, and that it beats the PGD it adapts."""

from __future__ import annotations

import pytest
import torch
from autoattack_reference import Reference
from torch import nn

from tangentlab.attacks import APGD, PGD
from tangentlab.attacks.apgd import _Best, checkpoints, defined_loss, dlr, likeliest_others, targeted_dlr
from tangentlab.errors import ModelError
from tangentlab.randomness import generator


def test_the_checkpoints_are_those_of_the_paper() -> None:
    """Section 3.2: p = 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1000) == [0, 220, 410, 570, 700, 800, 870, 930, 990]
    assert checkpoints(10) == [0, 3, 5, 6, 7, 8, 9]
    assert checkpoints(1) == [0]


class Hill(nn.Module):
    """Two logits, the loss on class 0 largest where every pixel is 0.53."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height = -((x.flatten(1) - 0.53) ** 2).sum(dim=1)
        return torch.stack([torch.zeros_like(height), 50 * height], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_halving_finds_a_top_that_long_steps_jump_over(norm: str) -> None:
    x, y = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    found = APGD(0.1, 100, norm)(Hill().double(), x, y, generator=generator(0, "noise"))
    jumping = PGD(0.1, 0.2, 100, norm=norm)(Hill().double(), x, y, generator=generator(0, "noise"))
    assert (found - 0.53).abs().max() < 0.0005
    assert (jumping - 0.53).abs().max() > 0.02


def test_the_losses_are_those_of_the_paper() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0, 4.0], [1.0, 5.0, 2.0, 4.0]], dtype=torch.float64)
    y = torch.tensor([1, 0])
    # −(5 − 4)/(5 − 2) and −(1 − 5)/(5 − 2)
    assert torch.allclose(dlr(logits, y), torch.tensor([-1 / 3, 4 / 3], dtype=torch.float64))
    # −(5 − 2)/(5 − (2 + 1)/2) and −(1 − 4)/3.5
    found = targeted_dlr(logits, y, torch.tensor([2, 3]))
    assert torch.allclose(found, torch.tensor([-3 / 3.5, 3 / 3.5], dtype=torch.float64))
    assert torch.allclose(dlr(1e3 * logits, y), dlr(logits, y))
    assert likeliest_others(logits, y, 9).tolist() == [[3, 2, 0], [1, 3, 2]]


@pytest.mark.parametrize(
    ("loss", "num_classes", "used"),
    [("dlr-targeted", 3, "dlr"), ("dlr-targeted", 2, "ce"), ("dlr", 2, "ce")],
)
def test_few_classes_fall_back_and_say_so(loss: str, num_classes: int, used: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, num_classes))
    x, y = torch.rand(6, 1, 3, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    with pytest.warns(
        UserWarning, match=f"'{loss}' is not defined for {num_classes} classes; '{used}'"
    ) as seen:
        found = APGD(0.1, 5, loss=loss)(model, x, y, generator=generator(0, "noise"))
    assert len(seen) == 1
    assert torch.equal(found, APGD(0.1, 5, loss=used)(model, x, y, generator=generator(0, "noise")))


def test_one_class_is_refused() -> None:
    with pytest.raises(ModelError, match="1 class"):
        defined_loss("ce", 1)


@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_at_least_as_strong_as_pgd(reference: Reference, norm: str, loss: str) -> None:
    """On a trained network, with as many steps, against the usual step size eps/4.

    The untargeted DLR loss is not: there, as in the authors' code, it leaves more points than the
    cross-entropy.
    """
    eps = reference.eps[norm]
    pgd = PGD(eps, eps / 4, 20, norm=norm)
    robust = reference.robust(pgd, 150)
    assert 20 < robust < 130  # else there is nothing to tell
    assert reference.robust(APGD(eps, 20, norm, loss), 150) <= robust


def test_a_misclassified_point_is_kept_before_one_of_larger_loss() -> None:
    """The cross-entropy can be larger where the prediction is still right."""
    points = torch.arange(4.0)[:, None]
    kept = _Best(points, torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([True, False, True, False]))
    found = kept.or_better(
        points + 10, torch.tensor([2.0, 0.5, 2.0, 0.5]), torch.tensor([False, True, True, False])
    )
    assert found.x.squeeze(1).tolist() == [0, 11, 12, 3]
    assert found.fooled.tolist() == [True, True, True, False]
    assert found.losses.tolist() == [1.0, 0.5, 2.0, 1.0]
