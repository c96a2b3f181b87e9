"""The batch-statistics and mixed kernels against torch.func.jacrev of the whole batch, and their purpose."""

from __future__ import annotations

import copy
import ctypes
import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tangentlab.errors import KernelError
from tangentlab.kernels import batch
from tangentlab.kernels.batch import BatchPlan, batch_ntk, batch_plan
from tangentlab.modes import batchnorm_modules, evaluation, preserved

from .reference import KINDS, functional_batch_jacobian, jacobian, kernel, relative_error
from .zoo import PreActivation, images, with_statistics

HERE = Path(__file__).parent
SIDES = ("batch", ("running", "batch"))
IMAGE, VECTOR = (2, 8, 7), (6,)


def computed(
    model: nn.Module,
    x: Tensor,
    x2: Tensor | None = None,
    *,
    kind: str = "trace",
    batchnorm: object = "batch",
    memory: int = 2**30,
    dtype: torch.dtype | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    with preserved(model), evaluation(model):
        return batch_ntk(
            model,
            x,
            x2,
            kind=kind,
            mixed=batchnorm != "batch",
            limit=memory,
            dtype=dtype or next(model.parameters()).dtype,
            advance=advance,
        )


def planned(
    model: nn.Module, x: Tensor, x2: Tensor | None, kind: str, batchnorm: object, memory: int
) -> BatchPlan:
    with preserved(model), evaluation(model):
        dtype = next(model.parameters()).dtype
        return batch_plan(model, x, x2, kind=kind, mixed=batchnorm != "batch", limit=memory, dtype=dtype)


def expected(model: nn.Module, x: Tensor, x2: Tensor | None, kind: str, batchnorm: object) -> Tensor:
    left = functional_batch_jacobian(model, x) if batchnorm == "batch" else jacobian(model, x)
    return kernel(left, functional_batch_jacobian(model, x if x2 is None else x2), kind)


class Tied(nn.Module):
    """One weight in two layers, a parameter of its own, and one that is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight
        self.norm, self.shift = nn.BatchNorm1d(6), nn.Parameter(torch.randn(6))
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).tanh() + self.shift).tanh())


class Checkpointed(nn.Module):
    """Runs its body again in its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), *layers, nn.Tanh(), nn.Linear(5, 3))


def frozen() -> nn.Module:
    model = images(PreActivation())
    model[0][0].conv1.weight.requires_grad_(False)
    model[0][0].bn2.bias.requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d, residual, in-place relu": (lambda: images(PreActivation()), IMAGE),
    "2d, not affine": (
        lambda: images(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=0.03, affine=False), nn.Tanh(), nn.Conv2d(4, 3, 3)
        ),
        IMAGE,
    ),
    "1d": (lambda: flat(nn.BatchNorm1d(5, eps=0.1)), VECTOR),
    "1d, dropout": (lambda: flat(nn.BatchNorm1d(5), nn.Dropout(0.5)), VECTOR),
    "frozen": (frozen, IMAGE),
    "tied and unused": (Tied, VECTOR),
    "no batchnorm": (flat, VECTOR),
}


def build(name: str) -> nn.Module:
    return drawn(MODELS[name][0])


