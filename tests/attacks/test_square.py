"""Square: no gradients, the published schedule, each step of the search in the threat model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tangentlab.attacks import Square
from tangentlab.attacks.square import _square_l2, _square_linf, eta, square_side
from tangentlab.attacks.threat import lengths
from tangentlab.errors import ConfigError, ModelError
from tangentlab.randomness import generator


class NoGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not x.requires_grad
        self.sizes.append(len(x))
        return self.layer(x.detach().flatten(1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_uses_no_gradients_and_leaves_out_what_it_fooled(norm: str) -> None:
    torch.manual_seed(0)
    model = NoGradients()
    x = torch.rand(60, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    model.sizes.clear()
    attack = Square(0.1 if norm == "linf" else 0.5, 200, norm)
    with torch.enable_grad():
        x_adv = attack(model, x, y, generator=generator(0, "noise"))
    sizes = list(model.sizes)
    with torch.no_grad():
        left = int((model(x_adv).argmax(dim=1) == y).sum())
    assert 0 < left < 60
    assert len(sizes) == 200
    assert sizes[0] == 60
    assert sizes == sorted(sizes, reverse=True)
    assert left <= sizes[-1] < 60


def test_more_queries_are_at_least_as_good() -> None:
    torch.manual_seed(0)
    model = NoGradients()
    x = torch.rand(60, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
        left = []
        for queries in (1, 20, 300):
            x_adv = Square(0.08, queries)(model, x, y, generator=generator(0, "noise"))
            left.append(int((model(x_adv).argmax(dim=1) == y).sum()))
    assert left[0] > left[1] > left[2]


def test_the_squares_shrink_as_published() -> None:
    """On 32 × 32 images with p = 0.8: √(0.8·1024) = 28.6, halved in area after 10, 50, 200, … queries."""
    sides = [square_side(q, torch.Size([1, 3, 32, 32]), 0.8, "linf") for q in (0, 10, 11, 51, 201, 4999)]
    assert sides == [29, 29, 20, 14, 10, 3]
    assert [square_side(q, torch.Size([1, 1, 8, 8]), 0.8, "l2") for q in (0, 11, 51, 9999)] == [7, 5, 5, 3]


def test_eta_is_two_opposite_pyramids_of_norm_one() -> None:
    """Rings around the centre of each half: Σ 1/j² from the ring outward (equation of section 3.3)."""
    window = eta(6, 6, torch.zeros(1, dtype=torch.float64))
    assert float(window.square().sum()) == pytest.approx(1.0)
    assert (window[:3] > 0).all()
    assert torch.allclose(window[3:], -window[:3])
    # ring 0 to ring 3 of a 3 × 6 half: 1 + 1/4 + 1/9 + 1/16 against 1/16
    assert float(window[1, 3] / window[1, 0]) == pytest.approx((1 + 1 / 4 + 1 / 9 + 1 / 16) * 16)


def test_a_step_moves_one_square_at_its_own_place() -> None:
    torch.manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(200, 2, 6, 5)
    moved = _square_linf(x, x, 0.1, 2, generator(0, "noise")) != x
    assert (moved.flatten(2).sum(dim=2) == 4).all()
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert moved[:, 0].any(dim=0).all()  # every pixel, the last row and column too
    delta = 0.05 * torch.randn_like(x)
    delta = 0.5 * delta / lengths(delta, "l2").reshape(-1, 1, 1, 1)
    stepped = _square_l2(x + delta, x, 0.5, 3, generator(0, "noise"))
    assert torch.allclose(lengths(stepped - x, "l2"), torch.tensor(0.5), atol=1e-5)  # no wall is near
    assert ((stepped - x - delta).abs() > 1e-4).any(dim=1).flatten(1).sum(dim=1).max() <= 18


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"images .*, not \[2, 5\]"):
        Square(0.1)(nn.Identity(), torch.rand(2, 5), torch.zeros(2), generator=generator(0, "noise"))


def test_nan_logits_are_counted() -> None:
    class Sick(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x.flatten(1).sum(dim=1, keepdim=True)
            return torch.cat([total, -total], dim=1) / (torch.arange(len(x))[:, None] != 1) * 0

    with pytest.raises(ModelError, match="NaN for 1 of 3 examples"):
        Square(0.1, 5)(
            Sick(), torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.long), generator=generator(0, "noise")
        )
