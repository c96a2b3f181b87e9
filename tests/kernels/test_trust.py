"""What the engine checks before it is trusted: the right kernel, or an error that names what is wrong.

The right one is plain autograd of each example alone. Faults are put into the engine to see them found.
"""

from __future__ import annotations

import copy
import importlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tangentlab.errors import ConfigError, KernelError
from tangentlab.kernels import blocks, direct, ntk, plan, planning, replay, uses

from .reference import Inputs, jacobian, kernel, relative_error
from .zoo import Made, build, examples

KINDS = ("full", "class", "trace", "pseudo")
TWO = ("full", "trace")

engine = importlib.import_module("tangentlab.kernels.ntk")  # the function hides its module

Function = Callable[..., Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(*shape: int, seed: int = 7) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=seed))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make().double()


def error(model: nn.Module, x: Inputs, x2: Inputs | None = None, kind: str = "trace", **words: Any) -> float:
    """The kernel's distance from that of the examples alone, in float64."""
    K = ntk(model, x, x2, kind=kind, **words)
    J = jacobian(model, x)
    return relative_error(K, kernel(J, J if x2 is None else jacobian(model, x2), kind))


def right_or_refused(
    model: nn.Module, x: Inputs, x2: Inputs | None = None, names: str = "mixes examples", **words: Any
) -> None:
    """The right kernel, or an error that says ``names``; nothing else."""
    found: dict[str, Tensor] = {}
    for kind in TWO:
        try:
            found[kind] = ntk(model, x, x2, kind=kind, **words)
        except KernelError as refusal:
            assert re.search(names, str(refusal))  # noqa: PT017
            assert len(str(refusal).splitlines()) == 1  # noqa: PT017
    if found:
        J = jacobian(model, x)
        J2 = J if x2 is None else jacobian(model, x2)
        for kind, K in found.items():
            assert relative_error(K, kernel(J, J2, kind)) < 1e-10


def right(model: nn.Module, x: Inputs, x2: Inputs | None = None, **words: Any) -> None:
    J = jacobian(model, x)
    J2 = J if x2 is None else jacobian(model, x2)
    for kind in TWO:
        assert relative_error(ntk(model, x, x2, kind=kind, **words), kernel(J, J2, kind)) < 1e-10


# Models that mix examples.