def drawn(builder: Callable[[], nn.Module]) -> nn.Module:
    """The model in float64, from a fixed seed, with running statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return with_statistics(builder()).double()


def examples(shape: tuple[int, ...], n: int, seed: int = 2) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("batchnorm", SIDES, ids=["batch", "mixed"])
@pytest.mark.parametrize("m", [None, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_equals_the_jacobians_product(name: str, m: int | None, batchnorm: object) -> None:
    model, shape = build(name), MODELS[name][1]
    for n in (5, 3):  # more and fewer than m
        x, x2 = examples(shape, n), None if m is None else examples(shape, m, seed=3)
        for kind in KINDS:
            K = computed(model, x, x2, kind=kind, batchnorm=batchnorm)
            assert K.is_contiguous()
            assert not K.requires_grad
            assert relative_error(K, expected(model, x, x2, kind, batchnorm)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_bit_for_bit(kind: str) -> None:
    K = computed(build("1d"), examples(VECTOR, 7), kind=kind)
    assert torch.equal(K, K.permute(1, 0, 3, 2) if kind == "full" else K.mT)


def test_without_batchnorm_it_is_the_running_kernel() -> None:
    model, x = build("no batchnorm"), examples(VECTOR, 5)
    J = jacobian(model, x)
    assert relative_error(computed(model, x, kind="full"), kernel(J, J, "full")) < 1e-12


def test_one_image_has_batch_statistics() -> None:
    name = "2d, residual, in-place relu"
    model, x = build(name), examples(IMAGE, 1)
    for batchnorm in SIDES:
        K = computed(model, x, kind="full", batchnorm=batchnorm)
        assert relative_error(K, expected(model, x, None, "full", batchnorm)) < 1e-11


def test_a_checkpointed_module_keeps_its_batch_statistics_in_the_backward() -> None:
    model, x = drawn(Checkpointed), examples(VECTOR, 5)
    plain = nn.Sequential(model.body, model.head)
    for batchnorm in SIDES:
        K = computed(model, x, kind="class", batchnorm=batchnorm)
        assert relative_error(K, expected(plain, x, None, "class", batchnorm)) < 1e-11


def test_untracked_statistics_suit_the_batch_kernel_only() -> None:
    model = drawn(lambda: flat(nn.BatchNorm1d(5)))
    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    x = examples(VECTOR, 5)
    assert relative_error(computed(model, x), expected(model, x, None, "trace", "batch")) < 1e-11
    with pytest.raises(KernelError, match=r"module '1' \(BatchNorm1d\) has no running statistics"):
        computed(model, x, batchnorm=("running", "batch"))


def test_unused_parameters_give_zero() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).detach()

    assert torch.equal(computed(Constant(), examples(VECTOR, 3)), torch.zeros(3, 3).double())


def test_float32_is_accurate_and_float64_sums_are_more_so() -> None:
    name = "2d, residual, in-place relu"
    model, x, x2 = build(name), examples(IMAGE, 5), examples(IMAGE, 4, seed=3)
    for batchnorm in SIDES:
        wanted = expected(model, x, x2, "full", batchnorm)
        single = copy.deepcopy(model).float(), x.float(), x2.float()
        K = computed(*single, kind="full", batchnorm=batchnorm)
        assert K.dtype == torch.float32
        assert relative_error(K.double(), wanted) < 1e-4
        K = computed(*single, kind="full", batchnorm=batchnorm, dtype=torch.float64)
        assert K.dtype == torch.float64
        assert relative_error(K, wanted) < 1e-4


@pytest.mark.parametrize("batchnorm", SIDES, ids=["batch", "mixed"])
@pytest.mark.parametrize("m", [None, 4])
@pytest.mark.parametrize("kind", ["full", "class"])
def test_less_memory_gives_more_passes_and_the_same_kernel(
    kind: str, m: int | None, batchnorm: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_LEAST_COLUMNS", 7)
    model = drawn(lambda: nn.Sequential(nn.Linear(6, 50), nn.BatchNorm1d(50), nn.Tanh(), nn.Linear(50, 3)))
    x, x2 = examples(VECTOR, 5), None if m is None else examples(VECTOR, m, seed=3)
    wanted = expected(model, x, x2, kind, batchnorm)
    plans: list[BatchPlan] = []
    for memory in (int(300_000 * 0.98**i) for i in range(150)):
        try:
            plan = planned(model, x, x2, kind, batchnorm, memory)
        except KernelError:
            break
        assert plan.bytes < memory
        assert all_elements_once(plan, model)
        if plans and plan.passes == plans[-1].passes:
            continue
        plans.append(plan)
        done: list[int] = []
        K = computed(
            model,
            x,
            x2,
            kind=kind,
            batchnorm=batchnorm,
            memory=memory,
            advance=lambda: done.append(1),  # noqa: B023
        )
        assert len(done) == plan.backwards
        assert relative_error(K, wanted) < 1e-11
    passes = [plan.passes for plan in plans]
    assert passes == sorted(passes)
    assert passes[0] == 1
    assert passes[-1] > 6  # more than there are parameters: some are sliced


def all_elements_once(plan: BatchPlan, model: nn.Module) -> bool:
    pieces = [piece for group in plan.groups for piece in group]
    counts = {name: torch.zeros(p.numel()) for name, p in model.named_parameters()}
    for name, start, stop in pieces:
        counts[name][start:stop] += 1
    return all(bool((count == 1).all()) for count in counts.values())


def test_too_little_memory_names_the_least_that_works() -> None:
    model, x = build("2d, residual, in-place relu").float(), examples(IMAGE, 40).float()
    with pytest.raises(KernelError, match=r"memory of 0\.0 MiB is too small: .* need [1-9] MiB") as error:
        computed(model, x, kind="full", memory=4096)
    least = int(str(error.value).split()[-2]) * 2**20
    planned(model, x, None, "full", "batch", least)
    with pytest.raises(KernelError):
        planned(model, x, None, "full", "batch", least - 2**20)


def test_working_memory_stays_within_the_bound() -> None:
    """In a process of its own, for the peak of a process only grows."""
    program = "from kernels.test_batch import print_peaks; print_peaks()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=HERE.parent
    )
    growth, jacobian_size = (int(line) / 2**20 for line in done.stdout.split())
    assert jacobian_size > 3 * 64
    assert growth < 64


def print_peaks() -> None:
    """The growth of the peak resident memory, after a warm-up, of kernels within 64 MiB; J's size."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=4, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 64, 200),
        nn.BatchNorm1d(200),
        nn.ReLU(),
        nn.Linear(200, 5),
    )
    x = torch.rand(28, 3, 32, 32)
    computed(model, x[:2])
    before = peak()
    for words in (
        *({"x2": x2, "kind": "pseudo", "batchnorm": side} for x2 in (None, x[:14]) for side in SIDES),
        {"x2": x[:14], "kind": "class"},
        {"kind": "full"},
    ):
        # What one kernel has freed the heap keeps, and a block that is larger than each hole comes on top.
        ctypes.CDLL(None).malloc_trim(0)
        computed(model, x, memory=64 * 2**20, **words)  # type: ignore[arg-type]
    print(peak() - before)  # noqa: T201
    print(len(x) * 5 * sum(p.nbytes for p in model.parameters()))  # noqa: T201


