"""What docs/theory.md says of estimators and buffers, in numbers."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tangentlab import modes
from tangentlab.metrics import kernel_distance
from tangentlab.studies.gap import STUDY

HERE = Path(__file__).parent


def test_every_test_and_claim_that_the_page_names_is_there() -> None:
    page = (HERE.parent / "docs" / "theory.md").read_text()
    named = set(re.findall(r"`(test_\w+)(?:\[.*?\])?`", page))
    sources = "".join(path.read_text() for path in HERE.rglob("test_*.py"))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in sources]
    claims = set(re.findall(r"`(gap/[\w-]+)`", page))
    assert claims == {claim.id for claim in STUDY.claims}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updated(module: nn.Module, *batches: Tensor) -> nn.Module:
    with torch.no_grad():
        for batch in batches:
            module.train()(batch)
    return module.eval()


@pytest.mark.parametrize(("batch", "pixels"), [(2, 4), (8, 1), (4, 9)])
def test_the_forward_takes_the_biased_variance_and_the_buffer_the_unbiased(batch: int, pixels: int) -> None:
    """They differ by m/(m − 1), m = B·H·W."""
    h, m = normal(batch, 1, pixels, 1), batch * pixels
    module = updated(nn.BatchNorm2d(1, momentum=1.0, eps=1e-14).double(), h)
    with torch.no_grad(), modes.batchnorm(module, statistics="batch"):
        normalized = module(h)
    assert float(normalized.var(correction=0)) == pytest.approx(1, rel=1e-12)
    assert float(module.running_var) == pytest.approx(float(h.var(correction=0)) * m / (m - 1), rel=1e-12)


def test_the_unbiased_variance_is_that_of_the_population() -> None:
    """E[biased] = (m − 1)/m σ², E[unbiased] = σ²: here m = 4, σ = 3."""
    h = 3 * normal(100_000, 4)
    assert float(h.var(1).mean()) == pytest.approx(9, rel=0.01)
    assert float(h.var(1, correction=0).mean()) == pytest.approx(9 * 3 / 4, rel=0.01)


def test_momentum_averages_over_an_effective_number_of_batches() -> None:
    """The buffer's variance over draws is ρ/(2 − ρ) of one batch's: ρ = 0.1 averages 19 batches. The start
    weighs (1 − ρ)^t."""
    rho, m = 0.1, 8
    channels = 4000  # independent draws
    module = nn.BatchNorm1d(channels, momentum=rho).double()
    batches = normal(150, m, channels)
    updated(module, *batches)
    assert float(module.running_var.mean()) == pytest.approx(1, rel=0.01)
    # Var(s²) = 2σ⁴/(m − 1) for normal activations.
    assert float(module.running_var.var()) == pytest.approx(2 / (m - 1) * rho / (2 - rho), rel=0.15)
    start = updated(nn.BatchNorm1d(1, momentum=rho).double(), *[torch.full((4, 1), 5.0).double()] * 7)
    assert float(start.running_mean) == pytest.approx(5 * (1 - 0.9**7))
    assert float(start.running_var) == pytest.approx(0.9**7)


def test_several_updates_a_step_weigh_the_last_most() -> None:
    """With r forwards a step the buffers go to Σ w_j s_j, w_j = ρ (1 − ρ)^(r − j)/(1 − (1 − ρ)^r)."""
    rho, forwards = 0.3, [normal(16, 1, seed=j) * (j + 1) + j for j in range(3)]
    module = updated(nn.BatchNorm1d(1, momentum=rho).double(), *(forwards * 60))
    weights = torch.tensor([rho * (1 - rho) ** (2 - j) for j in range(3)], dtype=torch.float64)
    weights /= 1 - (1 - rho) ** 3
    means, variances = (torch.stack([f(h) for h in forwards]) for f in (torch.mean, torch.var))
    assert float(weights.sum()) == pytest.approx(1)
    assert float(module.running_mean) == pytest.approx(float(weights @ means), rel=1e-9)
    assert float(module.running_var) == pytest.approx(float(weights @ variances), rel=1e-9)


def test_buffers_that_saw_two_populations_miss_the_variance_between_them() -> None:
    """Of clean N(0, 1) and crafted N(2, 1) in turn: mean 1, variance 1. The mixture's variance is 2."""
    module = nn.BatchNorm1d(1, momentum=0.01).double()
    for step in range(600):
        updated(module, normal(512, 1, seed=2 * step), normal(512, 1, seed=2 * step + 1) + 2)
    assert float(module.running_mean) == pytest.approx(1, abs=0.05)
    assert float(module.running_var) == pytest.approx(1, abs=0.05)
    mixture = torch.cat([normal(5000, 1), normal(5000, 1, seed=1) + 2])
    assert float(mixture.var()) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("swap", [False, True])
