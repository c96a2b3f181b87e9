"""Every route to a Gram, forced, at sizes where products are cut into row blocks, chunks and tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tangentlab.kernels import ntk, plan
from tangentlab.kernels.blocks import Option
from tangentlab.kernels.direct import Direct

from .reference import jacobian, kernel, relative_error


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1)
    return nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)).to(dtype)


def force(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Direct.options

    def forced(block: Direct, *args: Any) -> list[Option]:
        listed = options(block, *args)
        return [option for option in listed if option.route == route] or listed

    monkeypatch.setattr(Direct, "options", forced)


@pytest.mark.parametrize("n", [1, 13, 33, 67])
@pytest.mark.parametrize("route", ["ghost", "mixed", "patches", "kept patches", "convolution", "grouped"])
def test_a_route_gives_the_jacobians_product(route: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    single = route in ("convolution", "grouped")  # the library's own gradients are taken in float32 only
    model, generator = network(torch.float32 if single else torch.float64), torch.Generator().manual_seed(1)
    x, x2 = (torch.randn(k, 3, 6, 6, generator=generator, dtype=model[0].weight.dtype) for k in (n, 7))
    exact = network(torch.float32).double() if single else model
    J, J2 = jacobian(exact, x.double()), jacobian(exact, x2.double())
    force(route, monkeypatch)
    for kind in ("full", "class"):
        if route not in ("mixed", "kept patches") or kind == ("full" if route == "mixed" else "class"):
            assert route in {layer.route for layer in plan(model, x, kind=kind).layers}
        for memory in ("2GiB", "20MiB" if n > 40 else "4MiB"):
            K = ntk(model, x, kind=kind, memory=memory)
            assert relative_error(K.double(), kernel(J, J, kind)) < (2e-6 if single else 1e-14)
        K = ntk(model, x, x2, kind=kind)
        assert relative_error(K.double(), kernel(J, J2, kind)) < (2e-6 if single else 1e-14)
