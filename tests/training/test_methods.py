"""One contract for every method: passes, buffer updates, draws, and a loss that falls."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tangentlab.attacks import FGSM, PGD
from tangentlab.attacks.threat import nan_collected
from tangentlab.data import Augmentation
from tangentlab.errors import CheckpointError, ConfigError, DivergedError
from tangentlab.files import read_tensors, write_tensors
from tangentlab.randomness import generator
from tangentlab.runs import load_config
from tangentlab.runs.build import learning_rate
from tangentlab.training import (
    METHODS,
    SCHEDULES,
    Adversarial,
    ATTATraining,
    Batch,
    FGSMPGITraining,
    FGSMRSTraining,
    FGSMTraining,
    FreeTraining,
    GradAlignTraining,
    Memory,
    Method,
    Network,
    NFGSMTraining,
    PGDTraining,
    Standard,
    Step,
    TRADESTraining,
    TrainingState,
    UpdateAlignTraining,
    ZeroGradTraining,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    train,
)

EPS = 0.1
INSTANCES: dict[str, Method] = {
    "standard": Standard(),
    "pgd": PGDTraining(EPS, EPS / 4, 3),
    "trades": TRADESTraining(EPS, EPS / 4, 3),
    "fgsm": FGSMTraining(EPS),
    "fgsm_rs": FGSMRSTraining(EPS),
    "n_fgsm": NFGSMTraining(EPS),
    "free": FreeTraining(EPS, replays=3),
    "grad_align": GradAlignTraining(EPS),
    "zero_grad": ZeroGradTraining(EPS),
    "fgsm_pgi": FGSMPGITraining(EPS),
    "atta": ATTATraining(EPS),
    "update_align": UpdateAlignTraining(EPS),
}
ADVERSARIAL = {name: method for name, method in INSTANCES.items() if isinstance(method, Adversarial)}
# Updates of BatchNorm's buffers in a step, as each method's source has them.
UPDATES = {
    "standard": 1,
    "pgd": 4,
    "trades": 2,
    "fgsm": 2,
    "fgsm_rs": 2,
    "n_fgsm": 2,
    "free": 1,
    "grad_align": 3,
    "zero_grad": 2,
    "fgsm_pgi": 2,
    "atta": 1,
    "update_align": 4,
}
every_method = pytest.mark.parametrize("method", INSTANCES.values(), ids=INSTANCES)
every_adversarial = pytest.mark.parametrize("method", ADVERSARIAL.values(), ids=ADVERSARIAL)


class Counting(nn.Module):
    """Counts forwards, backwards that reach its input alone, and those that reach its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)
        )
        self.forwards = 0
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.seen.append(x.detach().clone())
        return self.layers(x)


def batch(step: int) -> Batch:
    """48 examples in two batches an epoch."""
    draws = generator(0, "batch", step % 2)
    x = torch.rand(24, 1, 4, 4, generator=draws)
    index = torch.arange(24) + 24 * (step % 2)
    return Batch(x, x.flatten(1)[:, :3].argmax(1), index, 48, step // 2)


def state_of(model: nn.Module, lr: float = 0.05) -> TrainingState:
    return TrainingState(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))


