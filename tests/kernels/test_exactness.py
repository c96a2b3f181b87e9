"""Every model of the zoo against the Jacobians of its examples run alone, in float64."""

from __future__ import annotations

import pytest
import torch

from tangentlab.kernels import ntk

from .reference import functional_jacobian, jacobian, kernel, relative_error
from .zoo import MODELS, build, examples

KINDS = ("full", "class", "trace", "pseudo")


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_equals_the_jacobians_product(name: str) -> None:
    model, x = build(name), examples(name, 7)
    J = jacobian(model, x)
    for kind in KINDS:
        assert relative_error(ntk(model, x, kind=kind), kernel(J, J, kind)) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_two_inputs_in_tiles_that_do_not_divide(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, x2 = build(name), examples(name, 7), examples(name, 5, seed=3)
    monkeypatch.setattr("tangentlab.kernels.memory._tiles", lambda n: iter([3]))
    for kind in KINDS:
        expected = kernel(jacobian(model, x), jacobian(model, x2), kind)
        assert relative_error(ntk(model, x, x2, kind=kind), expected) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_symmetric_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(name), examples(name, 7)
    monkeypatch.setattr("tangentlab.kernels.memory._tiles", lambda n: iter([3]))
    full = ntk(model, x, kind="full")
    assert torch.equal(full, full.permute(1, 0, 3, 2))
    J = jacobian(model, x)
    assert relative_error(full, kernel(J, J, "full")) < 1e-12


@pytest.mark.parametrize("name", ["conv stride 2 padding 1", "in-place relu", "layer norm", "tied embedding"])
def test_references_agree(name: str) -> None:
    model, x = build(name), examples(name, 3)
    torch.testing.assert_close(jacobian(model, x), functional_jacobian(model, x), rtol=1e-10, atol=1e-12)