class Centred(nn.Module):
    """Without the mean of the batch, a module of its own."""

    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class AttentionOverTheBatch(nn.Module):
    """batch_first is forgotten: the examples attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].tanh().mean(1))


def time_major(model: Any, x: Tensor) -> Tensor:
    """All positions at once, time first; right."""
    n, T, D = x.shape
    return model.head(torch.relu(model.linear(x.transpose(0, 1).reshape(T * n, D))).view(T, n, -1).mean(0))


def pooled_over_the_wrong_axis(model: Any, x: Tensor) -> Tensor:
    """Time first, then read as if the examples were."""
    n, T, D = x.shape
    return model.head(torch.relu(model.linear(x.transpose(0, 1).reshape(T * n, D))).view(n, T, -1).mean(1))


def capacity(model: Any, x: Tensor) -> Tensor:
    """An expert that takes the first two examples that come to it."""
    chosen = x[:, 0].abs() > 0
    taken = chosen & (chosen.long().cumsum(0) <= 2)
    return model.head(torch.tanh(model.linear(x)) * taken[:, None])


def first_four(model: Any, x: Tensor) -> Tensor:
    return model.head(torch.tanh(model.linear(x)) * (torch.arange(len(x)) < 4)[:, None])


def dense(function: Function, width: int = 6) -> Callable[[], nn.Module]:
    return lambda: Made(function, linear=nn.Linear(width, 4), head=nn.Linear(4, 2))


MIXING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mean of the batch": (
        lambda: nn.Sequential(nn.Linear(6, 4), Centred(), nn.ReLU(), nn.Linear(4, 2)),
        (6,),
    ),
    "mean of the batch beside the input": (
        dense(lambda s, x: s.head(torch.relu(s.linear(x) - s.linear(x).mean(0)) + x.sum(1, keepdim=True))),
        (6,),
    ),
    "attention, batch_first forgotten": (AttentionOverTheBatch, (4, 6)),
    "pooled over the wrong axis": (dense(pooled_over_the_wrong_axis), (5, 6)),
    "rolled over the batch by one": (dense(lambda s, x: s.head(torch.tanh(s.linear(x.roll(1, 0))))), (6,)),
    "scale of the largest": (
        dense(lambda s, x: s.head(torch.tanh(s.linear(x)) * x.abs().amax().ceil())),
        (6,),
    ),
    "softmax over the batch": (dense(lambda s, x: s.head(s.linear(x).softmax(0))), (6,)),
}
LATER: dict[str, Function] = {
    "rolled by two": lambda s, x: s.head(torch.tanh(s.linear(x.roll(2, 0)))),
    "an expert's capacity": capacity,
    "a batch's capacity": first_four,
    "neighbours beyond the second": lambda s, x: (
        s.head(torch.tanh(s.linear(x))) * (1 + (torch.arange(len(x)) // 2)[:, None])
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused(name: str) -> None:
    make, shape = MIXING[name]
    for kind in KINDS:
        with pytest.raises(KernelError, match=r"(module '[^']+'|the model) \(\w+\) mixes examples"):
            ntk(seeded(make), normal(5, *shape), kind=kind)


def test_the_mixing_module_is_named() -> None:
    with pytest.raises(KernelError, match=r"module '1' \(Centred\) mixes examples"):
        ntk(seeded(MIXING["mean of the batch"][0]), normal(5, 6))


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("n", [1, 2])
def test_few_examples_against_others_when_the_model_mixes(name: str, n: int) -> None:
    make, shape = MIXING[name]
    right_or_refused(seeded(make), normal(n, *shape), normal(5, *shape, seed=1))
    right_or_refused(seeded(make), normal(5, *shape, seed=1), normal(n, *shape))


@pytest.mark.parametrize("name", MIXING)
def test_a_single_example_is_not_mixed(name: str) -> None:
    make, shape = MIXING[name]
    right_or_refused(seeded(make), normal(1, *shape))


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize(
    "special",
    [
        lambda x: torch.cat([x[:1], x]),
        lambda x: torch.cat([x[:1].expand_as(x), x]),
        lambda x: torch.cat([torch.zeros_like(x[:2]), x]),
        lambda x: torch.cat([x[:2], x[:2], x]),
        lambda x: torch.cat([torch.full_like(x[:2], 1e-9), x]),
    ],
    ids=["first two equal", "first five equal", "first two zero", "first two twice", "first two tiny"],
)
def test_special_first_examples_do_not_hide_mixing(name: str, special: Callable[[Tensor], Tensor]) -> None:
    make, shape = MIXING[name]
    with pytest.raises(KernelError, match="mixes examples"):
        ntk(seeded(make), special(normal(5, *shape)))


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("first", ["zeros", "equal examples"])
def test_mixing_after_a_first_call_that_could_not_show_it(name: str, first: str) -> None:
    make, shape = MIXING[name]
    model, x = seeded(make), normal(5, *shape)
    warm = torch.zeros_like(x) if first == "zeros" else x[:1].expand_as(x)
    right_or_refused(model, warm)
    for kind in TWO:
        with pytest.raises(KernelError, match="mixes examples"):
            ntk(model, x, kind=kind)


@pytest.mark.parametrize("name", LATER)
def test_mixing_that_two_examples_do_not_show(name: str) -> None:
    model = seeded(dense(LATER[name]))
    for x, x2 in ((normal(8, 6), None), (normal(6, 6), normal(5, 6, seed=1)), (normal(1, 6), normal(7, 6))):
        right_or_refused(model, x, x2)
    with pytest.raises(KernelError, match="mixes examples"):
        ntk(model, normal(8, 6))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("zero", [0, 2], ids=["", "first two zero"])
def test_time_first_is_right(n: int, zero: int) -> None:
    x = normal(n, 5, 6)
    x[:zero] = 0
    right(seeded(dense(time_major)), x)
    right(seeded(dense(time_major)), x, normal(5, 5, 6, seed=1))


class Encoder(nn.Module):
    """The layers take another path where a mask is given and no gradient is asked of them."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2).requires_grad_(not frozen)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("masked", [[2, 3], [1], [0, 1, 2, 3]], ids=str)