@pytest.mark.parametrize("batchnorm", SIDES, ids=["batch", "mixed"])
def test_the_model_comes_back_as_it_was(batchnorm: object) -> None:
    model = build("2d, residual, in-place relu").train()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    model[3].weight.grad = torch.ones_like(model[3].weight)
    with preserved(model), evaluation(model):
        batch_ntk(
            model,
            examples(IMAGE, 4),
            None,
            kind="class",
            mixed=batchnorm != "batch",
            limit=2**30,
            dtype=torch.float64,
            advance=lambda: None,
        )
        # Also before anything is put back.
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(module.training for module in model.modules())
        assert all(module.track_running_stats for module in batchnorm_modules(model))
    assert [module.training for module in model.modules()] == modes
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"3.weight"}
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("batchnorm", SIDES, ids=["batch", "mixed"])
def test_nothing_is_left_in_memory(batchnorm: object) -> None:
    """Not even until the garbage collector comes: graphs are large."""
    model, x = build("2d, residual, in-place relu"), examples(IMAGE, 4)

    def alive() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    computed(model, x, batchnorm=batchnorm)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        computed(model, x, batchnorm=batchnorm)
        assert alive() == before
    finally:
        gc.enable()


def test_a_batch_of_one_vector_raises() -> None:
    model = build("1d")
    with pytest.raises(KernelError, match="a batch of 1 is too small for the batch statistics"):
        computed(model, examples(VECTOR, 1))
    with pytest.raises(KernelError, match="a batch of 1 is too small"):
        computed(model, examples(VECTOR, 3), examples(VECTOR, 1), batchnorm=("running", "batch"))
    assert computed(model, examples(VECTOR, 1), examples(VECTOR, 3), batchnorm=SIDES[1]).shape == (1, 3)