def run(state: TrainingState, method: Method, steps: int, **options: object) -> None:
    make = Step(trained=state.model, autocast=nullcontext, backward=lambda loss: loss.backward())
    settings: dict = {
        "batch": lambda step: batch(step // method.replays),
        "learning_rate": lambda _: 0.05,
        "seed": 0,
        "make": make,
        **options,
    }
    train(state, controller=lambda _: method, steps=steps, **settings)


def loss_of(method: Method, model: nn.Module, drawn: Batch, memory: Memory | None = None) -> Tensor:
    memory = Memory() if memory is None else memory
    return method.loss(Network(model, model), drawn, memory=memory, generator=generator(1, "m"))


def test_every_method_is_under_the_contract() -> None:
    assert INSTANCES.keys() == METHODS.keys() == UPDATES.keys()
    assert all(type(INSTANCES[name]) is METHODS[name] for name in METHODS)


@every_method
def test_the_forwards_of_a_step_are_the_ones_stated(method: Method) -> None:
    for each in (method, *([replace(method, clean_weight=0.5)] if _mixes(method) else [])):
        model = Counting()
        run(state := state_of(model), each, 1)
        assert model.forwards == each.passes.forwards
        assert state.passes == each.passes


def _mixes(method: Method) -> bool:
    return isinstance(method, Adversarial) and not isinstance(method, TRADESTraining)


@every_method
def test_the_backwards_of_a_step_are_the_ones_stated(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products tell them: of this network's input, by each layer, and of its weights."""
    model = Counting().train()
    products = {"inputs": 0, "weights": 0}

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, d):
            x, weight = ctx.saved_tensors
            products["inputs"] += ctx.needs_input_grad[0]
            return (d @ weight if ctx.needs_input_grad[0] else None), d.T @ x

    first = model.layers[1]
    monkeypatch.setattr(first, "forward", lambda x: First.apply(x, first.weight) + first.bias)
    first.weight.register_hook(lambda _: products.__setitem__("weights", products["weights"] + 1))
    loss_of(method, model, batch(0)).backward()
    aligned = isinstance(method, UpdateAlignTraining)
    # Crafting computes no gradient of the parameters but those that are aligned.
    assert products["weights"] == 1 + 2 * aligned
    shared = isinstance(method, (FreeTraining, FGSMPGITraining))  # the loss's backward reaches x too
    double = isinstance(method, GradAlignTraining)
    assert products["inputs"] == method.passes.input_backwards + shared + double


@pytest.mark.parametrize("name", INSTANCES)
def test_buffers_are_updated_as_often_as_the_source_has_it(name: str) -> None:
    model = Counting()
    run(state_of(model), INSTANCES[name], 1)
    assert int(model.layers[2].num_batches_tracked) == UPDATES[name]


@every_adversarial
@pytest.mark.parametrize(
    "updates", [("loss",), (), ("clean",), ("loss", "clean"), ("clean", "loss")], ids=lambda u: "+".join(u)
)
def test_buffers_are_updated_by_the_forwards_named(method: Adversarial, updates: tuple[str, ...]) -> None:
    method = replace(method, buffer_updates=updates)
    model = Counting()
    before = [p.clone() for p in model.layers[1].parameters()]
    run(state_of(model), method, 1)
    if method.passes.forwards != model.forwards:
        pytest.fail(f"{model.forwards} forwards, stated {method.passes.forwards}")
    clean = batch(0).x
    of_loss = 2 if isinstance(method, TRADESTraining) else 1
    assert int(model.layers[2].num_batches_tracked) == of_loss * ("loss" in updates) + ("clean" in updates)
    if updates == ("clean",):  # after the update, by the new weights
        expected = 0.1 * model.layers[1](clean.flatten(1)).mean(0)
        assert torch.allclose(model.layers[2].running_mean, expected, atol=1e-6)
    if updates == ("clean", "loss"):
        assert torch.equal(model.seen[0], clean)
        assert not torch.equal(model.layers[1].weight, before[0])
    if updates == ("loss", "clean"):
        assert torch.equal(model.seen[-1], clean)


@every_adversarial
def test_crafting_uses_the_statistics_asked_for(method: Adversarial) -> None:
    def trained_on(statistics: str, mean: float) -> Tensor:
        model = Counting().train()
        model.layers[2].running_mean.fill_(mean)
        changed = replace(method, crafting_statistics=statistics, buffer_updates=("loss",))
        state = state_of(model)
        run(state, changed, 2 if method.replays > 1 else 1)
        assert model.layers[2].training
        return model.seen[-1]

    assert torch.equal(trained_on("batch", 0.0), trained_on("batch", 5.0))
    if method.crafting_passes.input_backwards and not isinstance(method, FreeTraining):
        assert not torch.equal(trained_on("running", 0.0), trained_on("running", 5.0))


@every_adversarial
def test_clean_and_crafted_inputs_take_their_own_branch(method: Adversarial) -> None:
    model = Counting().train()
    model.branch, seen = "crafted", []
    model.register_forward_pre_hook(lambda m, args: seen.append((m.branch, args[0].detach().clone())))
    updates = tuple(name for name in method.buffer_updates if name != "clean")
    method = replace(method, buffer_updates=(*updates, "clean"))
    if _mixes(method):
        method = replace(method, clean_weight=0.5)
    run(state_of(model), method, 1)
    clean = [bool((x == batch(0).x).all()) for name, x in seen if name == "clean"]
    trades = isinstance(method, TRADESTraining)
    assert clean == [True] * (3 if trades else 2)  # TRADES: the divergence's other end, the loss; the update
    assert len(seen) > len(clean)
    assert model.branch == "crafted"


@every_adversarial
def test_what_is_trained_on_is_in_the_ball_and_the_box(method: Adversarial) -> None:
    model = Counting()
    state = state_of(model)
    for steps in range(1, 7):
        model.seen.clear()
        run(state, method, steps)
        clean = batch((steps - 1) // method.replays).x
        for number, x in enumerate(model.seen):
            if not (isinstance(method, GradAlignTraining) and number == 1):  # the noise of its penalty
                assert x.min() >= 0
                assert x.max() <= 1
            bound = method.attack.bound if isinstance(method, NFGSMTraining) else EPS
            assert (x - clean).abs().max() <= bound + 1e-6
    assert (model.seen[-1] - clean).abs().max() > 0.5 * EPS


@every_method
def test_the_loss_falls(method: Method) -> None:
    state = state_of(Counting())
    run(state, method, 6)
    early = float(state.loss_sum)
    run(state, method, 240)
    state.loss_sum.zero_()
    run(state, method, 246)
    assert float(state.loss_sum) < 0.9 * early


@every_method
def test_the_wrapper_is_called_once_and_crafting_goes_around_it(method: Method) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)

    model = Counting().train()
    wrapper = Wrapper(model)
    method.loss(Network(bare=model, trained=wrapper), batch(0), memory=Memory(), generator=generator(0, "m"))
    assert wrapper.calls == 1
    assert model.forwards == method.passes.forwards


@every_method
def test_a_resumed_training_equals_the_uninterrupted_one(method: Method, tmp_path) -> None:
    whole = state_of(Counting())
    run(whole, method, 9)
    first = state_of(Counting())
    run(first, method, 4)
    save_checkpoint(tmp_path / "last", first, {"note": [1, None]}, {"k": torch.eye(2)})
    assert bool(first.memory.tensors) == isinstance(method, (FreeTraining, FGSMPGITraining, ATTATraining))
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


def test_training_does_not_go_on_from_another_versions_checkpoint(tmp_path) -> None:
    save_checkpoint(tmp_path / "last", state_of(Counting()), {}, {})
    tensors, metadata = read_tensors(tmp_path / "last")
    del metadata["format"]
    write_tensors(tmp_path / "last", tensors, metadata)
    with pytest.raises(CheckpointError, match="another version's"):
        load_checkpoint(tmp_path / "last", state_of(Counting()))
    load_weights(tmp_path / "last", Counting())  # its network can be used all the same


@every_adversarial
def test_a_method_keeps_perturbations_where_another_starts(method: Adversarial) -> None:
    """ATTA's first step after another method is from what that one's last epoch crafted."""
    if method.replays > 1:
        pytest.skip("takes each batch several times, which ATTA does not")
    kept = replace(method, keep_perturbations=True)
    state, plain = state_of(Counting()), state_of(Counting())
    run(state, kept, 2)
    run(plain, method, 2)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, state.model.state_dict()[name]), name
    x = batch(2).x
    crafted = plain.model.seen[method.passes.forwards - 1]
    delta = state.memory.tensors["perturbation"][batch(2).index]
    assert torch.equal(delta, crafted - x)
    run(state, ATTATraining(EPS, reset_epochs=10), 3)
    first = state.model.seen[len(plain.model.seen)]
    assert torch.allclose(first, (x + delta.clamp(-EPS, EPS)).clamp(0, 1))


