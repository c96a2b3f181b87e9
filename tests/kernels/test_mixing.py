"""Models that mix examples: the right kernel, or an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangentlab.errors import KernelError
from tangentlab.kernels import ntk

from .checks import TWO, Function, dense, normal, right, right_or_refused, seeded
from .reference import KINDS


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