def test_padding_masks_of_an_encoder(frozen: bool, masked: list[int]) -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[masked, 2:] = True
    x = {"x": normal(4, 4, 6), "mask": mask}
    other = {"x": normal(3, 4, 6, seed=1), "mask": mask[1:]}
    for second in (None, other):
        right_or_refused(seeded(lambda: Encoder(frozen=frozen)), x, second, names="encoder|self-check")


# Models that change after a first call.


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


# Plans.


def perceptron(width: int = 5, outputs: int = 3, inputs: int = 6) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)))


def frozen_first() -> nn.Module:
    model = perceptron()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    "made",
    [
        lambda x: plan(perceptron(7), x),
        lambda x: plan(perceptron(outputs=4), x),
        lambda x: plan(perceptron(inputs=8), normal(4, 8)),
        lambda x: plan(nn.Sequential(nn.Linear(6, 3)).double(), x),
        lambda x: plan(nn.Sequential(*perceptron(), nn.Linear(3, 3).double()), x),
        lambda x: plan(frozen_first(), x),
        lambda x: plan(build("conv 1d"), examples("conv 1d", 4)),
        lambda _: plan(perceptron(), normal(5, 6)),
        lambda _: plan(perceptron(), normal(4, 2, 6).flatten(0, 1)),
        lambda x: plan(perceptron(), x, normal(4, 6)),
        lambda x: plan(perceptron(), x, kind="full"),
        lambda x: plan(perceptron(), x, dtype=torch.float32),
        lambda x: plan(perceptron(), x, dtype=torch.float32, products="bf16"),
        lambda x: plan(perceptron().float(), x.float()),
        lambda x: plan(perceptron(), x, batchnorm="batch"),
        lambda x: plan(perceptron(), x, batchnorm=("running", "batch")),
        lambda x: str(plan(perceptron(), x)),
        lambda _: "fast",
        lambda _: {"tile": 3},
        lambda _: True,
    ],
    ids=[
        "another width",
        "another number of outputs",
        "another number of inputs",
        "fewer layers",
        "more layers",
        "fewer parameters that train",
        "another model",
        "more examples",
        "twice the examples",
        "two inputs",
        "another kind",
        "another dtype",
        "other products",
        "a model in float32",
        "batch statistics",
        "mixed statistics",
        "a plan's text",
        "a word",
        "a dict",
        "True",
    ],
)
def test_the_plan_of_another_kernel(made: Function) -> None:
    x = normal(4, 6)
    with pytest.raises(ConfigError, match="plan") as caught:
        ntk(perceptron(), x, plan=made(x))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("batchnorm", ["batch", ("running", "batch")], ids=["batch", "mixed"])
@pytest.mark.parametrize("made_for", ["running", "batch"])
def test_a_plan_beside_batch_statistics(batchnorm: Any, made_for: str) -> None:
    model, x = perceptron(), normal(4, 6)
    with pytest.raises(ConfigError, match="plan") as caught:
        ntk(model, x, batchnorm=batchnorm, plan=plan(model, x, batchnorm=made_for))
    assert len(str(caught.value).splitlines()) == 1


def test_a_plan_of_the_same_kernel() -> None:
    model, x = perceptron(), normal(4, 6)
    made = plan(model, x)
    assert error(model, x, plan=made) < 1e-10
    assert error(model, normal(4, 6, seed=1), plan=made) < 1e-10
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    with pytest.raises(ConfigError, match="plan was made for another model"):
        ntk(model, x, plan=made)