@every_adversarial
def test_a_mixed_loss_is_the_weighted_mean(method: Adversarial) -> None:
    if not _mixes(method):
        with pytest.raises(ConfigError, match="clean_weight=0.5: TRADES has a clean term"):
            replace(method, clean_weight=0.5)
        return
    drawn = batch(0)
    crafted = loss_of(method, Counting().train(), drawn)
    clean = F.cross_entropy(Counting().train()(drawn.x), drawn.y)
    mixed = loss_of(replace(method, clean_weight=0.25), Counting().train(), drawn)
    penalty = crafted - F.cross_entropy(Counting().train()(_trained_on(method, drawn)), drawn.y)
    assert torch.allclose(mixed, 0.75 * (crafted - penalty) + 0.25 * clean + penalty, atol=1e-5)


def _trained_on(method: Adversarial, drawn: Batch) -> Tensor:
    """What the wrapper sees."""
    model = Counting().train()
    seen: list[Tensor] = []
    wrapper = nn.Sequential(model)
    wrapper.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    method.loss(Network(model, wrapper), drawn, memory=Memory(), generator=generator(1, "m"))
    return seen[0]


@every_method
def test_label_smoothing_is_torchs(method: Method) -> None:
    drawn = batch(0)
    smooth = replace(method, label_smoothing=0.3)
    found = loss_of(smooth, Counting().train(), drawn)
    assert not torch.allclose(found, loss_of(method, Counting().train(), drawn))
    penalised = (TRADESTraining, GradAlignTraining, FGSMPGITraining, UpdateAlignTraining)
    if not isinstance(method, penalised):
        x = drawn.x if isinstance(method, Standard) else _trained_on(smooth, drawn)
        expected = F.cross_entropy(Counting().train()(x), drawn.y, label_smoothing=0.3)
        assert torch.allclose(found, expected, atol=1e-6)