class Noisy(nn.Module):
    """Draws random numbers where BatchNorm is in training mode, or where it is not."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.norm, self.head, self.noisy = nn.BatchNorm1d(6), nn.Linear(6, 3), training
        self.noise = Noise()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head(self.noise(h) if self.norm.training == self.noisy else h)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True)


@pytest.mark.parametrize(("training", "batchnorm"), [(True, "batch"), (True, SIDES[1]), (False, SIDES[1])])
def test_randomness_raises_on_either_side(training: bool, batchnorm: object) -> None:
    with pytest.raises(KernelError, match=r"module 'noise' \(Noise\) draws random numbers"):
        computed(drawn(lambda: Noisy(training)), examples(VECTOR, 4), batchnorm=batchnorm)


class Clipped(nn.Linear):
    """Changes its weight in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clamp(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("batchnorm", SIDES, ids=["batch", "mixed"])
def test_a_forward_that_changes_a_parameter_raises(batchnorm: object) -> None:
    model = drawn(lambda: nn.Sequential(Clipped(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    with pytest.raises(KernelError, match=r"parameter '0.weight' is changed by the model's forward"):
        computed(model, examples(VECTOR, 4), batchnorm=batchnorm)


class Scaled(nn.Module):
    """A convolution of weight s·w before a BatchNorm, only s trained: its gradient is that along w."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(2, 3, 3)
        self.register_buffer("weight", conv.weight.detach())
        self.scale = nn.Parameter(torch.ones(()))
        self.rest = images(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, eps=1e-12)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        _, norm = self.rest[0]
        return self.rest[1:](norm(F.conv2d(x, self.scale * self.weight)))


def test_the_scale_of_a_weight_before_batchnorm_is_annihilated() -> None:
    """J_batch w = 0, and J_eval w is not."""
    model, x = drawn(Scaled), examples(IMAGE, 5)
    J = jacobian(model, x)
    size = float(kernel(J, J, "trace").abs().max())
    assert size > 1e-2
    assert float(computed(model, x).abs().max()) < 1e-18 * size
    assert float(computed(model, x, batchnorm=SIDES[1]).abs().max()) < 1e-9 * size


def test_the_mixed_kernel_predicts_a_training_step() -> None:
    """f_eval(x; θ − η ∇L) − f_eval(x; θ) = −η Θ_mixed ∂L/∂f + O(η²), the buffers as they were."""
    name = "2d, residual, in-place relu"
    model, x, x2 = build(name).eval(), examples(IMAGE, 3), examples(IMAGE, 6, seed=3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    twin = copy.deepcopy(model)
    for module in batchnorm_modules(twin):
        module.train()
    logits = twin(x2)
    loss = F.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True)
    (cotangent,) = torch.autograd.grad(loss, logits)
    K = computed(model, x, x2, kind="full", batchnorm=("running", "batch"))
    slope = -torch.einsum("ijcd,jd->ic", K, cotangent)

    def error(step_size: float) -> float:
        stepped = copy.deepcopy(model)
        with torch.no_grad():
            for p, gradient in zip(stepped.parameters(), gradients, strict=True):
                p -= step_size * gradient
            return float((stepped(x) - model(x) - step_size * slope).norm())

    with torch.no_grad():
        assert error(1e-3) < 0.1 * float(1e-3 * slope.norm())
    assert 80 < error(1e-3) / error(1e-4) < 120
    running = jacobian(model, x)
    wrong = -torch.einsum("ijcd,jd->ic", kernel(running, jacobian(model, x2), "full"), cotangent)
    assert float((wrong - slope).norm()) > 0.1 * float(slope.norm())
