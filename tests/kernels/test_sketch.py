"""Sketched class kernels: exact where they hold everything, else unbiased, and as near as they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tangentlab import metrics
from tangentlab.errors import ConfigError, KernelError
from tangentlab.kernels import ntk, sketch, sketched_ntk

from .zoo import MODELS, REFUSED, build, examples

# One of each way to sketch: positions, several uses, tables, hashed gradients of grouped and replayed ones.
WAYS = [
    "conv stride 2 padding 1",
    "embedding of repeated tokens",
    "tied convolutions",
    "tied embedding",
    "conv 3d",
    "conv transpose 3d",
    "lstm",
]


@pytest.mark.parametrize("name", MODELS)
def test_a_sketch_that_holds_everything_is_exact(name: str) -> None:
    model, x = build(name), examples(name, 5)
    K = ntk(model, x, kind="class")
    found = sketched_ntk(model, x, features=10**6, groups=2)
    assert found.shape == (2, *K.shape)
    assert float((found - K).abs().max()) < 1e-12 * float(K.abs().max())


@pytest.mark.parametrize("name", WAYS)
def test_a_sketch_is_unbiased(name: str) -> None:
    model, x = build(name), examples(name, 4)
    K = ntk(model, x, kind="class")
    drawn = torch.cat([sketched_ntk(model, x, features=4, groups=8, seed=seed) for seed in range(60)])
    assert float(drawn.std(0).max()) > 1e-3 * float(K.abs().max())  # it is random
    error = (drawn.mean(0) - K).abs() / (drawn.std(0) / len(drawn) ** 0.5 + 1e-9 * K.abs().max())
    assert float(error.max()) < 5


class Wide(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 49, 4),
        )


@pytest.fixture
def wide() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Wide().double().eval(), torch.rand(24, 3, 16, 16, dtype=torch.float64)


def test_more_features_are_nearer(wide: tuple[nn.Module, Tensor]) -> None:
    model, x = wide
    K = ntk(model, x, kind="class")
    errors = [
        sum(
            float((sketched_ntk(model, x, features=features, seed=seed).mean(0) - K).norm() / K.norm())
            for seed in range(10)
        )
        for features in (4, 64, 1024)
    ]
    # A factor of four each is expected.
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_the_jackknifes_interval_covers(wide: tuple[nn.Module, Tensor]) -> None:
    model, x = wide
    K = ntk(model, x, kind="class")
    truth = float(metrics.entropy_rank(K).mean())
    hits, values = 0, set()
    for seed in range(60):
        groups = sketched_ntk(model, x, features=16, seed=seed)
        value, low, high = metrics.jackknife(lambda mean: metrics.entropy_rank(mean).mean(), groups)
        hits += float(low) <= truth <= float(high)
        values.add(float(value))
    assert len(values) == 60
    assert hits >= 50  # 57 are expected; fewer have a chance below 0.3 %


def test_projections_are_those_of_the_seed(wide: tuple[nn.Module, Tensor]) -> None:
    model, x = wide
    first = sketched_ntk(model, x, features=16)
    torch.testing.assert_close(sketched_ntk(model, x[:7], features=16), first[..., :7, :7])
    assert not torch.equal(sketched_ntk(model, x, features=16, seed=1), first)
    assert torch.equal(first, first.mT)


def test_tiles_and_outputs_in_turn_change_nothing(
    wide: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = wide
    whole = sketched_ntk(model, x, features=256)
    sizes = []
    taped = sketch.taped

    def counted(*args: object) -> object:
        tape = taped(*args)
        sizes.append(len(tape))
        return tape

    monkeypatch.setattr(sketch, "taped", counted)
    torch.testing.assert_close(sketched_ntk(model, x, features=256, memory="29MiB"), whole)
    assert max(sizes) < 24
    assert sum(sizes) > 2 + 24  # more than one pass over the examples


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_refused_by_name(name: str) -> None:
    with pytest.raises(KernelError, match=rf"'1[^']*' \({REFUSED[name][2]}\)"):
        sketched_ntk(build(name), examples(name, 5))


def test_bad_input_is_named(wide: tuple[nn.Module, Tensor]) -> None:
    with pytest.raises(ConfigError, match="features=0 is out of range"):
        sketched_ntk(*wide, features=0)
    with pytest.raises(ConfigError, match="groups=1; an error takes at least 2"):
        sketched_ntk(*wide, groups=1)
    with pytest.raises(KernelError, match=r"memory of 0.0 MiB is too small: .* needs \d+ MiB"):
        sketched_ntk(*wide, memory=1000)
    with pytest.raises(ConfigError, match="memory='much'"):
        sketched_ntk(*wide, memory="much")
