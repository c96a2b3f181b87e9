"""Recalibrated statistics against a direct computation in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import tangentlab as tl
from tangentlab.attacks import FGSM, PGD
from tangentlab.errors import ConfigError, ModelError
from tangentlab.models import PreActResNet18, SmallCNN
from tangentlab.training import recalibrate

X = torch.rand(23, 1, 8, 8, generator=tl.generator(0, "x"), dtype=torch.float64)
Y = X.flatten(1)[:, :3].argmax(1)
BATCHES = [(X[:9], Y[:9]), (X[9:18], Y[9:18]), (X[18:], Y[18:])]


def network(kind: str = "cnn") -> nn.Module:
    """Trained a little on other data, so that its statistics are wrong ones; in a mixed mode."""
    torch.manual_seed(0)
    model: nn.Module = (
        PreActResNet18((1, 8, 8), 3, width=2)
        if kind == "residual"
        else nn.Sequential(SmallCNN((1, 8, 8), 8, widths=(3, 4), strides=(1, 2), hidden=0), nn.Dropout())
    )
    if kind == "cnn":
        model.append(nn.BatchNorm1d(8)).append(nn.Linear(8, 3))
    model.double().train()
    with torch.no_grad():
        for _ in range(5):
            model(3 * torch.rand(16, 1, 8, 8, dtype=torch.float64) - 1)
        for layer in tl.modes.batchnorm_modules(model):
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.uniform_(-0.5, 0.5)
    model[0].eval() if kind == "cnn" else model.blocks.eval()
    return model


def statistics(model: nn.Module) -> list[Tensor]:
    return [b.clone() for m in tl.modes.batchnorm_modules(model) for b in (m.running_mean, m.running_var)]


def one_batch(model: nn.Module, x: Tensor, *, correction: int) -> list[Tensor]:
    """Statistics of the inputs of each layer when the whole set is one batch in training mode."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].transpose(0, 1).flatten(1)
        seen.extend([values.mean(1), values.var(1, correction=correction)])

    handles = [m.register_forward_pre_hook(hook) for m in tl.modes.batchnorm_modules(model)]
    with tl.modes.evaluation(model), tl.modes.batchnorm(model, statistics="batch"), torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def assert_equal(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-12) -> None:
    assert len(found) == len(expected) > 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("kind", ["cnn", "residual"])
def test_biased_population_statistics_are_those_of_the_whole_set_as_one_batch(kind: str) -> None:
    model = network(kind)
    expected = one_batch(model, X, correction=0)
    recalibrate(model, BATCHES, variance="biased")
    assert_equal(statistics(model), expected, 1e-9)
    with tl.modes.evaluation(model):
        evaluated = model(X)
        with tl.modes.batchnorm(model, statistics="batch"):
            torch.testing.assert_close(evaluated, model(X), rtol=1e-9, atol=1e-9)


def test_unbiased_population_statistics_are_consistent_layer_by_layer() -> None:
    """Each layer's are those of the inputs that the evaluated network, recalibrated, gives it."""
    model = network()
    recalibrate(model, BATCHES)
    seen: list[Tensor] = []
    for layer in tl.modes.batchnorm_modules(model):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].transpose(0, 1).flatten(1)))
    model.eval()(X)
    expected = [s for values in seen for s in (values.mean(1), values.var(1, correction=1))]
    assert_equal(statistics(model), expected)


def test_neither_the_order_nor_the_batch_size_matters() -> None:
    first, second = network(), network()
    recalibrate(first, BATCHES)
    recalibrate(second, [X.flip(0)])
    assert_equal(statistics(first), statistics(second))


