"""The public contract of ``ntk``: what it refuses, what it leaves alone, and what others computed."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangentlab.errors import ConfigError, KernelError, ModelError
from tangentlab.kernels import ntk, plan

from .reference import jacobian, kernel, relative_error
from .zoo import build, examples

HERE = Path(__file__).parent


class Applied(nn.Module):
    """A linear layer, then a function of its outputs."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(6, 3).double(), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.linear(x))  # type: ignore[operator]


def test_neural_tangents_kernel_is_reproduced() -> None:
    known = {name: torch.from_numpy(a) for name, a in np.load(HERE / "neural_tangents.npz").items()}
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 4),
    ).double()
    model.load_state_dict(
        {
            f"{layer}.{part}": known[f"{part[0]}{i}"]
            for i, layer in enumerate((0, 2, 5), start=1)
            for part in ("weight", "bias")
        }
    )
    assert relative_error(ntk(model, known["x"], kind="full"), known["full"]) < 1e-12
    assert relative_error(ntk(model, known["x"], kind="trace"), known["trace"]) < 1e-12


def test_float32_is_accurate_and_float64_sums_are_more_so() -> None:
    model, x = build("batchnorm 2d").float(), examples("batchnorm 2d", 7).float()
    J = jacobian(copy.deepcopy(model).double(), x.double())
    for kind in ("full", "class", "trace", "pseudo"):
        K = ntk(model, x, kind=kind)
        assert K.dtype == torch.float32
        assert relative_error(K.double(), kernel(J, J, kind)) < 1e-5
    assert ntk(model, x, dtype=torch.float64).dtype == torch.float64
    assert relative_error(ntk(model, x, dtype=torch.float64), kernel(J, J, "trace")) < 1e-6


def test_one_example() -> None:
    model, x = build("pre-activation block"), examples("pre-activation block", 1)
    J = jacobian(model, x)
    assert relative_error(ntk(model, x, kind="full"), kernel(J, J, "full")) < 1e-12


def test_less_memory_gives_smaller_tiles_and_the_same_kernel() -> None:
    model, x = build("pre-activation block"), examples("pre-activation block", 7)
    J = jacobian(model, x)
    tiles = []
    for limit in (110_000, "0.2MB", "4MiB"):
        tiles.append(plan(model, x, kind="class", memory=limit).tile)
        K = ntk(model, x, kind="class", memory=limit)
        assert relative_error(K, kernel(J, J, "class")) < 1e-12
        assert torch.equal(K, K.mT)
    assert tiles == sorted(tiles)
    assert len(set(tiles)) >= 3


def test_the_model_comes_back_as_it_was() -> None:
    model = build("in-place relu").train()
    model[0][1].eval()
    model[0][0].weight.grad = torch.ones_like(model[0][0].weight)
    model[3].weight.requires_grad_(False)
    calls = []
    model[3].register_forward_hook(lambda *args: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    hooks = [
        (
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._forward_hooks_with_kwargs),
            len(m._forward_pre_hooks_with_kwargs),
        )
        for m in model.modules()
    ]
    generator = torch.get_rng_state()
    x = examples("in-place relu", 5)
    untouched = x.clone()
    ntk(model, x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x, untouched)
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert hooks == [
        (
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._forward_hooks_with_kwargs),
            len(m._forward_pre_hooks_with_kwargs),
        )
        for m in model.modules()
    ]
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    assert not model[3].weight.requires_grad
    assert model[0][0].weight.requires_grad
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {"0.0.weight"}
    assert bool((model[0][0].weight.grad == 1).all())


def test_what_a_forward_stores_on_the_model_is_put_back() -> None:
    model = build("activations stored")
    ntk(model, examples("activations stored", 3))
    assert not hasattr(model, "seen")
    assert not hasattr(model.inner, "last")


def test_the_model_can_be_freed() -> None:
    model = build("frozen")
    ntk(model, examples("frozen", 3))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_under_no_grad_inference_mode_and_autocast() -> None:
    model, x = build("group norm"), examples("group norm", 3)
    expected = ntk(model, x)
    with torch.no_grad():
        assert torch.equal(ntk(model, x), expected)
    with torch.inference_mode():
        assert torch.equal(ntk(model, x * 1.0), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ntk(model.float(), x.float()), ntk(model.float(), x.float()))
    assert not expected.requires_grad


def test_freezing_after_a_first_kernel_is_seen() -> None:
    model, x = build("one output"), examples("one output", 3)
    whole = ntk(model, x)
    model.bias.requires_grad_(False)
    torch.testing.assert_close(ntk(model, x), whole - 1)