class Routed(nn.Module):
    """Which parameters act depends on the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(6, 4) for _ in range(3)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
        h = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            mine = (chosen == i).nonzero().flatten()
            if len(mine):
                h = h.index_put((mine,), torch.tanh(expert(x[mine])))
        return self.head(h)


@pytest.mark.parametrize(
    "first",
    [[2.0, 2.0], [-1.0, 2.0], [0.5, -1.0], [-1.0, -1.0]],
    ids=["both to the last", "to the first and the last", "to the middle and the first", "both to the first"],
)
@pytest.mark.parametrize("warmed", [False, True], ids=["", "after a first call"])
def test_plans_where_the_examples_choose_the_parameters(first: list[float], warmed: bool) -> None:
    model, x = seeded(Routed), normal(7, 6)
    x[:2, 0] = torch.tensor(first)
    if warmed:
        ntk(model, x[:2])
    made = plan(model, x)
    assert "trace kernel of 7" in str(made)
    try:
        assert error(model, x, plan=made) < 1e-10
    except ConfigError as stale:
        assert "make it anew" in str(stale)  # noqa: PT017
    right(model, x)
    assert error(model, x.flip(0), x[2:]) < 1e-10
    assert error(model, x, plan=plan(model, x)) < 1e-10


# float32.


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


# What a parent's forward does around its children.


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


# Functions: changes in place, arguments by keyword, derivatives in the forward.


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


# Faults put into the engine.


def scaled(factor: float) -> Callable[[Function], Function]:
    """The function's result, a tensor, tensors or None, times the factor."""

    def wrap(function: Function) -> Function:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            return times(function(*args, **kwargs), factor)

        return faulty

    return wrap


def times(found: Any, factor: float) -> Any:
    if isinstance(found, Tensor):
        return found * factor
    return None if found is None else [times(part, factor) for part in found]


def called_with(factor: float) -> Callable[[Function], Function]:
    """The function is given its last argument times the factor."""

    def wrap(function: Function) -> Function:
        return lambda *args: function(*args[:-1], args[-1] * factor)

    return wrap


def where_two_sides_meet(factor: float) -> Callable[[Function], Function]:
    def wrap(function: Function) -> Function:
        def faulty(block: Any, tile: Any) -> Any:
            return times(function(block, tile), 1 if tile.split is None else factor)

        return faulty

    return wrap


def from_the_second_set_on(factor: float) -> Callable[[Function], Function]:
    def wrap(function: Function) -> Function:
        def faulty(block: Any, tile: Any) -> Any:
            seen = vars(tile).setdefault("seen", Counter())
            seen[block] += 1
            return times(function(block, tile), 1 if seen[block] == 1 else factor)

        return faulty

    return wrap


def every_pass_twice(_factor: float) -> Callable[[Function], Function]:
    def wrap(function: Function) -> Function:
        return lambda n, m: [passes * 2 for passes in function(n, m)]

    return wrap


