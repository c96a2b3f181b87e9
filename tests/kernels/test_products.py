"""The products that everything else is made of, against float64, on both sides of every threshold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tangentlab.kernels.linear import linear
from tangentlab.kernels.products import formed, lower_blocks, one_by_one
from tangentlab.kernels.uses import Convolution

from .reference import relative_error


@pytest.mark.parametrize("T", [5, 40])
@pytest.mark.parametrize("size", [30, 500])
@pytest.mark.parametrize("layout", ["plain", "turned", "expanded"])
def test_gradients_are_formed_example_by_example_or_at_once(size: int, T: int, layout: str) -> None:
    torch.manual_seed(0)
    d, a = torch.randn(3, size, T), torch.randn(3, 2 * size, T)
    if layout == "turned":
        d, a = d.transpose(1, 2).contiguous().transpose(1, 2), a.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        d, a = d[:, :1].expand_as(d), a[:, :1].expand_as(a)
    out = torch.empty(3, size, 2 * size)
    formed(d, a, out)
    assert relative_error(out.double(), d.double() @ a.double().transpose(1, 2)) < 1e-6
    assert one_by_one(size, T, 2 * size) == (size == 500 and T == 40)


@pytest.mark.parametrize("shape", [(7, 6), (3, 4, 6)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_has_the_gradients_of_torchs(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    child = nn.Linear(6, 5, bias=biased)
    x = torch.randn(*shape, requires_grad=True)
    d = torch.randn(*shape[:-1], 5)
    wanted = [x, *child.parameters()]

    def gradients(y: torch.Tensor) -> list[torch.Tensor]:
        first = torch.autograd.grad(y, wanted, d, create_graph=True)
        energy = first[0].square().sum()
        return [*first, torch.autograd.grad(energy, child.weight)[0], *torch.autograd.grad(y, x, d)]

    ours = gradients(linear(x, child.weight, child.bias))
    torchs = gradients(F.linear(x, child.weight, child.bias))
    for one, other in zip(ours, torchs, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (2, 2, 0, 1), (3, 1, 2, 3)]
)
def test_patches_are_what_the_weight_meets(
    dims: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    torch.manual_seed(0)
    make = nn.Conv1d if dims == 1 else nn.Conv2d
    layer = make(3, 4, kernel, stride, padding, dilation, bias=False).double()
    x = torch.randn(5, 3, *[9, 8][:dims], dtype=torch.float64)
    y = layer(x)
    settings = [[value] * dims for value in (stride, padding, dilation)]
    use = Convolution(x, {"weight": layer.weight}, layer.weight.shape, *settings, 1, None)
    patches = use.patches(5, slice(1, 4), torch.float64)
    expected = y[1:4].flatten(2)
    assert torch.allclose(layer.weight.flatten(1) @ patches, expected)
    # Vectors have an order of their own: their inner products are the patches'.
    vectors = use.vectors(5, slice(1, 4), torch.float64)
    assert vectors.is_contiguous()
    assert torch.allclose(vectors @ vectors.transpose(1, 2), patches.transpose(1, 2) @ patches)


@pytest.mark.parametrize(("n", "each"), [(1, 1), (3, 100), (64, 1), (65, 1), (130, 1), (37, 10)])
def test_blocks_cover_the_lower_triangle_once(n: int, each: int) -> None:
    seen = torch.zeros(n, n)
    for rows, columns in lower_blocks(n, each):
        seen[rows, columns] += 1
    assert (seen.tril() == torch.ones(n, n).tril()).all()
    assert seen.max() == 1