def test_unused_parameters_give_zero() -> None:
    model = Applied(lambda h: h.detach())
    assert torch.equal(ntk(model, examples("frozen", 3)), torch.zeros(3, 3, dtype=torch.float64))


def test_progress_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    ntk(build("frozen"), examples("frozen", 3), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kind": "classes"}, r"'classes' is unknown; did you mean 'class'\? Choose from 'full', .*'pseudo'"),
        (
            {"batchnorm": "eval"},
            r"batchnorm 'eval' is unknown; choose from 'running', 'batch', \('running', 'batch'\)",
        ),
        ({"products": "fp8"}, r"products 'fp8' is unknown; choose from 'tf32', 'bf16'"),
        ({"products": "bf16"}, r"products='bf16' have float32 sums, not torch.float64"),
        ({"memory": "2 parsecs"}, r"memory='2 parsecs' is not a size"),
        ({"memory": 0}, r"memory=0 is not a size"),
        ({"dtype": torch.int64}, r"dtype=torch.int64 is not a floating-point"),
        ({"x2": torch.zeros(2, 5).double()}, r"x2 holds examples of shape \[5\] .* x of \[6\]"),
        ({"x2": torch.zeros(0, 6).double()}, r"x2 has shape \[0, 6\]; give at least one example"),
    ],
)
def test_bad_settings(words: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ntk(build("frozen"), examples("frozen", 3), **words)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: (h, h), "returns a tuple"),
        (lambda h: h.sum(1), r"shape \[2\]; a kernel needs"),
        (lambda h: h.argmax(1, keepdim=True), "torch.int64"),
        (lambda h: h[:1], r"shape \[1, 3\]"),
    ],
)
def test_wrong_outputs(function: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ntk(Applied(function), examples("frozen", 3))


def test_mixing_examples_raises() -> None:
    with pytest.raises(KernelError, match="mixes examples"):
        ntk(Applied(lambda h: h - h.mean(0)), examples("frozen", 3))


def test_randomness_raises_and_names_the_module() -> None:
    model = nn.Sequential(nn.Linear(6, 3), Noisy()).double()
    with pytest.raises(KernelError, match=r"module '1' \(Noisy\) draws random numbers"):
        ntk(model, examples("frozen", 3))


def test_changing_outputs_raise() -> None:
    count = iter(range(1, 1000))
    with pytest.raises(KernelError, match="gives other outputs at every call"):
        ntk(Applied(lambda h: h * next(count)), examples("frozen", 3))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, training=True)


def test_gradients_that_no_replay_gives_raise() -> None:
    """A straight-through estimator whose gradient depends on the batch."""

    class BatchGradient(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
            return None

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(1)
            return grad * len(seen)

    seen: list[int] = []
    with pytest.raises(KernelError, match="parameter 'linear.weight': no exact per-example gradient"):
        ntk(Applied(BatchGradient.apply), examples("frozen", 3))


def test_batchnorm_without_running_statistics_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    with pytest.raises(KernelError, match=r"module '1' \(BatchNorm1d\) has no running statistics"):
        ntk(model, examples("frozen", 3))


def test_no_parameters_raise() -> None:
    with pytest.raises(KernelError, match="no parameter of the model requires grad"):
        ntk(build("frozen").requires_grad_(False), examples("frozen", 3))


def test_nan_is_counted() -> None:
    x = examples("frozen", 4)
    x[3, 0] = torch.nan
    with pytest.raises(KernelError, match="7 of 16 entries of the kernel are not finite"):
        ntk(build("frozen"), x)
    with pytest.raises(KernelError, match="3 of the model's 6 outputs on 2 examples are"):
        ntk(build("frozen"), x.flip(0))


def test_too_little_memory_names_the_least_that_works() -> None:
    model, x = build("pre-activation block"), examples("pre-activation block", 7)
    with pytest.raises(KernelError, match=r"memory of 0\.0 MiB is too small: .* need 1 MiB"):
        ntk(model, x, memory=4096)
    ntk(model, x, memory="1MiB")


def test_working_memory_stays_within_the_bound() -> None:
    """In a process of its own, for the peak of a process only grows."""
    done = subprocess.run(
        [sys.executable, "-m", "kernels.peak"], capture_output=True, text=True, check=True, cwd=HERE.parent
    )
    growth, jacobian_size = (int(line) / 2**20 for line in done.stdout.split())
    assert jacobian_size > 3 * 32
    assert growth < 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["pre-activation block", "tied embedding", "dropout", "transformer layer"])
def test_the_device_is_the_models(name: str) -> None:
    model, x = build(name), examples(name, 7)
    expected = ntk(model, x, kind="full")
    K = ntk(model.cuda(), x, kind="full")
    assert K.device.type == "cuda"
    assert relative_error(K.cpu(), expected) < 1e-10