def test_crafted_inputs_come_from_the_network_as_it_was() -> None:
    model = network()
    attack = PGD(0.1, 0.05, 2)
    with tl.modes.evaluation(model):
        noise = tl.generator(3, "n")
        crafted = torch.cat([attack(model, x, y, generator=noise) for x, y in BATCHES])
    for inputs, population in ((attack, crafted), ((None, attack), torch.cat([X, crafted]))):
        expected = one_batch(model, population, correction=0)
        found = network()
        recalibrate(found, BATCHES, inputs=inputs, variance="biased", generator=tl.generator(3, "n"))
        assert_equal(statistics(found), expected, 1e-9)


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_averages_weigh_the_batches_as_training_does(momentum: float, variance: str) -> None:
    model = network()
    correction = int(variance == "unbiased")
    each = [one_batch(model, x, correction=correction) for x, _ in BATCHES]
    weights = [(1 - momentum) ** (len(each) - 1 - t) for t in range(len(each))]
    expected = [
        sum(w * s for w, s in zip(weights, parts, strict=True)) / sum(weights)
        for parts in zip(*each, strict=True)
    ]
    recalibrate(model, BATCHES, variance=variance, momentum=momentum)
    assert_equal(statistics(model), expected)


def test_the_plain_average_is_torchs() -> None:
    model, theirs = network(), network()
    theirs[1].p = 0.0  # theirs is in training mode throughout
    update_bn(BATCHES, theirs)
    recalibrate(model, BATCHES, momentum=0.0)
    assert_equal(statistics(model), statistics(theirs))


def test_a_layer_that_is_applied_twice_has_averages_only() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), norm, nn.ReLU(), norm, nn.Linear(4, 3)).double()
    with pytest.raises(ModelError, match="BatchNorm '2' is applied 2 times in a forward"):
        recalibrate(model, BATCHES)
    theirs = nn.Sequential(*model)
    recalibrate(model, BATCHES, momentum=0.0)
    found = norm.running_mean.clone()
    update_bn(BATCHES, theirs)
    torch.testing.assert_close(found, norm.running_mean)


def test_everything_else_is_left_alone() -> None:
    model = network()
    model[2].weight.grad = torch.ones(8, dtype=torch.float64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    drawn = torch.get_rng_state()
    recalibrate(model, BATCHES, inputs=(None, FGSM(0.1)))
    assert flags == [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    assert torch.equal(drawn, torch.get_rng_state())
    assert bool((model[2].weight.grad == 1).all())
    assert not any(m._forward_pre_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) != ("running" in name), name


def test_a_layer_that_is_not_reached_keeps_its_statistics() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(input=x).flatten(1)

    model = Idle().double()
    recalibrate(model, BATCHES)
    torch.testing.assert_close(model.used.running_var, X.var().reshape(1))
    assert model.idle.running_var.item() == 1


def test_an_error_leaves_the_statistics_as_they_were() -> None:
    model = network()
    before = statistics(model)

    class Stops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.equal(model[0].features[1].running_mean, before[0]):
                raise RuntimeError("in the second layer")
            return x

    stopping = nn.Sequential(model[0], Stops(), *model[1:])
    with pytest.raises(RuntimeError, match="in the second layer"):
        recalibrate(stopping, BATCHES)
    assert_equal(statistics(model), before)


@pytest.mark.parametrize(
    ("model", "batches", "options", "error", "message"),
    [
        (network(), BATCHES, {"variance": "biassed"}, ConfigError, r"did you mean 'biased'\?"),
        (network(), BATCHES, {"momentum": 1.5}, ConfigError, r"momentum=1.5 is out of range \[0, 1\]"),
        (network(), [], {}, ConfigError, "there is no input"),
        (network(), [X[:1]], {}, ConfigError, "BatchNorm '2' sees 1 value.s. a channel; a variance takes 2"),
        (network(), [X[:1]], {"momentum": 0.0}, ConfigError, "a variance takes 2"),
        (network(), [X], {"inputs": FGSM(0.1)}, ConfigError, "crafting needs labels"),
        (nn.Linear(8, 3).double(), [X], {}, ModelError, "Linear reaches no BatchNorm"),
        (nn.BatchNorm2d(1, track_running_stats=False), [X], {}, ModelError, "keeps no running statistics"),
    ],
)
def test_bad_input_is_named(
    model: nn.Module, batches: list, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        recalibrate(model, batches, **options)
