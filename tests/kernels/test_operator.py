"""Products with the kernel, matrix-free, against the Jacobians of the zoo in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from tangentlab.errors import ConfigError, KernelError
from tangentlab.kernels import NTKOperator, jacobian
from tangentlab.kernels import ntk as dense_ntk

from . import test_batch
from .reference import functional_batch_jacobian
from .reference import jacobian as rows
from .zoo import MODELS, REFUSED, build, examples

# Those without a forward mode; and those without a second derivative either.
BACKWARD_OF_BACKWARD = {
    "spatial transformer",
    "embedding with padding",
    "custom function",
    "weight norm",
    "weight norm conv",
    "weight norm by hooks",
    "backbone without gradient",
}
BY_ROWS = {"embedding bag", "weighted embedding bag"}


def flat(J: Tensor) -> Tensor:
    return J.flatten(0, 1)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def assert_products(op: NTKOperator, expected: Tensor) -> None:
    """Of columns, of a vector, and of the transpose."""
    assert op.shape == tuple(expected.shape)
    V, u = drawn(op.shape[1], 2), drawn(op.shape[0])
    scale = float(expected.norm())
    assert float((op @ V - expected @ V).abs().max()) < 1e-12 * scale
    assert float((op @ V[:, 0] - expected @ V[:, 0]).abs().max()) < 1e-12 * scale
    assert float((op.T @ u - expected.T @ u).abs().max()) < 1e-12 * scale


@pytest.mark.parametrize("name", MODELS)
def test_products_are_the_jacobians(name: str) -> None:
    model, x, x2 = build(name), examples(name, 5), examples(name, 3, seed=3)
    J, J2 = flat(rows(model, x)), flat(rows(model, x2))
    assert_products(NTKOperator(model, x), J @ J.T)
    op = NTKOperator(model, x, x2)
    assert_products(op, J @ J2.T)
    route = "_by_rows" if name in BY_ROWS else "_double" if name in BACKWARD_OF_BACKWARD else "_forward"
    assert op._left._route is getattr(jacobian, route)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_refused_by_name(name: str) -> None:
    model, x = build(name), examples(name, 5)
    with pytest.raises(KernelError, match=rf"'1[^']*' \({REFUSED[name][2]}\)"):
        NTKOperator(model, x) @ torch.zeros(15)


@pytest.mark.parametrize("name", test_batch.MODELS)
def test_batch_statistics(name: str) -> None:
    model, shape = test_batch.build(name), test_batch.MODELS[name][1]
    x, x2 = test_batch.examples(shape, 5), test_batch.examples(shape, 4, seed=3)
    J, J2 = (flat(functional_batch_jacobian(model, side)) for side in (x, x2))
    op = NTKOperator(model, x, batchnorm="batch")
    assert op.symmetric
    assert_products(op, J @ J.T)
    assert_products(NTKOperator(model, x, x2, batchnorm="batch"), J @ J2.T)
    mixed = NTKOperator(model, x, batchnorm=("running", "batch"))
    assert not mixed.symmetric
    assert_products(mixed, flat(rows(model, x)) @ J.T)
    assert_products(NTKOperator(model, x, x2, batchnorm=("running", "batch")), flat(rows(model, x)) @ J2.T)


@pytest.mark.parametrize("route", ["_forward", "_double", "_by_rows"])
@pytest.mark.parametrize("batchnorm", ["running", "batch"])
def test_every_route_is_right(route: str, batchnorm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jacobian, "_ROUTES", (getattr(jacobian, route),))
    name = "2d, residual, in-place relu"
    model, x = test_batch.build(name), test_batch.examples(test_batch.MODELS[name][1], 5)
    J = flat(rows(model, x) if batchnorm == "running" else functional_batch_jacobian(model, x))
    assert_products(NTKOperator(model, x, batchnorm=batchnorm), J @ J.T)


class Faulty(torch.autograd.Function):
    """x + b whose forward mode forgets b."""

    @staticmethod
    def forward(ctx: object, x: Tensor, b: Tensor) -> Tensor:
        return x + b

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, g.sum(0)

    @staticmethod
    def jvp(ctx: object, x: Tensor, b: Tensor) -> Tensor:
        return x.clone()


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.b, self.last = nn.Linear(6, 4), nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        # A thousandth of the gradient, so that it is found by each parameter's own scale only.
        return self.last(Faulty.apply(self.first(x), 1e-3 * self.b).tanh())


def test_a_wrong_forward_mode_is_not_used() -> None:
    torch.manual_seed(0)
    model, x = Forgetful().double(), drawn(4, 6)
    J = flat(rows(model, x))
    op = NTKOperator(model, x)
    assert_products(op, J @ J.T)
    assert op._left._route is jacobian._double


def test_parts_columns_and_graphs_follow_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pre-activation block"
    model, x = build(name), examples(name, 7)
    J = flat(rows(model, x))
    ample, tight = NTKOperator(model, x), NTKOperator(model, x, memory=100_000)
    assert (ample._left._kept, ample._left._size) == (True, 7)
    assert not tight._left._kept
    assert tight._left._size < 7
    assert tight._left.columns < ample._left.columns
    assert_products(tight, J @ J.T)
    monkeypatch.setattr(jacobian, "_PART", 10_000)
    parts = NTKOperator(model, x)
    assert parts._left._kept
    assert parts._left._size < 7
    assert_products(parts, J @ J.T)
    with pytest.raises(KernelError, match=r"memory of 0\.0 MiB is too small: .* of 1 examples at once need"):
        NTKOperator(model, x, memory=1000)
    with pytest.raises(KernelError, match="of 7 examples at once need 1 MiB"):
        NTKOperator(model, x, batchnorm="batch", memory=100_000)


def test_kept_graphs_follow_the_weights() -> None:
    name = "pre-activation block"
    model, x = build(name), examples(name, 4)
    op = NTKOperator(model, x)
    before = op.to_dense()
    assert_products(op, before)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    after = op.to_dense()
    assert float((after - before).norm()) > 0.1 * float(before.norm())
    assert_products(op, after)


def test_the_model_comes_back_as_it_was() -> None:
    model, x = build("pre-activation block").train(), examples("pre-activation block", 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for batchnorm in ("running", "batch"):
        NTKOperator(model, x, batchnorm=batchnorm) @ drawn(12)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_dense_and_scipy_are_the_same_operator() -> None:
    name = "pre-activation block"
    model, x, x2 = build(name), examples(name, 4), examples(name, 3, seed=3)
    op = NTKOperator(model, x, x2, batchnorm=("running", "batch"))
    full = dense_ntk(model, x, x2, kind="full", batchnorm=("running", "batch"))
    assert torch.equal(op.to_dense()[1 * 3 + 2, 2 * 3 + 0], full[1, 2, 2, 0])
    assert torch.equal(op.T.to_dense(), op.to_dense().T)
    scipy, dense = op.to_scipy(), op.to_dense().numpy()
    V, U = drawn(9, 2).numpy(), drawn(12, 2).numpy()
    np.testing.assert_allclose(scipy @ V, dense @ V, rtol=1e-10)
    np.testing.assert_allclose(scipy @ V[:, 0], dense @ V[:, 0], rtol=1e-10)
    np.testing.assert_allclose(scipy.T @ U, dense.T @ U, rtol=1e-10)
    own = NTKOperator(model, x)
    values = eigsh(own.to_scipy(), 3, return_eigenvectors=False, v0=np.ones(12))
    np.testing.assert_allclose(sorted(values), torch.linalg.eigvalsh(own.to_dense())[-3:].numpy(), rtol=1e-8)


def test_dtypes() -> None:
    model, x = build("pre-activation block").float(), examples("pre-activation block", 4).float()
    op = NTKOperator(model, x)
    v = drawn(12)
    assert (op @ v).dtype == torch.float64
    assert (op @ v.half()).dtype == torch.float16
    assert op.to_scipy().dtype == np.float32
    expected = op.to_dense().double() @ v
    assert float((op @ v - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (
            lambda model, x: NTKOperator(model, x, batchnorm="eval"),
            ConfigError,
            "batchnorm 'eval' is unknown",
        ),
        (lambda model, x: NTKOperator(model, x, memory="2 apples"), ConfigError, "memory='2 apples'"),
        (lambda model, x: NTKOperator(model, x) @ drawn(5), ConfigError, r"shape \[5\]; give \[12\]"),
        (lambda model, x: NTKOperator(model, x) @ drawn(12, 1, 1), ConfigError, r"\[12, k\]"),
        (lambda model, x: NTKOperator(model, x) @ torch.arange(12), ConfigError, "torch.int64"),
        (lambda model, x: NTKOperator(model, x) @ (drawn(12) / 0), KernelError, "12 entries .* not finite"),
        (lambda model, x: NTKOperator(model.requires_grad_(False), x), KernelError, "no parameter"),
    ],
)
def test_bad_input_is_named(
    make: Callable[[nn.Module, Tensor], object], error: type[Exception], said: str
) -> None:
    name = "pre-activation block"
    with pytest.raises(error, match=said):
        make(build(name), examples(name, 4))
