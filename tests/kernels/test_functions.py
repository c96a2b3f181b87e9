"""Forwards with changes in place, arguments by keyword, derivatives of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangentlab.kernels import ntk

from .checks import Function, dense, error, normal, right, right_or_refused, seeded, weight
from .reference import jacobian, kernel, relative_error
from .zoo import Made


def slice_added(s: Any, x: Tensor) -> Tensor:
    h = x.sum(1).clone()
    h[:, :2].add_(s.p)
    return h.tanh()


def slice_assigned(s: Any, x: Tensor) -> Tensor:
    h = x.sum(1).clone()
    h[:, :2] = x[:, 0, :2] * s.p
    return h.tanh()


def slice_increased(s: Any, x: Tensor) -> Tensor:
    h = x.sum(1).clone()
    h[:, :2] += s.p
    return h.tanh() @ s.w[:, :2]


def slices_of_a_layer(s: Any, x: Tensor) -> Tensor:
    h = F.linear(x.sum(1), s.w)
    h[:, 0].add_(s.p[0])
    h[:, 1:3].add_(s.p)
    return h.tanh()


def zeros_filled(s: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 6)
    h[:] = F.linear(x.sum(1), s.w)
    h += s.b
    return h.tanh()


def multiplied(s: Any, x: Tensor) -> Tensor:
    return x.sum(1).mul_(s.b).tanh_()


def added_and_bent(s: Any, x: Tensor) -> Tensor:
    return x.sum(1).add_(s.b).relu_()


def example_by_example(s: Any, x: Tensor) -> Tensor:
    h = x.sum(1).clone()
    for i in range(len(h)):
        h[i].add_(s.b)
    return h.tanh()


def through_out(s: Any, x: Tensor) -> Tensor:
    h = F.linear(x.sum(1), s.w)
    h.unbind(1)[0].shape  # noqa: B018
    h.transpose(0, 1)[0].add_(s.p[0])
    return h.view(-1).view_as(h).add_(s.b).tanh()


IN_PLACE = [
    slice_added,
    slice_assigned,
    slice_increased,
    slices_of_a_layer,
    zeros_filled,
    multiplied,
    added_and_bent,
    example_by_example,
    through_out,
]


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__.replace("_", " "))
def test_changes_in_place(function: Function) -> None:
    def make() -> nn.Module:
        return Made(function, p=weight(2), w=weight(6, 6), b=weight(6))

    right_or_refused(make(), normal(5, 4, 6), names="parameter '")
    right_or_refused(make(), normal(1, 4, 6), normal(3, 4, 6, seed=1), names="parameter '")


KEYWORDS: dict[str, Function] = {
    "matmul": lambda s, x: torch.matmul(input=x, other=s.w),
    "matmul, other": lambda s, x: torch.matmul(x, other=s.w),
    "matmul, weight on the left": lambda s, x: torch.matmul(input=s.w, other=x.T).T,
    "method matmul": lambda s, x: x.matmul(other=s.w),
    "operator": lambda s, x: x @ s.w,
    "mm": lambda s, x: torch.mm(x, mat2=s.w),
    "mm, all": lambda s, x: torch.mm(input=x, mat2=s.w),
    "method mm": lambda s, x: x.mm(mat2=s.w),
    "addmm": lambda s, x: torch.addmm(s.b, x, mat2=s.w),
    "addmm, two": lambda s, x: torch.addmm(s.b, mat1=x, mat2=s.w),
    "addmm, all": lambda s, x: torch.addmm(input=s.b, mat1=x, mat2=s.w),
    "addmm, scaled": lambda s, x: torch.addmm(input=s.b, mat1=x, mat2=s.w, beta=2, alpha=0.5),
    "method addmm": lambda s, x: s.b.addmm(mat1=x, mat2=s.w),
    "linear": lambda s, x: F.linear(input=x, weight=s.w, bias=s.b),
    "linear, weight first": lambda s, x: F.linear(weight=s.w, input=x),
    "linear, bias": lambda s, x: F.linear(x, s.w, bias=s.b),
    "conv2d": lambda s, x: F.conv2d(input=s.image(x), weight=s.k, bias=s.c).flatten(1),
    "conv2d, settings": lambda s, x: F.conv2d(
        s.image(x), weight=s.k, stride=(2, 1), padding=(1, 0), dilation=1, groups=1
    ).flatten(1),
    "conv2d, valid": lambda s, x: F.conv2d(input=s.image(x), weight=s.k, padding="valid").flatten(1),
    "conv2d, same": lambda s, x: F.conv2d(bias=s.c, input=s.image(x), weight=s.k, padding="same").flatten(1),
    "conv2d, groups": lambda s, x: F.conv2d(
        weight=s.k, input=s.image(x).repeat(1, 2, 1, 1), groups=2
    ).flatten(1),
    "conv_transpose2d": lambda s, x: F.conv_transpose2d(
        input=s.image(x).repeat(1, 2, 1, 1), weight=s.k, output_padding=1, stride=2
    ).flatten(1),
    "add": lambda s, x: torch.add(input=x, other=s.b),
    "add, alpha": lambda s, x: torch.add(x, s.b, alpha=3),
    "mul": lambda s, x: torch.mul(other=x, input=s.b),
    "expand": lambda s, x: s.b.expand(size=(len(x), 6)) * x,
    "expand_as": lambda s, x: s.b.expand_as(other=x) * x,
    "embedding": lambda s, x: F.embedding(input=(x > 0).long(), weight=s.w, padding_idx=1).sum(1),
    "layer norm": lambda s, x: F.layer_norm(input=x, normalized_shape=(6,), weight=s.b, bias=s.b, eps=0.1),
    "batch norm": lambda s, x: F.batch_norm(
        input=x, running_mean=x.new_ones(6), running_var=x.new_full((6,), 2.0), weight=s.b, bias=s.b, eps=0.1
    ),
    "group norm": lambda s, x: F.group_norm(input=x, num_groups=2, weight=s.b, bias=s.b, eps=0.1),
    "prelu": lambda s, x: F.prelu(input=x, weight=s.b),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_arguments_by_keyword(name: str) -> None:
    function = KEYWORDS[name]
    model = Made(
        lambda s, x: torch.tanh(function(s, x)),
        w=weight(6, 6),
        b=weight(6),
        k=weight(2, 1, 2, 3),
        c=weight(2),
    )
    model.image = lambda x: x.view(-1, 1, 2, 3)
    if "," in name or "conv" in name:
        model.image = lambda x: torch.cat([x, x.flip(1), x * x], 1).view(-1, 1, 3, 6)
    right(model, normal(5, 6))
    assert error(model, normal(1, 6), normal(4, 6, seed=1)) < 1e-10


def slope_by_autograd(s: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    energy = s.head(torch.tanh(s.linear(x))).sum()
    return torch.autograd.grad(energy, x, create_graph=True)[0]


def slope_beside_the_value(s: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    value = s.head(torch.tanh(s.linear(x)))
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return value + slope.pow(2).sum(1, keepdim=True)


def slope_by_func(s: Any, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: s.head(torch.tanh(s.linear(x))).sum())(x)


def slope_by_func_of_each(s: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda one: s.head(torch.tanh(s.linear(one))).sum()))(x)


def jacobian_by_func(s: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(lambda one: s.head(torch.tanh(s.linear(one)))))(x).flatten(1)


def pushed_by_func(s: Any, x: Tensor) -> Tensor:
    return torch.func.jvp(lambda x: s.head(torch.tanh(s.linear(x))), (x,), (torch.ones_like(x),))[1]


def step_in_the_forward(s: Any, x: Tensor) -> Tensor:
    """One step of descent on the input, as in meta-learning."""
    for _ in range(2):
        x = x - 0.1 * slope_by_autograd(s, x)
    return s.head(torch.tanh(s.linear(x)))


DERIVATIVES = [
    slope_by_autograd,
    slope_beside_the_value,
    slope_by_func,
    slope_by_func_of_each,
    jacobian_by_func,
    pushed_by_func,
    step_in_the_forward,
]


@pytest.mark.parametrize("function", DERIVATIVES, ids=lambda f: f.__name__.replace("_", " "))
def test_derivatives_in_the_forward(function: Function) -> None:
    make = dense(function)
    right_or_refused(seeded(make), normal(5, 6), names="parameter")
    with torch.no_grad():
        K = ntk(seeded(make), normal(1, 6), normal(4, 6, seed=1))
    J, J2 = jacobian(seeded(make), normal(1, 6)), jacobian(seeded(make), normal(4, 6, seed=1))
    assert relative_error(K, kernel(J, J2, "trace")) < 1e-10
