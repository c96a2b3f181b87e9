"""First-order changes: against Jacobians, and by how fast their error falls. Numbers of docs/theory.md."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangentlab import modes
from tangentlab.attacks import PGD
from tangentlab.errors import ConfigError
from tangentlab.kernels import pullback, sgd_change, tangent_change
from tangentlab.models import SmallCNN
from tangentlab.modes import batchnorm_modules

from .reference import batch_jacobian, jacobian

STEP_SIZES = (1e-2, 1e-3, 1e-4, 1e-5)
SETTINGS = {"gradient": (0.0, 0.0), "momentum and decay": (0.9, 5e-3)}


def network() -> nn.Module:
    """Smooth, with BatchNorm; in float64, its running statistics not those of any batch here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1, bias=False),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * 9, 3),
        ).double()
        with torch.no_grad():
            for module in batchnorm_modules(model):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.normal_(1, 0.2)
    return model.eval()


def examples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 6, 6, generator=g, dtype=torch.float64), torch.arange(n) % 3


def crafted(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The crafted batch X*, which the tests then hold fixed."""
    x, y = examples(8, seed=1)
    return PGD(0.1, 0.05, 3)(model, x, y, generator=torch.Generator().manual_seed(2)), y


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """J_batch(X*)ᵀ ∂L/∂f of the crafted batch's mean cross-entropy."""
    x, y = crafted(model)
    with torch.no_grad(), modes.batchnorm(model, statistics="batch"):
        logits = model(x)
    cotangent = (logits.softmax(1) - F.one_hot(y, 3)) / len(y)
    return pullback(model, x, cotangent)


def direction(model: nn.Module, setting: str) -> dict[str, Tensor]:
    """Δθ for η = 1."""
    momentum, weight_decay = SETTINGS[setting]
    g = torch.Generator().manual_seed(3)
    momenta = {
        name: 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in model.named_parameters()
    }
    change, _ = sgd_change(
        dict(model.named_parameters()),
        gradients(model),
        momenta if momentum else {},
        learning_rate=1.0,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return change


def moved(model: nn.Module, change: Mapping[str, Tensor], size: float = 1.0) -> nn.Module:
    after = copy.deepcopy(model)
    with torch.no_grad():
        named = dict(after.named_parameters()) | dict(after.named_buffers())
        for name, value in change.items():
            named[name] += size * value
    return after


def outputs(model: nn.Module, x: Tensor, statistics: str) -> Tensor:
    with torch.no_grad(), modes.batchnorm(model, statistics=statistics):
        return model(x)


def drift(model: nn.Module) -> dict[str, Tensor]:
    """Δs of one forward of the crafted batch in training mode, for a buffers' momentum of 1."""
    after = copy.deepcopy(model)
    for module in batchnorm_modules(after):
        module.momentum = 1.0
    with torch.no_grad(), modes.batchnorm(after, statistics="batch", update=True):
        after(crafted(model)[0])
    return {
        name: value - dict(model.named_buffers())[name]
        for name, value in after.named_buffers()
        if value.is_floating_point()
    }


def falls_as(power: int, error: Callable[[float], float]) -> None:
    """Over three decades of η the error falls by 10^power a decade, within a fifth."""
    errors = [error(size) for size in STEP_SIZES]
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(10**power, rel=0.2)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_first_order(statistics: str, setting: str) -> None:
    """Training mode on X* itself, and evaluation mode with frozen buffers on other inputs: η²."""
    model = network()
    x = crafted(model)[0] if statistics == "batch" else examples(5, seed=4)[0]
    change = direction(model, setting)
    slope = tangent_change(model, x, change, batchnorm=statistics)
    assert float(slope.norm()) > 0.1

    def error(size: float) -> float:
        actual = outputs(moved(model, change, size), x, statistics) - outputs(model, x, statistics)
        return float((actual - size * slope).norm())

    falls_as(2, error)


def test_first_order_with_drift() -> None:
    """Evaluation mode while the buffers move in proportion to η: η² with the drift's term, η without it."""
    model, x = network(), examples(5, seed=4)[0]
    parameters, buffers = direction(model, "gradient"), drift(network())
    slope = tangent_change(model, x, parameters)
    whole = tangent_change(model, x, parameters | buffers)
    assert torch.allclose(whole, slope + tangent_change(model, x, buffers), atol=1e-12)

    def error(size: float, predicted: Tensor) -> float:
        after = moved(moved(model, parameters, size), buffers, size)
        actual = outputs(after, x, "running") - outputs(model, x, "running")
        return float((actual - size * predicted).norm())

    falls_as(2, lambda size: error(size, whole))
    falls_as(1, lambda size: error(size, slope))


def test_at_a_fixed_momentum_of_the_buffers_the_drift_does_not_vanish() -> None:
    """f(θ₊, s₊) − f(θ, s) → f(θ, s₊) − f(θ, s); beyond it J(θ, s₊) Δθ, again to η²."""
    model, x = network(), examples(5, seed=4)[0]
    settled = moved(model, drift(model), 0.1)
    jump = outputs(settled, x, "running") - outputs(model, x, "running")
    assert float(jump.norm()) > 0.01
    change = direction(model, "gradient")
    slope = tangent_change(settled, x, change)

    def error(size: float) -> float:
        actual = outputs(moved(settled, change, size), x, "running") - outputs(model, x, "running")
        return float((actual - jump - size * slope).norm())

    falls_as(2, error)


def test_the_error_is_half_the_change_of_the_tangent() -> None:
    """f₊ − f = ½ (J + J₊) Δθ + O(η³): the linearisation fails as the Jacobian moves along the step."""
    model, x = network(), examples(5, seed=4)[0]
    change = direction(model, "gradient")

    def error(size: float) -> float:
        after = moved(model, change, size)
        mean = (tangent_change(model, x, change) + tangent_change(after, x, change)) / 2
        return float((outputs(after, x, "running") - outputs(model, x, "running") - size * mean).norm())

    ratios = [error(larger) / error(larger / 10) for larger in (1e-1, 1e-2)]
    assert ratios == pytest.approx([1000, 1000], rel=0.3)


def test_the_error_is_at_most_what_the_tangent_turns_along_the_step() -> None:
    """‖f₊ − f − J Δθ‖ ≤ max_τ ‖(J(θ + τ Δθ) − J) Δθ‖, and more than a fifth of it on a step of this size."""
    model, x = network(), examples(5, seed=4)[0]
    change = direction(model, "gradient")
    tangent = tangent_change(model, x, change)
    error = (outputs(moved(model, change), x, "running") - outputs(model, x, "running") - tangent).norm()
    turned = max(
        (tangent_change(moved(model, change, tau / 50), x, change) - tangent).norm() for tau in range(51)
    )
    assert 0.2 * turned < error <= turned


def test_momentum_multiplies_the_learning_rate_where_the_gradient_stands_still() -> None:
    """By 1/(1 − μ), after some times 1/(1 − μ) steps."""
    start, gradient = {"w": torch.zeros(3).double()}, {"w": torch.tensor([1.0, -2.0, 0.5]).double()}
    momenta: dict[str, Tensor] = {}
    for _ in range(200):
        change, momenta = sgd_change(
            start, gradient, momenta, learning_rate=0.1, momentum=0.9, weight_decay=0.0
        )
    assert torch.allclose(change["w"], -0.1 / (1 - 0.9) * gradient["w"], rtol=1e-8)


def test_sgd_change_is_pytorchs() -> None:
    """b₊ = μ b + ∇L + λ θ, Δθ = −η b₊ over several steps, weight by weight."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
    momenta: dict[str, Tensor] = {}
    for _ in range(3):
        found = gradients(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        change, momenta = sgd_change(
            before, found, momenta, learning_rate=0.05, momentum=0.9, weight_decay=5e-3
        )
        for name, p in model.named_parameters():
            p.grad = found[name]
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.allclose(p - before[name], change[name], atol=1e-15, rtol=1e-10)


def test_products_are_those_of_the_jacobians() -> None:
    """J v and Jᵀ c, in both modes; the mixed kernel's product is J_running(x) J_batch(X)ᵀ c."""
    model, x, (X, _) = network(), examples(5, seed=4)[0], examples(8, seed=1)
    R, B = jacobian(model, x).flatten(0, 1), batch_jacobian(model, X).flatten(0, 1)
    c = torch.linspace(-1, 1, len(B), dtype=torch.float64)
    v = direction(model, "momentum and decay")
    flat = torch.cat([value.flatten() for value in v.values()])
    assert torch.allclose(tangent_change(model, x, v).flatten(), R @ flat, atol=1e-12)
    assert torch.allclose(tangent_change(model, X, v, batchnorm="batch").flatten(), B @ flat, atol=1e-12)
    pulled = pullback(model, X, c.view(8, 3))
    assert torch.allclose(torch.cat([g.flatten() for g in pulled.values()]), c @ B, atol=1e-12)
    assert torch.allclose(tangent_change(model, x, pulled).flatten(), R @ (B.T @ c), atol=1e-11)


def test_training_mode_does_not_feel_the_scale_of_a_weight_before_batchnorm() -> None:
    """J_batch w = 0 up to BatchNorm's ε, so decay of such a weight changes the evaluated network alone."""
    model, (X, _) = network(), examples(8, seed=1)
    for module in batchnorm_modules(model):
        module.eps = 1e-14
    for name in ("0.weight", "3.weight", "3.bias"):
        decay = {name: -dict(model.named_parameters())[name].detach()}
        assert float(tangent_change(model, X, decay, batchnorm="batch").norm()) < 1e-9
        assert float(tangent_change(model, X, decay).norm()) > 1e-2


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_a_shipped_network_in_single_precision_comes_back_as_it_was(statistics: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallCNN((1, 8, 8), 3, widths=(4, 4), strides=(1, 2), hidden=5).train()
        x = torch.rand(6, 1, 8, 8)
        v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    found = tangent_change(model, x, v, batchnorm=statistics)
    expected = tangent_change(copy.deepcopy(model).double(), x.double(), v, batchnorm=statistics)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4)
    pullback(model, x, torch.ones(6, 3), batchnorm=statistics)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_bad_input_is_named() -> None:
    model, x = network(), examples(2, seed=4)[0]
    with pytest.raises(ConfigError, match="change '0.wieght' is unknown; did you mean '0.weight'"):
        tangent_change(model, x, {"0.wieght": torch.zeros(1)})
    with pytest.raises(ConfigError, match="change '1.running_mean' is unknown"):
        tangent_change(model, x, {"1.running_mean": torch.zeros(3)}, batchnorm="batch")
    for call in (tangent_change, pullback):
        with pytest.raises(ConfigError, match="batchnorm 'eval' is unknown; choose from 'running', 'batch'"):
            call(model, x, {}, batchnorm="eval")  # type: ignore[operator]
