"""Precisions, and what a parent's forward does around its children."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tangentlab.errors import KernelError
from tangentlab.kernels import ntk

from .checks import Function, normal, right, seeded, weight
from .reference import KINDS, jacobian, kernel, relative_error
from .zoo import Made


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(1500, 2000), nn.Tanh(), nn.Linear(2000, 1)), (1500,)),
        (lambda: nn.Sequential(weight_norm(nn.Linear(1500, 2000)), nn.Tanh(), nn.Linear(2000, 1)), (1500,)),
        (lambda: Made(lambda s, x: (x * s.w).tanh().sum((1, 2))[:, None], w=weight(1500, 2000)), (1, 1)),
        (
            lambda: nn.Sequential(nn.Conv1d(300, 1000, 10), nn.Tanh(), nn.Flatten(), nn.Linear(3000, 1)),
            (300, 12),
        ),
    ],
    ids=["linear", "weight norm", "scale", "convolution"],
)
def test_float32_sums_over_long_gradients(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model, x = seeded(make), normal(2, *shape)
    J = jacobian(model, x)
    assert J.shape[2] > 2.5e6
    K = ntk(model.float(), x.float())
    assert relative_error(K.double(), kernel(J, J, "trace")) < 1e-5


@pytest.mark.parametrize(("kind", "seed"), [("full", 0), ("class", 1)])
def test_a_large_float32_network_passes_the_check(kind: str, seed: int) -> None:
    """Signs of a few of the many ReLUs' inputs change with the order of a sum."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3072, 2700), nn.ReLU(), nn.Linear(2700, 4))
    x = normal(6, 3072, seed=seed)
    K = ntk(model, x.float(), kind=kind).double()
    W, b, V = (p.detach().double() for p in (model[0].weight, model[0].bias, model[2].weight))
    h = x.float().double() @ W.T + b
    pulled = V * (h > 0)[:, None].double()  # [n, C, width]
    full = torch.einsum("ick,jdk->ijcd", pulled, pulled) * (x @ x.T + 1)[:, :, None, None]
    full += (h.relu() @ h.relu().T + 1)[:, :, None, None] * torch.eye(4, dtype=torch.float64)
    expected = full if kind == "full" else full.diagonal(dim1=2, dim2=3).permute(2, 0, 1)
    assert relative_error(K, expected) < 1e-4


class TwoTypes(nn.Module):
    def __init__(self, body: torch.dtype, head: torch.dtype) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5).to(body), nn.Linear(5, 3).to(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.to(self.body.weight.dtype))).to(self.head.weight.dtype))


@pytest.mark.parametrize(
    ("body", "head", "tolerance"),
    [
        (torch.float32, torch.float64, 1e-5),
        (torch.float64, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 5e-2),
        (torch.float32, torch.bfloat16, 5e-2),
        (torch.bfloat16, torch.float64, 5e-2),
    ],
    ids=["float32, float64", "float64, float32", "bf16, float32", "float32, bf16", "bf16, float64"],
)
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["", "float64 sums"])
def test_a_body_and_a_head_of_two_types(
    body: torch.dtype, head: torch.dtype, tolerance: float, dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    model, x = TwoTypes(body, head), normal(5, 6)
    exact = TwoTypes(torch.float64, torch.float64)
    exact.load_state_dict(model.state_dict())
    J = jacobian(exact, x)
    for kind in KINDS:
        K = ntk(model, x, kind=kind, dtype=dtype)
        assert relative_error(K.double(), kernel(J, J, kind)) < tolerance


class Autocast(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child, self.head = child, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.head(torch.relu(self.child(x)))
        return h.float()


@pytest.mark.parametrize(
    "child",
    [lambda: nn.Linear(6, 5), lambda: weight_norm(nn.Linear(6, 5)), lambda: Contracted(None)],
    ids=["linear", "weight norm", "einsum"],
)
def test_autocast_inside_the_forward(child: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Autocast(child()).float(), normal(5, 6).float()
    J = jacobian(copy.deepcopy(model), x)
    for kind in KINDS:
        try:
            K = ntk(model, x, kind=kind)
        except KernelError as refusal:  # its rounding depends on the batch
            assert re.search("(parameter|module) '", str(refusal))  # noqa: PT017
        else:
            assert relative_error(K, kernel(J, J, kind)) < 3e-2


class Contracted(nn.Module):
    """Has no rule, and reads what its parent has put there."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.w, self.mask = nn.Parameter(torch.randn(6, 5)), mask

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("nd,dk->nk", x, self.w)
        return h if self.mask is None else h * self.mask


def masked_by_example(model: Any, x: Tensor) -> Tensor:
    model.child.mask = (x[:, :5] > 0).to(x.dtype) + 0.5
    return model.head(torch.tanh(model.child(x)))


def masked_by_call(model: Any, x: Tensor) -> Tensor:
    model.child.mask = x.new_ones(1)
    h = model.child(x)
    model.child.mask = x.new_full((1,), 2.0)
    return model.head(torch.tanh(h + model.child(x.flip(1))))


def masked_by_batch(model: Any, x: Tensor) -> Tensor:
    model.child.mask = (1 + torch.arange(len(x), dtype=x.dtype))[:, None]
    return model.head(torch.tanh(model.child(x)))


@pytest.mark.parametrize(
    "function", [masked_by_example, masked_by_call], ids=["for each example", "for each call"]
)
def test_a_parent_that_sets_its_childs_attribute(function: Function) -> None:
    def make() -> nn.Module:
        return Made(function, child=Contracted(None), head=nn.Linear(5, 3))

    for x, x2 in ((normal(5, 6), None), (normal(1, 6), normal(4, 6, seed=1)), (normal(6, 6), normal(2, 6))):
        model = seeded(make)
        ntk(model, x, x2)
        assert model.child.mask is None
        right(model, x, x2)


def test_a_parent_that_tells_its_child_the_place_in_the_batch() -> None:
    model = seeded(lambda: Made(masked_by_batch, child=Contracted(None), head=nn.Linear(5, 3)))
    with pytest.raises(KernelError, match="mixes examples"):
        ntk(model, normal(5, 6))
