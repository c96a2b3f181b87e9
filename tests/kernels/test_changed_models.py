"""Models that change after a first call: nothing that was found out before is believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tangentlab.errors import KernelError
from tangentlab.kernels import ntk, plan

from .checks import TWO, Function, dense, normal, right, right_or_refused, seeded, weight
from .reference import KINDS
from .zoo import build, examples


class Switched(nn.Module):
    """What its forward does is told by attributes."""

    def __init__(self, **switches: Any) -> None:
        super().__init__()
        self.linear, self.scale, self.head = nn.Linear(6, 4), weight(4), nn.Linear(4, 2)
        self.dropped, self.noisy, self.centred, self.layout, self.wide = False, False, False, "n", False
        vars(self).update(switches)

    def forward(self, x: Tensor) -> Tensor:
        n, T, D = x.shape
        if self.layout == "wrong":
            h = torch.relu(self.linear(x.transpose(0, 1).reshape(T * n, D))).view(n, T, 4).mean(1)
        elif self.layout == "t":
            h = torch.relu(self.linear(x.transpose(0, 1).reshape(T * n, D))).view(T, n, 4).mean(0)
        else:
            h = torch.relu(self.linear(x)).mean(1)
        if self.dropped:
            h = F.dropout(h, 0.5, training=True)
        if self.noisy:
            h = h * (1 + 0.1 * torch.randn_like(h))
        if self.centred:
            h = h - h.mean(0)
        return self.head((h + h.roll(1, 1) * self.scale if self.wide else h) * self.scale)


RANDOM, MIXES = "draws random numbers", "mixes examples"


@pytest.mark.parametrize("check", [True, False], ids=["checked", "not checked"])
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("dropped", True, RANDOM),
        ("noisy", True, RANDOM),
        ("centred", True, MIXES),
        ("layout", "wrong", MIXES),
        ("layout", "t", None),
        ("wide", True, None),
    ],
    ids=["dropout", "noise", "mixing", "wrong layout", "another layout", "another use"],
)
def test_an_attribute_set_after_a_first_call(
    attribute: str, value: Any, message: str | None, check: bool
) -> None:
    model, x = seeded(Switched), normal(5, 3, 6)
    right(model, x)
    setattr(model, attribute, value)
    if message is None:
        right(model, x, check=check)
    else:
        with pytest.raises(KernelError, match=message):
            ntk(model, x, check=check)
        setattr(model, attribute, vars(Switched())[attribute])
        right(model, x)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda _m, _a, h: h + torch.randn_like(h), RANDOM),
        (lambda _m, _a, h: h - h.mean(0), MIXES),
        (lambda _m, _a, h: h * 3, None),
        (lambda m, _a, h: h + m.bias.exp(), None),
        (lambda m, _a, h: h @ (m.weight @ m.weight.T), None),
    ],
    ids=["noise", "mixing", "scale", "parameter", "weight used again"],
)
@pytest.mark.parametrize("removed", [False, True], ids=["", "and removed again"])
def test_a_hook_added_after_a_first_call(hook: Function, message: str | None, removed: bool) -> None:
    model, x = seeded(Switched), normal(5, 3, 6)
    right(model, x)
    handle = model.linear.register_forward_hook(hook)
    if message is None:
        right(model, x)
    else:
        with pytest.raises(KernelError, match=message):
            ntk(model, x)
    if removed:
        handle.remove()
        right(model, x)


def test_parameters_frozen_and_trained_again() -> None:
    model, x = seeded(Switched), normal(5, 3, 6)
    right(model, x)
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        right(model, x)
        if name != "scale":
            p.requires_grad_(True)
    model.requires_grad_(True)
    right(model, x)


def changed_stride(model: Any) -> None:
    model[0].stride = (1, 1)


def changed_padding(model: Any) -> None:
    model[0].padding_mode, model[0]._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def tied(model: Any) -> None:
    model[8].weight = model[6].weight


def shared_module(model: Any) -> None:
    model[8] = model[6]


def another_forward(model: Any) -> None:
    linear = model[6]
    linear.forward = lambda x: F.linear(x, linear.weight * linear.bias[:, None])


@pytest.mark.parametrize(
    "change",
    [
        changed_stride,
        changed_padding,
        lambda m: setattr(m[1], "eps", 3.0),
        lambda m: m[1].running_mean.add_(1.0),
        lambda m: setattr(m[3], "num_groups", 4),
        lambda m: setattr(m[3], "eps", 1.0),
        lambda m: m.__setitem__(2, nn.Sigmoid()),
        lambda m: m.__setitem__(6, weight_norm(nn.Linear(8, 8).double())),
        lambda m: m[6].weight.data.mul_(2),
        tied,
        shared_module,
        another_forward,
        lambda m: m.append(seeded(lambda: nn.Linear(2, 3))),
    ],
    ids=[
        "stride",
        "padding mode",
        "eps of a batchnorm",
        "running mean",
        "groups",
        "eps of a group norm",
        "another activation",
        "weight norm",
        "values",
        "weights tied",
        "one module twice",
        "forward on the instance",
        "one more layer",
    ],
)
def test_a_module_changed_after_a_first_call(change: Callable[[Any], object]) -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.GroupNorm(2, 8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 8),
            nn.Tanh(),
            nn.Linear(8, 8),
            nn.Linear(8, 2),
        )
    )
    x = normal(4, 3, 6, 6)
    ntk(model, x)
    change(model)
    right(model, x)


def bent(model: Any, x: Tensor) -> Tensor:
    """Time first; examples of small numbers do not come over the bend, and get no gradient."""
    n, T, D = x.shape
    h = torch.relu(model.linear(x.transpose(0, 1).reshape(T * n, D)) - 0.5).view(T, n, -1).mean(0)
    return model.head(h)


def bent_sites(model: Any, x: Tensor) -> Tensor:
    """The weight is used once more, where only some examples come."""
    h = torch.relu(model.linear(x)) + torch.relu(x @ model.linear.weight.T.exp() - 5)
    return model.head(h)


DEAD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "time first": (dense(bent), (5, 6)),
    "weight used again": (dense(bent_sites), (6,)),
    **{
        name: (lambda name=name: build(name), tuple(examples(name, 1).shape[1:]))
        for name in ("dead functional use", "attention", "sequence first")
    },
}


def small(x: Tensor) -> Tensor:
    return 1e-2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)


DULL = [torch.zeros_like, lambda x: torch.full_like(x, -1e3), small, lambda x: x[:1].expand_as(x)]


@pytest.mark.parametrize("name", DEAD)
@pytest.mark.parametrize("dull", DULL, ids=["zeros", "saturated", "small numbers", "equal examples"])
def test_a_first_call_on_special_data_then_real_data(name: str, dull: Function) -> None:
    make, shape = DEAD[name]
    model, x = seeded(make), normal(5, *shape)
    for kind in TWO:
        ntk(model, dull(x), kind=kind)
    right(model, x)


@pytest.mark.parametrize("name", DEAD)
@pytest.mark.parametrize("dull", DULL, ids=["zeros", "saturated", "small numbers", "equal examples"])
def test_special_examples_before_real_ones(name: str, dull: Function) -> None:
    """Refused only where a self-check says so."""
    make, shape = DEAD[name]
    x = torch.cat([dull(normal(70, *shape, seed=1)), normal(5, *shape)])
    right_or_refused(seeded(make), x, names="self-check")


class Noted(nn.Module):
    """Its forward leaves something on it."""

    def __init__(self, note: Function) -> None:
        super().__init__()
        self.linear, self.head, self.calls, self.note = nn.Linear(6, 4), nn.Linear(4, 2), 0, note
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x))
        self.note(self, h)
        return self.head(h)


@pytest.mark.parametrize(
    "note",
    [
        lambda m, _h: setattr(m, "calls", m.calls + 1),
        lambda m, h: setattr(m, "last", h.shape),
        lambda m, h: setattr(m, "last", (h, h * 2)),
        lambda m, h: setattr(m, "last", float(h.sum())),
        lambda m, _h: setattr(m, "calls", m.calls + 1) if m.calls < 3 else None,
    ],
    ids=["calls counted", "shape", "tuple of tensors", "mean", "only three times"],
)
def test_plain_attributes_that_a_forward_sets(note: Function) -> None:
    model, x = seeded(lambda: Noted(note)), normal(5, 6)
    for kind in KINDS:
        ntk(model, x, kind=kind)
    ntk(model, x, plan=plan(model, x))
    assert (model.calls, model.last) == (0, None)
    right(model, x)
    right(model, x, normal(3, 6, seed=1))