def test_statistics_of_the_other_population_are_biased(swap: bool) -> None:
    """Normalized with the other's statistics: mean (μ − μ')/σ', variance (σ/σ')², not 0 and 1."""
    own, other = (3.0, 0.5), (1.0, 2.0)
    if swap:
        own, other = other, own
    populations = [sigma * normal(20_000, 1, seed=k) + mu for k, (mu, sigma) in enumerate((own, other))]
    module = updated(nn.BatchNorm1d(1, momentum=1.0, eps=1e-14).double(), populations[1])
    with torch.no_grad():
        seen = module(populations[0])
    assert float(seen.mean()) == pytest.approx((own[0] - other[0]) / other[1], abs=0.1)
    assert float(seen.var()) == pytest.approx((own[1] / other[1]) ** 2, rel=0.05)


def test_moments_are_no_farther_than_the_activations() -> None:
    """|μ* − μ| ≤ E|h* − h| and |σ* − σ| ≤ √E|h* − h|²; the second bound is reached where h* = c h."""
    h = normal(500, 40)
    for shift in (0.3 * normal(500, 40, seed=1), 0.1 * h.sign(), -0.5 * h, torch.full_like(h, 0.2)):
        crafted = h + shift
        assert bool(((crafted.mean(0) - h.mean(0)).abs() <= shift.abs().mean(0) + 1e-12).all())
        spread = (crafted.std(0, correction=0) - h.std(0, correction=0)).abs()
        assert bool((spread <= shift.square().mean(0).sqrt() + 1e-12).all())
    centred = h - h.mean(0)
    grown = (1.5 * centred).std(0, correction=0) - centred.std(0, correction=0)
    assert torch.allclose(grown, (0.5 * centred).square().mean(0).sqrt())


def test_kernel_distance_sees_neither_scale_nor_rotations_of_the_parameters() -> None:
    """J → c J Q moves the Jacobian and leaves the distance at zero."""
    J, rotation = normal(6, 20), torch.linalg.qr(normal(20, 20, seed=1))[0]
    other = 3 * J @ rotation
    assert float((other - J).norm() / J.norm()) > 1
    assert float(kernel_distance(J @ J.T, other @ other.T)) == pytest.approx(0, abs=1e-12)


def _change_of_logits(m: int) -> float:
    """Relative change of a three-layer network's logits from the unbiased to the biased variance, m values a
    channel and layer."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=1.0), nn.ReLU()]
        model = updated(nn.Sequential(*layers, nn.Linear(8, 3)).double(), normal(m, 8))
    biased = copy.deepcopy(model)
    for module in modes.batchnorm_modules(biased):
        module.running_var *= (m - 1) / m
    x = normal(50, 8, seed=1)
    with torch.no_grad():
        return float((biased(x) - model(x)).norm() / model(x).norm())


def test_the_estimator_matters_for_few_values_only() -> None:
    """About 1/(2m) a layer, so below 3/(2m) for three: nothing at m = 25,088 (128 images of 14 × 14), over
    one percent at m = 64, a fifth at m = 8."""
    assert _change_of_logits(25_088) < 1e-4
    assert 0.01 < _change_of_logits(64) < 0.03
    assert _change_of_logits(8) > 0.1
    assert _change_of_logits(1000) == pytest.approx(_change_of_logits(100) / 10, rel=0.4)
