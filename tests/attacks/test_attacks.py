"""One contract for every attack: in the ball, in the box, seeded, the model as it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tangentlab import modes
from tangentlab.attacks import FGSM, PGD, Attack
from tangentlab.attacks.threat import Passes
from tangentlab.errors import ConfigError
from tangentlab.randomness import generator

EPS = 0.1
ATTACKS: dict[str, Attack] = {
    "fgsm": FGSM(EPS),
    "pgd": PGD(EPS, EPS / 4, 5),
    "pgd without random start": PGD(EPS, EPS / 4, 5, random_start=False),
    "pgd with restarts": PGD(EPS, EPS / 4, 3, num_restarts=3),
    "one long step": PGD(EPS, 1.0, 1),
}


class Counting(nn.Module):
    """A BatchNorm network that counts forwards and has a buffer which training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
        self.register_buffer("calls", torch.zeros(()))
        self.forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        if self.training:
            self.calls += 1
        return self.layers(x)


@pytest.fixture
def problem() -> tuple[Counting, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = Counting()
    x = torch.rand(6, 1, 6, 6)
    x[0], x[1] = 0.0, 1.0  # on the walls of the box
    return model, x, torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("training", [True, False])
def test_contract(
    attack: Attack, training: bool, problem: tuple[Counting, torch.Tensor, torch.Tensor]
) -> None:
    model, x, y = problem
    model.train(training)
    model.layers[1].eval()  # a mixed mode stays mixed
    model.layers[0].weight.grad = torch.ones_like(model.layers[0].weight)
    grads = [p.grad for p in model.parameters()]
    held = {name: value.clone() for name, value in model.state_dict().items()}
    copy = x.clone()
    random = torch.get_rng_state()

    with torch.no_grad():  # the caller's mode does not matter
        x_adv = attack(model, x, y, generator=generator(0, "noise"))

    assert x_adv.shape == x.shape
    assert not x_adv.requires_grad
    assert (x_adv - x).abs().max() <= EPS * (1 + 1e-6)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert torch.equal(x, copy)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(grads, (p.grad for p in model.parameters()), strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert model.training is training
    assert model.layers[1].training is False
    assert model.forwards == attack.passes.forwards
    assert torch.equal(x_adv, attack(model, x, y, generator=generator(0, "noise")))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_it_raises_the_loss(attack: Attack, problem: tuple[Counting, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = problem
    model.eval()
    x_adv = attack(model, x, y, generator=generator(0, "noise"))
    assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y) + 0.01


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_batchnorm_moves_only_on_request(
    attack: Attack, problem: tuple[Counting, torch.Tensor, torch.Tensor]
) -> None:
    model, x, y = problem
    model.train()
    batches = model.layers[1].num_batches_tracked
    frozen = attack(model, x, y, generator=generator(0, "noise"))
    assert int(batches) == 0
    with modes.batchnorm(model, update=True):
        moving = attack(model, x, y, generator=generator(0, "noise"))
    assert int(model.layers[1].num_batches_tracked) == attack.passes.forwards
    assert torch.equal(frozen, moving)  # batch statistics in both: the buffers are not read


def linear(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).to(dtype)
    torch.manual_seed(3)
    nn.init.normal_(model[1].weight)
    return model


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_optimum_of_a_linear_binary_model_is_reached(attack: Attack) -> None:
    """For logits Wx the worst case is x − eps·sign(w_y − w_other), clipped to the box."""
    model = linear(torch.float64)
    x, y = torch.rand(5, 1, 3, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    w = (model[1].weight[1] - model[1].weight[0]).detach().reshape(1, 3, 4)
    toward = torch.stack([w if label == 0 else -w for label in y])
    expected = (x + EPS * toward.sign()).clamp(0, 1)
    if isinstance(attack, PGD) and attack.step_size * attack.num_steps < 2 * EPS:
        attack = PGD(EPS, EPS / 2, 4, attack.num_restarts, attack.random_start)
    x_adv = attack(model, x, y, generator=generator(0, "noise"))
    assert torch.allclose(x_adv, expected, atol=1e-12)


def test_restarts_keep_the_worst_of_the_single_runs(
    problem: tuple[Counting, torch.Tensor, torch.Tensor],
) -> None:
    model, x, y = problem
    model.eval()
    noise = generator(5, "noise")
    single = PGD(EPS, EPS / 4, 3)
    runs = [single(model, x, y, generator=noise) for _ in range(3)]
    losses = torch.stack([F.cross_entropy(model(run), y, reduction="none") for run in runs])
    several = PGD(EPS, EPS / 4, 3, num_restarts=3)(model, x, y, generator=generator(5, "noise"))
    assert torch.equal(F.cross_entropy(model(several), y, reduction="none"), losses.max(dim=0).values)
    assert len({int(i) for i in losses.argmax(dim=0)}) > 1  # else the test could not tell


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FGSM(8), r"eps=8 is out of range \(0, 1\]; inputs are in \[0, 1\]: write 8/255"),
        (lambda: FGSM(0.0), "eps=0 is out of range"),
        (lambda: FGSM(float("nan")), "eps=nan is out of range"),
        (lambda: PGD(0.1, -0.1), "step_size=-0.1 is out of range"),
        (lambda: PGD(0.1, 0.1, 0), "num_steps=0 is out of range"),
        (lambda: PGD(0.1, 0.1, 1, 2, random_start=False), "num_restarts=2 with random_start=False"),
    ],
)
def test_bad_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_a_random_start_without_a_generator_raises() -> None:
    with pytest.raises(ConfigError, match="needs a generator"):
        PGD(0.1, 0.1)(linear(torch.float32), torch.rand(1, 1, 3, 4), torch.tensor([0]))


def test_passes_add_up() -> None:
    total = Passes(1, 2, 3).plus(Passes(10, 20, 30))
    assert total == (11, 22, 33)
    assert total.cost == 11 + 22 + 2 * 33
    for a, b in itertools.pairwise([FGSM(0.1).passes.cost, PGD(0.1, 0.1, 10).passes.cost]):
        assert (a, b) == (2, 20)
