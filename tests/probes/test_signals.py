"""The linearity signals on networks whose loss is known, against plain formulas, and without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError
from tangentlab.probes import linearity_signals

EPS = 0.1
NAMES = {
    "fgsm_pgd_gap",
    "gradient_cosine",
    "linearity_error",
    "gradient_norm",
    "input_entropy_rank",
    "input_top_mass",
}


class Hinge(nn.Module):
    """Logits (0, z): far from zero the cross-entropy of class 0 is z itself, linear in the input."""

    def __init__(self, weight: Tensor, *, bend: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bend = nn.Parameter(weight), bend

    def forward(self, x: Tensor) -> Tensor:
        z = 100 + x.flatten(1) @ self.weight + self.bend * x.flatten(1).square().sum(1)
        return torch.stack([torch.zeros_like(z), z], dim=1)


def points(n: int = 40) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x = 0.2 + 0.6 * torch.rand(n, 1, 3, 3, generator=draws, dtype=torch.float64)
    return x, torch.zeros(n, dtype=torch.int64)


def test_a_linear_loss_is_seen_as_one() -> None:
    weight = torch.linspace(-1, 1, 9, dtype=torch.float64)
    found = linearity_signals(Hinge(weight), *points(), eps=EPS)
    assert set(found) == NAMES
    assert found["gradient_cosine"] == pytest.approx(1)
    assert found["linearity_error"] == pytest.approx(0, abs=1e-20)
    assert found["gradient_norm"] == pytest.approx(float(weight.norm()))
    assert found["fgsm_pgd_gap"] == 0
    # All gradients are one.
    assert found["input_entropy_rank"] == pytest.approx(1, abs=1e-3)
    assert found["input_top_mass"] == pytest.approx(1)


def test_curvature_is_measured_by_the_formulas() -> None:
    """L(x) = 100 + b‖x‖²: the error is (b α (1 − α) ‖x_a − x_b‖²)², in the mean over uniform offsets."""
    bend = 3.0
    found = linearity_signals(Hinge(torch.zeros(9, dtype=torch.float64), bend=bend), *points(4000), eps=EPS)
    # E[α²(1 − α)²] = 1/30; d = 9 differences of two uniforms: E d² = 2 eps²/3, E d⁴ = 16 eps⁴/15.
    squared = 9 * (16 / 15) * EPS**4 + 9 * 8 * (2 / 3 * EPS**2) ** 2
    assert found["linearity_error"] == pytest.approx(bend**2 * squared / 30, rel=0.1)
    assert 0.9 < found["gradient_cosine"] < 0.999
    assert found["input_entropy_rank"] > 1.2


class Masked(nn.Module):
    """Of one pixel p, right below 0.5 and above 0.6: from 0.45 a step of 0.2 leaps over what is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        p = x.flatten(1)[:, 0]
        z = torch.where(p < 0.5, 2 - p, torch.where(p < 0.6, -1.0, 1.0))
        return torch.stack([torch.zeros_like(z), z], dim=1)


def test_the_gap_is_fgsms_accuracy_over_pgds() -> None:
    x, y = torch.full((400, 1, 1, 1), 0.45), torch.ones(400, dtype=torch.int64)
    found = linearity_signals(Masked(), x, y, eps=0.2)
    # PGD's steps of 0.05 come to rest in between, but for the eighth that starts beyond.
    assert found["fgsm_pgd_gap"] == pytest.approx(7 / 8, abs=0.05)


def test_examples_without_a_gradient_are_left_out() -> None:
    found = linearity_signals(Hinge(torch.zeros(9, dtype=torch.float64)), *points(), eps=EPS)
    assert found["gradient_cosine"] == 1.0
    assert "input_entropy_rank" not in found


def test_the_model_and_global_state_stay_and_the_noise_is_the_seeds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    ).double()
    model.train()
    before, x, y = copy.deepcopy(model.state_dict()), *points()
    state = torch.get_rng_state()
    first = linearity_signals(model, x, y, eps=EPS)
    assert linearity_signals(model, x, y, eps=EPS) == first
    assert linearity_signals(model, x, y, eps=EPS, seed=1) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ConfigError, match="eps=8"):
        linearity_signals(model, x, y, eps=8)
