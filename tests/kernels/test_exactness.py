"""Every model of the zoo against the Jacobians of its examples run alone, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tangentlab.errors import KernelError
from tangentlab.kernels import ntk, planning

from .reference import (
    KINDS,
    batch_jacobian,
    functional_batch_jacobian,
    functional_jacobian,
    jacobian,
    kernel,
    relative_error,
)
from .zoo import MODELS, NOT_FUNCTIONAL, REFUSED, build, examples


def in_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven examples by threes, which divides neither 7 nor 5: 3 + 3 + 1."""
    tilings = planning._tilings
    monkeypatch.setattr(planning, "_tilings", lambda n, m: list(tilings(n, m))[1:2])


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_equals_the_jacobians_product(name: str) -> None:
    model, x = build(name), examples(name, 7)
    J = jacobian(model, x)
    for kind in KINDS:
        assert relative_error(ntk(model, x, kind=kind), kernel(J, J, kind)) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_two_inputs_in_tiles_that_do_not_divide(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, x2 = build(name), examples(name, 7), examples(name, 5, seed=3)
    in_small_tiles(monkeypatch)
    J, J2 = jacobian(model, x), jacobian(model, x2)
    for kind in KINDS:
        assert relative_error(ntk(model, x, x2, kind=kind), kernel(J, J2, kind)) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_symmetric_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(name), examples(name, 7)
    in_small_tiles(monkeypatch)
    full = ntk(model, x, kind="full")
    assert torch.equal(full, full.permute(1, 0, 3, 2))
    J = jacobian(model, x)
    assert relative_error(full, kernel(J, J, "full")) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_as_many_examples_as_outputs(name: str) -> None:
    """Broadcasting cannot tell them apart: PyTorch's nested vmap of PReLU's gradient is wrong here only."""
    model = build(name)
    x = examples(name, jacobian(model, examples(name, 1)).shape[1])
    J = jacobian(model, x)
    assert relative_error(ntk(model, x, kind="full"), kernel(J, J, "full")) < 1e-12


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_kernel_is_refused_by_name(name: str) -> None:
    model, x = build(name), examples(name, 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KernelError, match=rf"'1[^']*' \({REFUSED[name][2]}\)"):
        ntk(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_FUNCTIONAL])
def test_references_agree(name: str) -> None:
    """The zoo's expected values do not rest on one way of differentiating."""
    model, x = build(name), examples(name, 3)
    torch.testing.assert_close(jacobian(model, x), functional_jacobian(model, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(NOT_FUNCTIONAL))
def test_the_reference_agrees_with_differences(name: str) -> None:
    """f(θ + hv) − f(θ − hv) = 2h·Jv + O(h³), where torch.func cannot say."""
    model, x = build(name), examples(name, 3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator, h = torch.Generator().manual_seed(0), 1e-5
    v = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            for p, direction in zip(parameters, v, strict=True):
                p.add_(by * direction)
        return model.eval()(x.clone()).detach()

    slope = jacobian(model, x) @ torch.cat([direction.flatten() for direction in v])
    torch.testing.assert_close((moved(h) - moved(-2 * h)) / (2 * h), slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "name", ["batchnorm 1d", "batchnorm 2d not affine", "pre-activation block", "conv 3d"]
)
def test_batch_references_agree(name: str) -> None:
    model, x = build(name), examples(name, 4)
    torch.testing.assert_close(
        batch_jacobian(model, x), functional_batch_jacobian(model, x), rtol=1e-10, atol=1e-12
    )