class Branch(nn.Module):
    """vmap refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(row, self.w.T) * (2 if float(row.sum()) > 0 else 1) for row in x])


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "positions": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        (4, 6),
    ),
    "few positions": (
        lambda: nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Flatten(), nn.Linear(256, 3)),
        (2, 96),
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)),
        (2, 6, 6),
    ),
    "grouped convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)),
        (2, 6, 6),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)),
        (6,),
    ),
    "batchnorm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
        (6,),
    ),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "branch": (lambda: nn.Sequential(Branch(), nn.Tanh(), nn.Linear(5, 3)), (6,)),
}

# What is made wrong, and a network that comes by there.
FAULTS: dict[str, tuple[Any, str, Callable[[float], Callable[[Function], Function]], str]] = {
    "rule of scales and shifts": (uses.Affine, "gradient", scaled, "layer norm"),
    "rule of batchnorm": (uses.BatchNorm, "gradient", scaled, "batchnorm"),
    "rule of linear layers": (uses.Linear, "gradient", scaled, "linear"),
    "rule of convolutions": (uses.Convolution, "gradient", scaled, "grouped convolution"),
    "inputs of linear layers": (uses.Linear, "patches", scaled, "linear"),
    "cotangents of linear layers": (uses.Linear, "columns", scaled, "positions"),
    "patches of convolutions": (uses.Convolution, "patches", scaled, "convolution"),
    "cotangents of convolutions": (uses.Convolution, "columns", scaled, "convolution"),
    "products": (direct, "outer", scaled, "few positions"),
    "every Gram": (direct.Direct, "gram", scaled, "linear"),
    "inner products kept": (direct.Direct, "_inner", scaled, "few positions"),
    "products of cotangents": (direct.Direct, "_ghost", scaled, "few positions"),
    "Grams where two sides meet": (direct.Direct, "gram", where_two_sides_meet, "linear"),
    "replayed Grams where two sides meet": (blocks.Replayed, "gram", where_two_sides_meet, "weight norm"),
    "Grams from the second set on": (direct.Direct, "gram", from_the_second_set_on, "linear"),
    "replays from the second set on": (blocks.Replayed, "gram", from_the_second_set_on, "weight norm"),
    "the mirrored half": (engine, "mirrored", scaled, "linear"),
    "passes": (planning, "_tilings", every_pass_twice, "linear"),
    "replay": (replay.Replay, "gradient", scaled, "weight norm"),
    "replay of many": (replay.Replay, "_add_together", called_with, "weight norm"),
    "replay one by one": (replay.Replay, "_add_alone", called_with, "branch"),
}
MIRRORED = "the mirrored half"
# What tests of structure see too: another way is taken then, or none is found.
AVOIDABLE = [name for name, (place, *_) in FAULTS.items() if place not in (direct, engine, planning)]
AVOIDABLE = [name for name in AVOIDABLE if FAULTS[name][1] not in ("gram", "_inner", "_ghost")]
RULES = [name for name in FAULTS if name.startswith("rule") or FAULTS[name][2] is called_with]


def found_or_avoided(
    expected: Tensor, model: nn.Module, x: Tensor, x2: Tensor | None, kind: str, *, avoidable: bool
) -> None:
    """Wrong without the check; with it an error, or the right kernel by another way where there is one."""
    assert relative_error(ntk(model, x, x2, kind=kind, check=False), expected) > 1e-5
    try:
        K = ntk(model, x, x2, kind=kind)
    except KernelError as refusal:
        assert re.search("self-check|parameter '", str(refusal))  # noqa: PT017
    else:
        assert avoidable
        assert relative_error(K, expected) < 1e-10


CASES = [(name, False, 1.001) for name in FAULTS if "two sides" not in name]
CASES += [(name, True, 2.0) for name in FAULTS if name != MIRRORED]


@pytest.mark.parametrize(
    ("name", "two", "factor"),
    CASES,
    ids=[f"{name}, {'twice, two inputs' if two else 'a thousandth'}" for name, two, _ in CASES],
)
def test_a_fault_is_found(name: str, two: bool, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    place, attribute, fault, net = FAULTS[name]
    make, shape = NETS[net]
    model, x = seeded(make), normal(6, *shape)
    x2 = normal(4, *shape, seed=1) if two else None
    # Without faults first: the tests of structure would take another way around some of them.
    expected = ntk(model, x, x2, check=False)
    assert error(model, x, x2, check=False) < 1e-10
    monkeypatch.setattr(place, attribute, fault(factor)(getattr(place, attribute)))
    engine._planned.clear()  # a fault of the plan would not be met in one that is kept
    found_or_avoided(expected, model, x, x2, "trace", avoidable=name in AVOIDABLE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rule of linear layers", "every Gram", "replay"])
def test_a_fault_is_found_in_every_kind(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, attribute, fault, net = FAULTS[name]
    make, shape = NETS[net]
    model, x = seeded(make), normal(6, *shape)
    for other in KINDS:
        ntk(model, x, kind=other, check=other != kind)  # all are checked but this
    expected = ntk(model, x, kind=kind, check=False)
    monkeypatch.setattr(place, attribute, fault(1.001)(getattr(place, attribute)))
    found_or_avoided(expected, model, x, None, kind, avoidable=name in AVOIDABLE)


@pytest.mark.parametrize("name", RULES)
def test_a_fault_that_was_there_from_the_beginning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that gives other gradients is not taken at all."""
    place, attribute, fault, net = FAULTS[name]
    make, shape = NETS[net]
    monkeypatch.setattr(place, attribute, fault(1.001)(getattr(place, attribute)))
    right_or_refused(seeded(make), normal(6, *shape), names="parameter '")


