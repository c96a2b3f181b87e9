"""Actual and predicted change; on adversarial inputs the two brackets. Numbers of docs/theory.md."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tangentlab import modes
from tangentlab.attacks import FGSM, PGD
from tangentlab.models import SmallCNN
from tangentlab.probes import adversarial_change, output_change


def two_states(momentum: float = 1e-3) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A BatchNorm network before and after a step in training mode, in float64, and inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = SmallCNN((1, 8, 8), 3, widths=(4, 4), strides=(1, 2), hidden=0).double().train()
        x, y = torch.rand(12, 1, 8, 8, dtype=torch.float64), torch.arange(12) % 3
    after = copy.deepcopy(before)
    for module in modes.batchnorm_modules(after):
        module.momentum = momentum
    optimizer = torch.optim.SGD(after.parameters(), lr=1e-3)
    nn.functional.cross_entropy(after(x), y).backward()
    optimizer.step()
    return before, after, x[:5], y[:5]


def off(actual: Tensor, predicted: Tensor) -> float:
    return float((actual - predicted).norm() / actual.norm())


def test_the_prediction_has_a_part_of_the_weights_and_one_of_the_buffers() -> None:
    before, after, x, _ = two_states()
    found = output_change(before, after, x)
    weights_only, buffers_only = copy.deepcopy(after), copy.deepcopy(after)
    weights_only.load_state_dict({**after.state_dict(), **dict(before.named_buffers())})
    buffers_only.load_state_dict({**after.state_dict(), **dict(before.named_parameters())})
    for part, other in (("parameters", weights_only), ("buffers", buffers_only)):
        alone = output_change(before, other, x)
        predicted = getattr(found, part)
        assert torch.allclose(getattr(alone, part), predicted, atol=1e-12)
        assert off(alone.actual, predicted) < 0.02
    assert off(found.actual, found.parameters + found.buffers) < 0.05
    assert off(found.actual, found.parameters) > 0.1
    batch = output_change(before, after, x, batchnorm="batch")
    assert float(batch.buffers.abs().max()) == float(batch.drift.abs().max()) == 0
    assert off(batch.actual, batch.parameters) < 0.02
    assert before.training
    assert after.training


def test_a_long_drift_is_taken_in_full() -> None:
    """At the buffers' usual momentum its linear part is far off; the rest is the parameters' alone."""
    before, after, x, _ = two_states(momentum=0.5)
    found = output_change(before, after, x)
    assert off(found.actual, found.parameters + found.buffers) > 0.2
    assert off(found.actual, found.drift + found.parameters_after) < 0.02


def test_the_brackets_are_the_change_on_adversarial_inputs() -> None:
    before, after, x, y = two_states()
    found = adversarial_change(before, after, x, y, PGD(0.1, 0.05, 3), seed=1)
    with torch.no_grad(), modes.evaluation(before), modes.evaluation(after):
        whole = after(found.x_after) - before(found.x_before)
    assert torch.allclose(found.network.actual + found.jump, whole, atol=1e-12)
    again = adversarial_change(before, before, x, y, PGD(0.1, 0.05, 3), seed=1)
    assert torch.equal(again.x_before, again.x_after)  # the noise is the same
    assert torch.equal(again.x_before, found.x_before)
    assert float(again.jump.abs().max()) == 0


class Cubic(nn.Module):
    """f = ±[θ (x₁ − ½) + 100 (x₁ − ½)³ + x₂]: at x₁ = ½ the gradient by x₁ has the sign of θ."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        u = x[:, :1] - 0.5
        f = self.theta * u + 100 * u**3 + x[:, 1:]
        return torch.cat([f, -f], 1)


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6])
def test_the_jump_is_not_small_with_the_step(step: float) -> None:
    """However short a step is that crosses a zero of the input gradient, the sign flips, and with it x* by
    2 eps and f by 2·100 eps³; the first bracket is in proportion to the step. What crosses nothing stays."""
    x, y = torch.full((1, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    crossing = adversarial_change(Cubic(step / 2), Cubic(-step / 2), x, y, FGSM(0.1))
    assert float(crossing.jump.abs().max()) == pytest.approx(0.2, rel=0.01)
    assert float(crossing.network.actual.abs().max()) == pytest.approx(0.1 * step)
    beside = adversarial_change(Cubic(1.0), Cubic(1.0 + step), x, y, FGSM(0.1))
    assert float(beside.jump.abs().max()) == 0


class Spread(nn.Module):
    """f = ±[(θ + 2 x₂ − 1) u + 100 u³], u = x₁ − ½: at u = 0 the gradient by x₁ is θ + 2 x₂ − 1."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        u = x[:, :1] - 0.5
        f = (self.theta + 2 * x[:, 1:] - 1) * u + 100 * u**3
        return torch.cat([f, -f], 1)


@pytest.mark.parametrize("step", [0.1, 0.01, 0.001])
def test_the_share_of_signs_that_a_step_flips_is_in_proportion_to_it(step: float) -> None:
    """Of gradients of density ½ at zero a step flips half of its length, and with each f by 2·100 eps³: in
    the mean as much as the first bracket, eps times the step, however short that is."""
    count, eps = 20_000, 0.1
    x = torch.stack([torch.full((count,), 0.5), (torch.arange(count) + 0.5) / count], 1).double()
    found = adversarial_change(Spread(0.0), Spread(step), x, torch.zeros(count).long(), FGSM(eps))
    jumps = found.jump[:, 0].abs()
    assert float((jumps > 0.1).double().mean()) == pytest.approx(step / 2, rel=0.01)
    assert float(found.network.actual[:, 0].abs().mean()) == pytest.approx(eps * step, rel=1e-6)
    assert float(jumps.mean()) == pytest.approx(eps * step, rel=0.1)
