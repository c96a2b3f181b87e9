"""What replays and the watch over a forward must not do: leak errors, hold G twice, miss a change."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangentlab.errors import KernelError
from tangentlab.kernels import ntk
from tangentlab.kernels.capture import Tape, record
from tangentlab.kernels.replay import CannotReplay, Replay
from tangentlab.kernels.reproducible import coarsest, mixing, reproducible


class Made(nn.Module):
    """A child called as an expression says."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], child: nn.Module) -> None:
        super().__init__()
        self.call, self.child = call, child

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.child, x)


class Scale(nn.Module):
    """A function of its input and its weight, by what is set on it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape))
        self.mask = torch.ones(())
        self.failure: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.failure is not None:
            raise self.failure
        return x * self.weight.sum(tuple(range(self.weight.dim() - 1))) * self.mask


def taped(model: nn.Module, x: Tensor, child: nn.Module) -> Tape:
    tape = record(model, x, {}, [child])
    tape.pull(torch.eye(tape.output.shape[1]))
    return tape


def masked(child: Scale, x: Tensor) -> Tensor:
    child.mask = (x > 0.5).to(x)
    return child(x)


def autocast(child: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return child(x).float()


@pytest.mark.parametrize(
    ("call", "child"), [(masked, Scale(3)), (autocast, nn.Linear(3, 2).to(torch.bfloat16))]
)
def test_a_module_that_needs_its_parents_preparation_is_named_in_one_line(
    call: Callable[[Any, Tensor], Tensor], child: nn.Module
) -> None:
    model = Made(call, child)
    tape = taped(model, torch.rand(4, 3), child)
    replay = Replay(child, ["weight"])
    assert replay.transient(tape) > 0
    with pytest.raises(CannotReplay, match=r"^cannot be run on one example alone: .+$") as raised:
        replay.gradient(tape, torch.float32, 1e6)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "failure",
    [
        KeyboardInterrupt(),
        torch.OutOfMemoryError("full"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: full"),
    ],
)
def test_interrupts_and_exhausted_memory_pass(failure: BaseException) -> None:
    child = Scale(3)
    tape = taped(child, torch.rand(4, 3), child)
    child.failure = failure
    with pytest.raises(type(failure)) as raised:
        Replay(child, ["weight"]).gradient(tape, torch.float32, 0)
    assert raised.value is failure


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("room", [0.0, 0.5, 2.5, 100.0])
def test_gradients_of_two_calls_in_chunks(dtype: torch.dtype, vectorized: bool, room: float) -> None:
    torch.manual_seed(0)
    child = nn.Linear(3, 3).double()
    model = Made(lambda child, x: child(child(x).tanh()), child)
    x = torch.rand(7, 3, dtype=torch.float64)
    tape = taped(model, x, child)
    replay = Replay(child, ["weight", "bias"])
    replay._vectorized = vectorized
    G = replay.gradient(tape, dtype, room * replay.transient(tape))
    assert G is not None
    assert G.dtype == dtype
    for i in range(7):
        for r in range(3):
            expected = torch.autograd.grad(model(x[i : i + 1])[0, r], [child.weight, child.bias])
            flat = torch.cat([g.flatten() for g in expected])
            torch.testing.assert_close(
                G[i, r].double(), flat, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
            )


def grown(work: Callable[[], object]) -> int:
    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    work()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of the resident memory cannot be reset here")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux has the peak of resident memory"
)
@pytest.mark.parametrize("vectorized", [True, False])
def test_gradients_are_held_once(vectorized: bool) -> None:
    child = Scale(2**16, 4)
    tape = taped(child, torch.rand(24, 4), child)
    tape.pull(torch.ones(1, 4))
    replay = Replay(child, ["weight"])
    replay._vectorized = vectorized
    size = 24 * child.weight.nbytes
    least = 4 * replay.transient(tape)
    assert grown(lambda: replay.gradient(tape, torch.float32, 2 * least / 4)) < size + 2 * least + 2**22


def clipped(child: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        child.weight.clamp_(-0.1, 0.1)
    return child(x)


def clipped_data(child: nn.Linear, x: Tensor) -> Tensor:
    child.weight.data.clamp_(-0.1, 0.1)
    return child(x)


def replaced(child: nn.Linear, x: Tensor) -> Tensor:
    child.weight.data = child.weight.data.clamp(-0.1, 0.1)
    return child(x)


def afterwards(child: nn.Linear, x: Tensor) -> Tensor:
    y = child(x)
    child.weight.data.mul_(0.9)
    return y


def moved(child: nn.Linear, x: Tensor) -> Tensor:
    child.weight.data = child.weight.data.clone()
    return child(x)


@pytest.mark.parametrize("call", [clipped, clipped_data, replaced, afterwards])
def test_a_parent_that_changes_its_childs_weight_is_refused(call: Callable[[Any, Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Made(call, nn.Linear(4, 2)))
    with pytest.raises(
        KernelError, match=r"module '1' \(Made\) changes its parameters in its forward: the out"
    ):
        reproducible(model, torch.rand(3, 4))


def test_a_replaced_weight_is_put_back_and_one_that_moves_is_let() -> None:
    model = nn.Sequential(Made(replaced, nn.Linear(4, 2)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(KernelError, match="changes its parameters"):
        reproducible(model, torch.rand(3, 4))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    reproducible(nn.Sequential(Made(moved, nn.Linear(4, 2))), torch.rand(3, 4))


def test_weights_come_back_from_a_forward_that_fails() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.zero_()
            raise ValueError("no")

    model = nn.Sequential(nn.Linear(4, 4), Failing(4, 2))
    before = model[1].weight.clone()
    with pytest.raises(ValueError, match="no"):
        reproducible(model, torch.rand(3, 4))
    assert torch.equal(model[1].weight, before)


def test_the_coarsest_precision_decides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), Made(lambda c, x: c(x.double()), nn.Linear(64, 3).double())
    )
    assert coarsest(model) == torch.finfo(torch.float32).eps
    assert coarsest(nn.Linear(2, 2), torch.ones(1, dtype=torch.bfloat16)) == torch.finfo(torch.bfloat16).eps
    mixed = nn.Sequential(*model, Made(lambda c, x: c(x - x.mean(0)), nn.Identity()))
    assert mixing(mixed, torch.rand(2, 64)) == "module '3.child' (Identity)"
    assert mixing(model, torch.rand(2, 64)) == "the model (Sequential)"


def test_a_lazy_module_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    with pytest.raises(
        KernelError, match=r"module '1' \(LazyBatchNorm1d\) makes its parameters at its first"
    ):
        reproducible(model, torch.rand(3, 4))


def test_what_torch_cannot_differentiate_or_tell_apart_is_refused_by_name() -> None:
    class Equal(nn.Linear):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

    with torch.inference_mode():
        frozen = nn.Linear(4, 4)
    for inner, complaint in (
        (Equal(4, 4), r"module '1' \(Equal\) has an __eq__ but no __hash__"),
        (frozen, r"module '1' \(Linear\) has parameters made in inference mode"),
    ):
        with pytest.raises(KernelError, match=complaint):
            ntk(nn.Sequential(nn.Linear(4, 4), inner), torch.rand(3, 4))