def test_grad_align_is_equation_5_with_noise_that_may_leave_the_box() -> None:
    method, drawn, model = GradAlignTraining(0.3, alignment=2.0), batch(0), Counting().train()
    found = loss_of(method, model, drawn)
    noise = (2 * torch.rand(drawn.x.shape, generator=generator(1, "m")) - 1) * 0.3
    assert ((drawn.x + noise < 0) | (drawn.x + noise > 1)).any()
    reference = Counting().train()
    gradients = []
    for point in (drawn.x, drawn.x + noise):
        leaf = point.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(reference(leaf), drawn.y, reduction="sum"), leaf)
        gradients.append(gradient.flatten(1))
    crafted = (drawn.x + 0.3 * gradients[0].reshape(drawn.x.shape).sign()).clamp(0, 1)
    penalty = 1 - F.cosine_similarity(*gradients).mean()
    expected = F.cross_entropy(reference(crafted), drawn.y) + 2.0 * penalty
    assert torch.allclose(found, expected, atol=1e-5)


def test_an_average_of_the_weights_is_kept_saved_and_judged(tmp_path) -> None:
    def averaged_state() -> TrainingState:
        state = state_of(Counting())
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        state.averaged = torch.optim.swa_utils.AveragedModel(
            state.model, multi_avg_fn=average, use_buffers=True
        )
        return state

    weights: list[Tensor] = []
    state = averaged_state()
    run(state, Standard(), 6, hooks=[lambda s: weights.append(s.model.layers[1].weight.detach().clone())])
    expected = weights[1]
    for weight in weights[2:]:
        expected = 0.5 * expected + 0.5 * weight
    assert torch.allclose(state.evaluated.layers[1].weight, expected, atol=1e-6)
    save_checkpoint(tmp_path / "last", state, {}, {})
    judged = Counting()
    load_weights(tmp_path / "last", judged)
    assert torch.equal(judged.layers[1].weight, state.evaluated.layers[1].weight)
    resumed = averaged_state()
    load_checkpoint(tmp_path / "last", resumed)
    run(resumed, Standard(), 9)
    run(state, Standard(), 9)
    for name, value in state.averaged.module.state_dict().items():
        assert torch.equal(value, resumed.averaged.module.state_dict()[name]), name


