"""The signals on networks whose loss is known, against plain formulas and kernels, and without a trace."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import tangentlab as tl
from tangentlab.attacks import FGSM, PGD, NaNGradientError
from tangentlab.errors import ConfigError, KernelError
from tangentlab.probes import (
    SignedSum,
    linearity_signals,
    one_and_two_steps,
    right_confidences,
    update_products,
    update_signals,
)

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


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).double()
    model(torch.rand(30, 9, dtype=torch.float64))  # running statistics of its own
    return model


def test_the_update_share_is_the_kernels() -> None:
    """r_Fᵀ Θ(x_F, x_P) r_P over r_Pᵀ Θ(x_P, x_P) r_P, by the full kernel; the cosine likewise."""
    model, x = small(), points(12)[0]
    y = torch.arange(12) % 3
    one, several = (x + 0.1).clamp(0, 1), (x - 0.2).clamp(0, 1)
    found = update_signals(model, one, several, y)
    model.eval()
    residual = {
        name: (model(z).softmax(1) - nn.functional.one_hot(y, 3)).detach() / 12
        for name, z in (("one", one), ("several", several))
    }

    def inner(a: str, x1: Tensor, b: str, x2: Tensor) -> float:
        kernel = tl.ntk(model, x1, x2, kind="full")
        return float(torch.einsum("ic,ijcd,jd->", residual[a], kernel, residual[b]))

    cross, square = inner("one", one, "several", several), inner("several", several, "several", several)
    assert found["update_share"] == pytest.approx(cross / square, rel=1e-10)
    lengths = (inner("one", one, "one", one) * square) ** 0.5
    assert found["update_cosine"] == pytest.approx(cross / lengths, rel=1e-10)
    of_kernel = inner("several", one, "several", several)
    assert found["kernel_share"] == pytest.approx(of_kernel / square, rel=1e-10)
    of_derivatives = inner("one", several, "several", several)
    assert found["derivative_share"] == pytest.approx(of_derivatives / square, rel=1e-10)
    assert update_signals(model, several, several, y)["update_share"] == pytest.approx(1)


def test_a_linear_loss_has_an_update_share_of_one() -> None:
    x, y = points()
    one_step, several = FGSM(EPS), PGD(EPS, EPS / 2, 2, random_start=False)

    def found(bend: float) -> dict[str, float]:
        model = Hinge(torch.linspace(-1, 1, 9, dtype=torch.float64), bend=bend)
        return update_signals(model, one_step(model, x, y), several(model, x, y), y)

    assert all(value == pytest.approx(1) for value in found(0.0).values())
    # Bent, the inputs part; the loss's derivative by z stays 1, so that it is the kernel's factor alone.
    bent = found(-1.0)
    assert bent["kernel_share"] == pytest.approx(bent["update_share"])
    assert bent["kernel_share"] != pytest.approx(1, abs=1e-3)
    assert bent["derivative_share"] == pytest.approx(1)


def test_the_update_share_is_what_a_small_step_does() -> None:
    model, x = small().eval(), points(12)[0]
    y = torch.arange(12) % 3
    one, several = (x + 0.1).clamp(0, 1), (x - 0.2).clamp(0, 1)

    def fall(trained_on: Tensor) -> float:
        stepped = copy.deepcopy(model)
        nn.functional.cross_entropy(stepped(trained_on), y).backward()
        with torch.no_grad():
            for parameter in stepped.parameters():
                parameter -= 1e-5 * parameter.grad
            before, after = (nn.functional.cross_entropy(m(several), y) for m in (model, stepped))
        return float(before - after)

    share = update_signals(model, one, several, y)["update_share"]
    assert share == pytest.approx(fall(one) / fall(several), rel=1e-3)


def test_a_step_widens_the_gap_by_what_it_does_not_do_on_the_other_inputs() -> None:
    """A step along −g_F by ‖g_F‖² − ⟨g_F, g_P⟩ times its size; here from the share and the cosine."""
    model, x = small().eval(), points(12)[0]
    y = torch.arange(12) % 3
    one, several = (x + 0.1).clamp(0, 1), (x - 0.2).clamp(0, 1)
    stepped, size = copy.deepcopy(model), 1e-5
    nn.functional.cross_entropy(stepped(one), y).backward()
    with torch.no_grad():
        for parameter in stepped.parameters():
            parameter -= size * parameter.grad

    def gap(network: nn.Module) -> float:
        with torch.no_grad():
            of_one, of_several = (nn.functional.cross_entropy(network(z), y) for z in (one, several))
        return float(of_several - of_one)

    inner, of_several = update_products(model, one, several, y)
    signals = update_signals(model, one, several, y)
    assert inner / of_several == pytest.approx(signals["update_share"], rel=1e-12)
    of_one = (inner / signals["update_cosine"]) ** 2 / of_several
    assert gap(stepped) - gap(model) == pytest.approx(size * (of_one - inner), rel=1e-3)


def test_the_confidence_share_is_a_mean_over_examples() -> None:
    model, x = small(), points(12)[0]
    y = torch.arange(12) % 3
    one, several = (x + 0.1).clamp(0, 1), (x - 0.2).clamp(0, 1)
    of_one, of_several = right_confidences(model, one, several, y)
    assert model.training
    model.eval()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(z), y, reduction="none") for z in (one, several)]
    weights = (-losses[0]).exp() / of_one
    assert float(weights.sum()) == pytest.approx(1, rel=1e-12)
    share = (weights * (losses[0] - losses[1]).exp()).sum()
    assert of_several / of_one == pytest.approx(float(share), rel=1e-12)


def test_the_update_share_leaves_no_trace() -> None:
    model, x = small(), points(12)[0]
    model[1].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        found = update_signals(model, x, x, torch.arange(12) % 3)
    assert found["update_share"] == pytest.approx(1)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(KernelError, match="requires a gradient"):
        update_signals(model, x, x, torch.arange(12) % 3)


def test_a_signed_sums_kernel_is_the_quadratic_form_of_the_full_one() -> None:
    model, x = small().eval(), points(5)[0]
    signed = SignedSum(model, seed=3)
    with torch.no_grad():
        signs = torch.linalg.lstsq(model(x), signed(x)).solution[:, 0].round()
    assert sorted(signs.tolist()) == [-1, -1, 1]  # of an odd number the balance is one off
    kernel = torch.einsum("c,ijcd,d->ij", signs, tl.ntk(model, x, kind="full"), signs)
    assert torch.allclose(tl.ntk(signed, x), kernel, rtol=1e-10)


def test_one_and_two_steps_are_fgsm_and_pgd() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.rand(20, 1, 3, 3, dtype=torch.float64)
    y = torch.arange(20) % 2
    x[0] = 0.98  # the box cuts both off
    one, two = one_and_two_steps(model, x, y, eps=EPS)
    assert torch.equal(one, FGSM(EPS)(model, x, y))
    assert torch.equal(two, PGD(EPS, EPS / 2, 2, random_start=False)(model, x, y))
    assert not torch.equal(one, two)
    with pytest.raises(ConfigError, match="eps=8"):
        one_and_two_steps(model, x, y, eps=8)
    with pytest.raises(NaNGradientError, match="20 of 20"):
        one_and_two_steps(model, x * math.nan, y, eps=EPS)