def test_a_fault_of_a_tiny_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share is a millionth of the kernel."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
    x = normal(6, 6)
    with torch.no_grad():
        model[0].weight.mul_(1e3)
        model[1].weight.fill_(1.0)
        model[2].weight.mul_(1e-3)
    ntk(model, x, check=False)
    gram = direct.Direct.gram

    def faulty(block: Any, tile: Any) -> Any:
        return times(gram(block, tile), 1.01 if block.names == ["1.weight"] else 1)

    monkeypatch.setattr(direct.Direct, "gram", faulty)
    with pytest.raises(KernelError, match=r"self-check: the share of parameter '1\.weight'"):
        ntk(model, x)


def test_after_a_failed_check_the_engine_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(NETS["linear"][0]), normal(6, 6)
    with monkeypatch.context() as patch:
        patch.setattr(direct.Direct, "gram", scaled(2.0)(direct.Direct.gram))
        for _ in range(2):
            with pytest.raises(KernelError, match="self-check"):
                ntk(model, x)
    right(model, x)


ROUNDED = [
    "conv stride 2 padding 1",
    "conv groups",
    "linear on sequences",
    "batchnorm 2d",
    "layer norm",
    "embedding",
    "attention",
    "lstm",
    "transformer layer",
    "tied embedding",
    "weight norm conv",
]


def in_float32(name: str, n: int) -> tuple[nn.Module, Tensor]:
    x = examples(name, n)
    return build(name).float(), x.float() if x.is_floating_point() else x


@pytest.mark.parametrize("name", ROUNDED)
def test_bf16_products(name: str) -> None:
    J = jacobian(build(name), examples(name, 6))
    model, x = in_float32(name, 6)
    for kind in TWO:
        K = ntk(model, x, kind=kind, products="bf16")
        assert K.dtype == torch.float32
        assert relative_error(K.double(), kernel(J, J, kind)) < 1e-2
    K = ntk(model, x[:4], x[2:], products="bf16")
    assert relative_error(K.double(), kernel(J[:4], J[2:], "trace")) < 1e-2


@pytest.mark.parametrize("name", ROUNDED)
def test_a_tenth_too_much_is_found_in_bf16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = in_float32(name, 6)
    ntk(model, x, check=False, products="bf16")
    for block in (direct.Direct, blocks.Replayed):
        monkeypatch.setattr(block, "gram", scaled(1.1)(block.gram))
    ntk(model, x, check=False, products="bf16")
    with pytest.raises(KernelError, match="self-check"):
        ntk(model, x, products="bf16")


@pytest.mark.parametrize("name", ROUNDED[::2])
def test_a_hundredth_too_much_is_found_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = in_float32(name, 6)
    ntk(model, x, check=False)
    for block in (direct.Direct, blocks.Replayed):
        monkeypatch.setattr(block, "gram", scaled(1.01)(block.gram))
    with pytest.raises(KernelError, match="self-check"):
        ntk(model, x)


# Interrupts and errors of the model's own.


class Fuse:
    """Raises at the k-th pass and, if it lasts, at all after it."""

    def __init__(self, at: int, raises: type[BaseException], *, lasts: bool = False) -> None:
        self.at, self.raises, self.lasts, self.passed = at, raises, lasts, 0
        self.threads: list[threading.Thread] = []

    def __call__(self, *_: Any) -> None:
        self.passed += 1
        if self.passed == self.at or (self.lasts and self.passed > self.at):
            self.threads = threading.enumerate()
            raise self.raises("stop")