def test_hooks_see_step_zero_and_every_step_once() -> None:
    seen: list[int] = []
    state = state_of(Counting())
    run(state, Standard(), 3, hooks=[lambda s: seen.append(s.step)])
    run(state, Standard(), 5, hooks=[lambda s: seen.append(s.step)])
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_stops_at_its_step() -> None:
    def poisoned(step: int) -> Batch:
        drawn = batch(step)
        return replace(drawn, x=drawn.x * float("nan")) if step == 2 else drawn

    state = state_of(Counting())
    with pytest.raises(DivergedError, match="the loss is nan at step 3"):
        run(state, Standard(), 5, batch=poisoned)


class Waits(TorchDispatchMode):
    """Names the operators that a device's results would be waited for in."""

    names = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # Counters are whole numbers and stay on the CPU on every device; torch.quantile of torch 2.11 checks
        # its argument so, on the CPU alone.
        if name in self.names and not (
            args[0].dtype == torch.int64 or (name == "equal" and args[0].dim() == 0)
        ):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


@every_method
@pytest.mark.parametrize("quiet", [False, True])
def test_a_loss_waits_for_nothing(method: Method, quiet: bool) -> None:
    if quiet and isinstance(method, Adversarial):
        method = replace(method, buffer_updates=("loss",))
    model, memory, view = Counting().train(), Memory(), Augmentation()
    drawn = replace(batch(0), view=lambda: view.place(batch(0).x, generator=generator(0, "view")))
    with Waits() as waits, nan_collected():
        for _ in range(2):  # the second begins from what the first stored
            loss_of(method, model, drawn, memory).backward()
            method.finish(Network(model, model), drawn)
            memory.exchange()
    assert not waits.seen


@pytest.mark.parametrize("poison", [False, True])
def test_a_nan_that_is_collected_is_found_in_the_loss(poison: bool) -> None:
    x = torch.full((2, 1, 4, 4), torch.nan if poison else 0.5)
    with nan_collected() as seen:
        FGSM(EPS)(Counting(), x, torch.tensor([0, 1]))
    assert [bool(one) for one in seen] == [poison]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_method
def test_steps_on_a_gpu_wait_for_nothing(method: Method) -> None:
    state = state_of(Counting().cuda())
    state.loss_sum = state.loss_sum.cuda()
    batches = [replace(b, x=b.x.cuda(), y=b.y.cuda(), index=b.index.cuda()) for b in map(batch, range(2))]
    draw = {"batch": lambda step: batches[step // method.replays % 2]}
    run(state, method, 4, **draw)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(state, method, 8, **draw)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
        ("cosine", [1, 0.8535533906, 0.5, 0.0954915028]),
        ("linear", [0, 0.5, 1, 1]),
    ],
)
def test_schedules(name: str, values: list[float]) -> None:
    assert [SCHEDULES[name](p) for p in (0.0, 0.25, 0.5, 0.8)] == pytest.approx(values)


def test_the_learning_rate_warms_up_to_its_schedule() -> None:
    words = ["--training.learning_rate=0.2", "--training.schedule=piecewise", "--training.warmup=0.4"]
    rate = learning_rate(load_config("digits", words), 10)
    assert [rate(step) for step in range(10)] == pytest.approx(
        [0.05, 0.1, 0.15, *[0.2] * 2, *[0.02] * 3, *[0.002] * 2]
    )
    without = learning_rate(load_config("digits", words[:2]), 10)
    assert [without(step) for step in range(10)] == pytest.approx([*[0.2] * 5, *[0.02] * 3, *[0.002] * 2])


