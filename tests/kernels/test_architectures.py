"""Real architectures against the Jacobians of their examples run alone, in float64."""

from __future__ import annotations

import pytest
import torch

from tangentlab.kernels import ntk

from .architectures import ARCHITECTURES, OPTIONAL, build, examples
from .reference import Inputs, functional_jacobian, jacobian, kernel, relative_error


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Inputs, Inputs]:
    """The model with its inputs x and x2."""
    library = request.param.split()[0]
    if library in OPTIONAL:
        pytest.importorskip(library, exc_type=Exception)
    return build(request.param), examples(request.param, 3), examples(request.param, 2, seed=3)


@pytest.mark.parametrize("kind", ["full", "class"])
def test_the_kernel_is_the_jacobians_product(case: tuple[torch.nn.Module, Inputs, Inputs], kind: str) -> None:
    model, x, x2 = case
    J, J2 = jacobian(model, x), jacobian(model, x2)
    assert relative_error(ntk(model, x, kind=kind), kernel(J, J, kind)) < 1e-11
    assert relative_error(ntk(model, x, x2, kind=kind), kernel(J, J2, kind)) < 1e-11


@pytest.mark.parametrize("name", ["PreActResNet-18", "transformers ConvNeXt"])
def test_references_agree(name: str) -> None:
    model, x = build(name), examples(name, 2)
    torch.testing.assert_close(jacobian(model, x), functional_jacobian(model, x), rtol=1e-10, atol=1e-12)