class Wire(torch.autograd.Function):
    """Passes a fuse in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fuse: Fuse) -> Tensor:
        ctx.fuse = fuse
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.fuse()
        return gradient, None


class Fused(nn.Module):
    """Everything that a kernel must put back, and a fuse."""

    def __init__(self, fuse: Fuse, *, where: str, replayed: bool = False) -> None:
        super().__init__()
        self.body = weight_norm(nn.Linear(6, 5)) if replayed else nn.Linear(6, 5)
        self.norm, self.drop, self.head = nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.fuse, self.where = [fuse], where  # a list, lest it be taken for a plain attribute
        self.seen: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        self.register_buffer("calls", torch.zeros(()))
        if where == "hook":
            self.norm.register_forward_hook(fuse)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = torch.relu(self.norm(self.body(x)))
        self.seen.append(h)
        self.named["h"] = self.last = h
        if self.where == "forward":
            self.fuse[0]()
        if self.where == "backward":
            h = Wire.apply(h, self.fuse[0])
        return self.head(self.drop(h + self.frozen(h)))


def settings() -> list[Any]:
    backends: Any = torch.backends
    return [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]


def precisions() -> list[str]:
    return [setting.fp32_precision for setting in settings()]


def set_precisions(values: list[str]) -> None:
    for setting, value in zip(settings(), values, strict=True):
        setting.fp32_precision = value


def state(model: Any) -> dict[str, Any]:
    """All that the caller may look at afterwards."""
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [
            {name: list(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")}
            for module in model.modules()
        ],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [id(p.grad) for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "lists": ([id(t) for t in model.seen], {name: id(t) for name, t in model.named.items()}),
        "generator": torch.get_rng_state().tolist(),
        "precisions": precisions(),
        "flags": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(),
            len(torch.overrides._get_current_function_mode_stack()),
            torch._C._len_torch_dispatch_stack(),
        ),
    }


def fused(fuse: Fuse, *, where: str, replayed: bool = False) -> nn.Module:
    model = seeded(lambda: Fused(fuse, where=where, replayed=replayed)).train()
    model.norm.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


@pytest.fixture
def coarse() -> Iterator[None]:
    """The caller allows coarse arithmetic, so that a kernel has something to put back."""
    before = precisions()
    set_precisions(["tf32", "tf32", "bf16", "bf16"])
    yield
    set_precisions(before)


def stopped(
    raises: type[BaseException], *, where: str, replayed: bool, lasts: bool = False, **words: Any
) -> list[Fuse]:
    """A kernel stopped early and later; each stop comes out as it was raised, and all is put back."""
    fuses: list[Fuse] = []
    at = 1
    while True:
        fuse = Fuse(at, raises, lasts=lasts)
        model, x = fused(fuse, where=where, replayed=replayed), normal(4, 6)
        before = state(model)
        try:
            ntk(model, x, **words)
        except raises as stop:
            assert type(stop) is raises  # noqa: PT017
            assert str(stop) == "stop"  # noqa: PT017
            assert state(model) == before
        else:
            assert fuse.passed < fuse.at
            assert state(model) == before
            assert len(fuses) > 2
            return fuses
        fuses.append(fuse)
        at += 1 + at // 3


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("batchnorm", ["running", "batch"])
@pytest.mark.parametrize("replayed", [False, True], ids=["by functions", "replayed"])
@pytest.mark.parametrize("where", ["forward", "hook", "backward"])
def test_interrupts_leave_nothing_behind(where: str, replayed: bool, batchnorm: str) -> None:
    stopped(KeyboardInterrupt, where=where, replayed=replayed, batchnorm=batchnorm)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("batchnorm", ["running", "batch"])
def test_an_interrupt_closes_the_bar(where: str, batchnorm: str) -> None:
    idle = set(threading.enumerate())
    fuses = stopped(KeyboardInterrupt, where=where, replayed=False, batchnorm=batchnorm, progress=True)
    drawn = {thread for fuse in fuses for thread in fuse.threads} - idle
    assert drawn  # the bar was at work when an interrupt came
    for thread in drawn:
        thread.join(2)
        assert not thread.is_alive()


class Stop(Exception):
    """The model's own."""


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("raises", [Stop, RuntimeError])
@pytest.mark.parametrize("where", ["forward", "hook", "backward"])
def test_errors_of_the_model_surface_unchanged(raises: type[BaseException], where: str) -> None:
    stopped(raises, where=where, replayed=False)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("raises", [Stop, SystemExit])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_lasting_errors_of_a_replayed_model_surface_unchanged(
    raises: type[BaseException], where: str
) -> None:
    stopped(raises, where=where, replayed=True, lasts=True)


@pytest.mark.parametrize("raises", [Stop, ValueError, KeyError])
def test_errors_in_a_plan(raises: type[BaseException]) -> None:
    for at in range(1, 6):
        model = fused(Fuse(at, raises), where="forward")
        before = state(model)
        with pytest.raises(raises):
            plan(model, normal(4, 6))
        assert state(model) == before
