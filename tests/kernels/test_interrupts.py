"""Interrupts and errors of the model's own leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tangentlab.kernels import ntk, plan

from .checks import normal, seeded


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
