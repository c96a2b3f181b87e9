"""The gap's parts, each computed on its own, sum to it; how they go with the batch. See docs/theory.md."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tangentlab as tl
from tangentlab import modes
from tangentlab.errors import ConfigError, KernelError
from tangentlab.kernels import KernelGap, kernel_gap
from tangentlab.kernels.gap import _Jacobians
from tangentlab.kernels.structure import trained

from .reference import relative_error
from .test_batch import IMAGE, MODELS, VECTOR, build, drawn, examples, flat


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_sum_to_the_gap(name: str) -> None:
    model, x = build(name), examples(MODELS[name][1], 6)
    found = kernel_gap(model, x)
    whole = found.running + found.values + found.derivative + found.cross
    mixed = found.running + found.mixed_values + found.mixed_derivative
    assert relative_error(whole, found.batch) < 1e-10
    assert relative_error(mixed, found.mixed) < 1e-10
    for kernel, side in (
        (found.running, "running"),
        (found.batch, "batch"),
        (found.mixed, ("running", "batch")),
    ):
        assert relative_error(kernel, tl.ntk(model, x, kind="class", batchnorm=side)) < 1e-10
    if name != "no batchnorm":
        parts = (found.values, found.derivative, found.cross, found.mixed_values, found.mixed_derivative)
        assert min(float(part.norm() / found.batch.norm()) for part in parts) > 1e-3


def test_without_batchnorm_there_is_no_gap() -> None:
    found = kernel_gap(build("no batchnorm"), examples(VECTOR, 4))
    for part in (found.values, found.derivative, found.cross, found.mixed_values, found.mixed_derivative):
        assert float(part.abs().max()) < 1e-15


def test_the_first_rows_of_a_batch() -> None:
    """Their kernels have the whole batch's statistics."""
    model, x = build("2d, residual, in-place relu"), examples(IMAGE, 6)
    few, all_of_them = kernel_gap(model, x, rows=2), kernel_gap(model, x)
    for name, kernel in vars(few).items():
        assert torch.allclose(kernel, getattr(all_of_them, name)[:, :2, :2], atol=1e-12)
    with pytest.raises(ConfigError, match="rows=7 is out of range; choose 1..6"):
        kernel_gap(model, x, rows=7)


def test_buffers_of_the_batchs_values_leave_the_derivative_alone() -> None:
    """Values: the running kernel of a network whose buffers hold the batch's statistics, minus its own."""
    model, x = build("1d"), examples(VECTOR, 6)
    found = kernel_gap(model, x)
    settled = copy.deepcopy(model)
    hidden = settled[0](x).detach()
    settled[1].running_mean, settled[1].running_var = hidden.mean(0), hidden.var(0, correction=0)
    assert relative_error(tl.ntk(settled, x, kind="class"), found.running + found.values) < 1e-12
    again = kernel_gap(settled, x)
    assert float(again.values.abs().max()) < 1e-12
    assert float(again.cross.abs().max()) < 1e-12
    assert float(again.derivative.norm() / again.batch.norm()) > 0.1


def test_the_model_comes_back_as_it_was() -> None:
    model = build("2d, residual, in-place relu").train()
    before = copy.deepcopy(model.state_dict())
    kernel_gap(model, examples(IMAGE, 3), rows=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_without_running_statistics_there_is_none() -> None:
    model = drawn(lambda: flat(nn.BatchNorm1d(5, track_running_stats=False)))
    with pytest.raises(KernelError, match=r"module '1' \(BatchNorm1d\) has no running statistics"):
        kernel_gap(model, examples(VECTOR, 4))


@pytest.mark.parametrize("size", [6, 60])
def test_the_derivative_takes_away_the_scale_of_a_weight_before_batchnorm(size: int) -> None:
    """D w = −V w whatever the batch, so that ‖D‖ ≥ ‖V w‖/‖w‖; up to BatchNorm's ε."""
    model = build("1d")
    model[1].eps = 1e-14
    w = torch.cat([p.detach().flatten() * (p is model[0].weight) for p in trained(model).values()])
    with modes.evaluation(model):
        _, V, D, _ = _Jacobians(model, examples(VECTOR, size), 4).of_class(0)
    assert torch.allclose(D @ w, -V @ w, atol=1e-9)
    assert float((V @ w).norm()) > 1e-2
    assert float(torch.linalg.matrix_norm(D, 2)) >= float((V @ w).norm() / w.norm())


def test_the_values_part_is_in_proportion_to_the_distance_of_the_statistics() -> None:
    """‖W‖ ≤ Λ ‖s(X) − s‖: a tenth of a small distance, a tenth of the part."""
    model, x = build("1d"), examples(VECTOR, 6)
    hidden = model[0](x).detach()

    def part(distance: float) -> float:
        off = copy.deepcopy(model)
        off[1].running_mean = hidden.mean(0) + distance
        off[1].running_var = hidden.var(0, correction=0) * (1 + distance)
        return float(kernel_gap(off, x).mixed_values.norm())

    assert [part(d) / part(d / 10) for d in (1e-2, 1e-3)] == pytest.approx([10, 10], rel=0.05)


@pytest.fixture(scope="module")
def by_batch_size() -> dict[int, list[KernelGap]]:
    """The same rows in batches of independent inputs, the buffers those of the population; B -> draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    rows = examples(VECTOR, 3)
    # Of h = A x + b with x ~ N(0, I).
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    model[1].running_mean, model[1].running_var = bias.clone(), weight.square().sum(1)

    def batch(size: int, seed: int) -> Tensor:
        return torch.cat([rows, examples(VECTOR, size - len(rows), seed=seed)])

    return {
        size: [kernel_gap(model, batch(size, seed), rows=3) for seed in range(10, 30)]
        for size in (64, 1024, 16384)
    }


def _size(gaps: list[KernelGap], part: str) -> float:
    """Root mean square over the draws."""
    squares = [float(getattr(gap, part).square().sum()) for gap in gaps]
    return (sum(squares) / len(squares)) ** 0.5


def test_the_values_part_falls_with_the_root_of_the_batch(by_batch_size: dict[int, list[KernelGap]]) -> None:
    """Sixteen times the batch, a quarter of it, within a third."""
    small, medium, large = (_size(gaps, "mixed_values") for gaps in by_batch_size.values())
    assert small / medium == pytest.approx(4, rel=0.33)
    assert medium / large == pytest.approx(4, rel=0.33)


def test_the_derivative_part_has_a_limit(by_batch_size: dict[int, list[KernelGap]]) -> None:
    """S(x) E[∂s/∂θ]: the same for every large batch, and not zero."""
    one, other = (gap.mixed_derivative for gap in by_batch_size[16384][:2])
    assert float(one.norm() / by_batch_size[16384][0].mixed.norm()) > 0.1
    assert float((one - other).norm() / one.norm()) < 0.05
    small, _, large = (_size(gaps, "mixed_derivative") for gaps in by_batch_size.values())
    assert small / large == pytest.approx(1, rel=0.2)
