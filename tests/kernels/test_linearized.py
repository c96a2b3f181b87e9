"""The linearised network is the tangent of the network, and follows its kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tangentlab as tl
from tangentlab.errors import KernelError
from tangentlab.kernels import Linearized


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    model.double()(torch.rand(7, 1, 4, 4, dtype=torch.float64))  # buffers that are not 0 and 1
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def moved(linear: Linearized) -> Linearized:
    with torch.no_grad():
        for p in linear.delta:
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
    return linear


def test_it_is_the_tangent(model: nn.Module, x: Tensor) -> None:
    model.eval()
    before = model(x).detach()
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(output, list(model.parameters()), retain_graph=True)]
        )
        for output in model(x).flatten()
    ]
    linear = moved(Linearized(model))
    change = torch.stack(rows) @ torch.cat([p.detach().flatten() for p in linear.delta])
    assert torch.allclose(linear(x), before + change.view_as(before), rtol=1e-12, atol=1e-12)
    linear.zero_offset = True
    with torch.no_grad():
        assert torch.allclose(linear(x), change.view_as(before), rtol=1e-12, atol=1e-12)


def test_a_step_follows_the_kernel(model: nn.Module, x: Tensor) -> None:
    kernel = tl.ntk(model, x, kind="full")
    linear = Linearized(model.train(), zero_offset=True)
    assert [name for name, p in linear.named_parameters() if p.requires_grad] == [
        f"delta.{i}" for i in range(6)
    ]
    pull = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (linear(x) * pull).sum().backward()
    torch.optim.SGD(linear.delta.parameters(), lr=0.1).step()
    expected = -0.1 * torch.einsum("ijcd,jd->ic", kernel, pull)
    assert torch.allclose(linear(x), expected, rtol=1e-9, atol=1e-12)
    assert model.training


def test_it_is_attacked_like_any_network(model: nn.Module, x: Tensor) -> None:
    linear = moved(Linearized(model))
    y = torch.tensor([0, 1, 2, 0, 1])
    x_adv = tl.attacks.PGD(0.1, 0.05, 3)(linear, x, y, generator=tl.generator(0, "test"))
    loss = nn.functional.cross_entropy
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-9
    assert loss(linear(x_adv), y) > loss(linear(x), y)


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(KernelError, match="no parameter"):
        Linearized(nn.Flatten())
