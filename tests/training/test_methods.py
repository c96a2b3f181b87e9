"""One contract for every method: passes, buffer updates, draws, and a loss that falls."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangentlab.attacks import FGSM, PGD
from tangentlab.errors import CheckpointError, ConfigError, DivergedError
from tangentlab.randomness import generator
from tangentlab.training import (
    METHODS,
    SCHEDULES,
    FGSMTraining,
    Method,
    Network,
    PGDTraining,
    Standard,
    Step,
    TrainingState,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    train,
)

EPS = 0.1
INSTANCES: dict[str, Method] = {
    "standard": Standard(),
    "fgsm": FGSMTraining(EPS),
    "pgd": PGDTraining(EPS, EPS / 4, 3),
}


class Counting(nn.Module):
    """Counts forwards, and backwards that reach its input or its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)
        )
        self.forwards = self.input_backwards = self.full_backwards = 0
        self.layers[1].weight.register_hook(lambda _: self._count("full_backwards"))

    def _count(self, name: str) -> None:
        setattr(self, name, getattr(self, name) + 1)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if x.requires_grad:
            x.register_hook(lambda _: self._count("input_backwards"))
        return self.layers(x)


def batch(step: int) -> tuple[Tensor, Tensor]:
    draws = generator(0, "batch", step)
    x = torch.rand(24, 1, 4, 4, generator=draws)
    return x, x.flatten(1)[:, :3].argmax(1)


def state_of(model: nn.Module, lr: float = 0.05) -> TrainingState:
    return TrainingState(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))


def run(state: TrainingState, method: Method, steps: int, **options: object) -> None:
    make = Step(trained=state.model, autocast=nullcontext, backward=lambda loss: loss.backward())
    settings: dict = {"batch": batch, "learning_rate": lambda _: 0.05, "seed": 0, "make": make, **options}
    train(state, method=method, steps=steps, **settings)


def test_every_method_is_under_the_contract() -> None:
    assert INSTANCES.keys() == METHODS.keys()
    assert all(type(INSTANCES[name]) is METHODS[name] for name in METHODS)


@pytest.mark.parametrize("method", INSTANCES.values(), ids=INSTANCES)
def test_the_passes_of_a_step_are_the_ones_stated(method: Method) -> None:
    model = Counting()
    run(state := state_of(model), method, 1)
    assert (model.forwards, model.input_backwards, model.full_backwards) == method.passes
    assert state.passes == method.passes


@pytest.mark.parametrize("method", INSTANCES.values(), ids=INSTANCES)
def test_batchnorm_is_updated_once_a_step_by_the_batch_that_is_trained_on(method: Method) -> None:
    model = Counting()
    x, y = batch(0)
    attack = getattr(method, "attack", None)
    model.train()
    trained_on = x if attack is None else attack(model, x, y, generator=generator(0, "method", 0))
    expected = 0.1 * model.layers[1](trained_on.flatten(1)).mean(0)
    run(state_of(model), method, 1)
    assert int(model.layers[2].num_batches_tracked) == 1
    assert torch.allclose(model.layers[2].running_mean, expected, atol=1e-6)


@pytest.mark.parametrize("method", INSTANCES.values(), ids=INSTANCES)
def test_the_loss_is_the_one_of_the_stated_attack_and_it_falls(method: Method) -> None:
    model = Counting().train()
    x, y = batch(0)
    attack = getattr(method, "attack", None)
    crafted = x if attack is None else attack(model, x, y, generator=generator(1, "m"))
    expected = F.cross_entropy(model(crafted), y)
    loss = method.loss(Network(model, model), x, y, generator=generator(1, "m"))
    assert torch.allclose(loss, expected)
    state = state_of(Counting())
    run(state, method, 5)
    early = float(state.loss_sum)
    state.loss_sum.zero_()
    state.step, after = 5, 60
    run(state, method, after)
    state.loss_sum.zero_()
    run(state, method, after + 5)
    assert float(state.loss_sum) < 0.9 * early


@pytest.mark.parametrize("method", INSTANCES.values(), ids=INSTANCES)
def test_the_crafting_goes_through_the_bare_module(method: Method) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)

    model = Counting().train()
    wrapper = Wrapper(model)
    method.loss(Network(bare=model, trained=wrapper), *batch(0), generator=generator(0, "m"))
    assert wrapper.calls == 1
    assert model.forwards == method.passes.forwards


@pytest.mark.parametrize("method", INSTANCES.values(), ids=INSTANCES)
def test_a_resumed_training_equals_the_uninterrupted_one(method: Method, tmp_path) -> None:
    whole = state_of(Counting())
    run(whole, method, 9)
    first = state_of(Counting())
    run(first, method, 4)
    save_checkpoint(tmp_path / "last", first, {"note": [1, None]}, {"k": torch.eye(2)})
    resumed = state_of(Counting())
    extra, tensors = load_checkpoint(tmp_path / "last", resumed)
    assert extra == {"note": [1, None]}
    assert torch.equal(tensors["k"], torch.eye(2))
    torch.manual_seed(123)  # global state is not what it depends on
    run(resumed, method, 9)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert torch.equal(whole.loss_sum, resumed.loss_sum)
    assert whole.passes == resumed.passes
    assert whole.summed_learning_rate == resumed.summed_learning_rate
    for a, b in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


def test_hooks_see_step_zero_and_every_step_once() -> None:
    seen: list[int] = []
    state = state_of(Counting())
    run(state, Standard(), 3, hooks=[lambda s: seen.append(s.step)])
    run(state, Standard(), 5, hooks=[lambda s: seen.append(s.step)])
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_stops_at_its_step() -> None:
    def poisoned(step: int) -> tuple[Tensor, Tensor]:
        x, y = batch(step)
        return (x * float("nan") if step == 2 else x), y

    state = state_of(Counting())
    with pytest.raises(DivergedError, match="the loss is nan at step 3"):
        run(state, Standard(), 5, batch=poisoned)


def test_a_checkpoint_of_another_model_is_named(tmp_path) -> None:
    state = state_of(Counting())
    save_weights(tmp_path / "best", state, {"epoch": 1.0})
    other = Counting()
    other.layers[4] = nn.Linear(12, 5)
    with pytest.raises(
        CheckpointError,
        match=r"another model: layers.4.weight has shape \(3, 12\), not \(5, 12\) \(and 1 more",
    ):
        load_weights(tmp_path / "best", other)
    with pytest.raises(CheckpointError, match="another model: weight is missing"):
        load_weights(tmp_path / "best", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="does not hold a training state"):
        load_checkpoint(tmp_path / "best", state)
    assert load_weights(tmp_path / "best", Counting()) == {"step": 0, "extra": {"epoch": 1.0}}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", [1, 1, 1, 1]),
        ("piecewise", [1, 1, 0.1, 0.01]),
        ("cyclic", [0, 0.625, 5 / 6, 1 / 3]),
    ],
)
def test_schedules(name: str, values: list[float]) -> None:
    assert [SCHEDULES[name](p) for p in (0.0, 0.25, 0.5, 0.8)] == pytest.approx(values)


def test_the_attacks_are_the_methods_settings() -> None:
    assert FGSMTraining(0.2).attack == FGSM(0.2)
    assert PGDTraining(0.2, 0.1, 7, random_start=False).attack == PGD(0.2, 0.1, 7, random_start=False)
    with pytest.raises(ConfigError, match="eps=8 is out of range"):
        PGDTraining(8, 0.1)
    assert PGDTraining(0.2, 0.1, 10).passes == (11, 10, 1)
