"""Faults put into the engine are found: the check that it makes of itself."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tangentlab.errors import KernelError
from tangentlab.kernels import blocks, direct, ntk, planning, replay, uses

from .checks import TWO, Function, error, normal, right, right_or_refused, seeded
from .reference import KINDS, jacobian, kernel, relative_error
from .zoo import build, examples

engine = importlib.import_module("tangentlab.kernels.ntk")  # the function hides its module


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