def test_the_attacks_are_the_methods_settings() -> None:
    assert FGSMTraining(0.2).attack == FGSM(0.2)
    assert PGDTraining(0.2, 0.1, 7, random_start=False).attack == PGD(0.2, 0.1, 7, random_start=False)
    with pytest.raises(ConfigError, match="eps=8 is out of range"):
        PGDTraining(8, 0.1)
    assert PGDTraining(0.2, 0.1, 10).passes == (11, 10, 1)


def test_aligned_updates_minimise_what_is_stated() -> None:
    """The penalty's value and gradient, against central differences of the cosine with g_P held."""
    drawn = replace(batch(0), x=batch(0).x.double())
    model = Counting().double().train()
    model.layers[3] = nn.Softplus()
    parameters = list(model.parameters())
    one_step = FGSM(EPS)(model, drawn.x, drawn.y)
    several = PGD(EPS, EPS / 2, 2, random_start=False)(model, drawn.x, drawn.y)

    def gradient(x: Tensor) -> Tensor:
        found = torch.autograd.grad(F.cross_entropy(model(x), drawn.y), parameters)
        return torch.cat([part.flatten() for part in found])

    g_p = gradient(several)

    def expected() -> float:
        cosine = torch.cosine_similarity(gradient(one_step), g_p, dim=0)
        return float(F.cross_entropy(model(one_step), drawn.y).detach() + 2 * (1 - cosine))

    method = UpdateAlignTraining(EPS, alignment=2.0)
    loss = loss_of(method, model, drawn)
    assert float(loss.detach()) == pytest.approx(expected(), rel=1e-10)
    found = torch.autograd.grad(loss, parameters)
    for parameter, slope in zip(parameters, found, strict=True):
        entry, step = int(slope.abs().argmax()), 1e-5
        values = []
        for moved in (step, -step):
            with torch.no_grad():
                parameter.view(-1)[entry] += moved
            values.append(expected())
            with torch.no_grad():
                parameter.view(-1)[entry] -= moved
        difference = (values[0] - values[1]) / (2 * step)
        assert float(slope.flatten()[entry]) == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_one_cycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=1001, cycle_momentum=False
    )
    for step in range(1000):
        assert SCHEDULES["one_cycle"](step / 1000) == pytest.approx(torchs.get_last_lr()[0], abs=4e-3)
        optimizer.step()
        torchs.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGDTraining(EPS, EPS, label_smoothing=1.0), r"label_smoothing=1.0 is out of range \[0, 1\)"),
        (lambda: FGSMTraining(EPS, clean_weight=-0.1), "clean_weight=-0.1 is out of range"),
        (lambda: FGSMTraining(EPS, crafting_statistics="both"), "crafting_statistics 'both' is unknown"),
        (lambda: FGSMTraining(EPS, buffer_updates=("attack",)), "buffer_updates 'attack' is unknown"),
        (lambda: FGSMTraining(EPS, buffer_updates=("loss", "loss")), "names a forward twice"),
        (lambda: FGSMTraining(EPS, crafting_statistics="running"), "only batch statistics can update"),
        (lambda: FreeTraining(EPS, replays=0), "replays=0 is out of range"),
        (lambda: ZeroGradTraining(EPS, quantile=1.0), "quantile=1.0 is out of range"),
        (lambda: GradAlignTraining(EPS, alignment=0.0), "alignment=0.0 is out of range"),
        (lambda: UpdateAlignTraining(EPS, alignment=0.0), "alignment=0.0 is out of range"),
        (lambda: TRADESTraining(EPS, EPS, beta=0.0), "beta=0.0 is out of range"),
        (lambda: TRADESTraining(EPS, EPS, num_steps=0), "num_steps=0 is out of range"),
        (lambda: ATTATraining(EPS, reset_epochs=0), "reset_epochs=0 is out of range"),
        (lambda: FGSMPGITraining(EPS, decay=1.0), "decay=1.0 is out of range"),
        (lambda: FGSMPGITraining(8), "eps=8 is out of range"),
    ],
)
def test_settings_out_of_range_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
