"""Plans: of another kernel, beside batch statistics, where the examples choose the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError
from tangentlab.kernels import ntk, plan

from .checks import Function, error, normal, right, seeded
from .zoo import build, examples


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
