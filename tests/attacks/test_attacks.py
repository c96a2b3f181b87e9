"""One contract for every attack: in the ball, in the box, seeded, the model as it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tangentlab import modes
from tangentlab.attacks import APGD, FAB, FGSM, NFGSM, PGD, Attack, AutoAttack, NaNGradientError, Square
from tangentlab.attacks.threat import Passes, lengths, project, uniform_start
from tangentlab.errors import ConfigError, ModelError
from tangentlab.randomness import generator

EPS = 0.1
L2 = 0.6
ATTACKS: dict[str, Attack] = {
    "fgsm": FGSM(EPS),
    "n-fgsm": NFGSM(EPS),
    "pgd": PGD(EPS, EPS / 4, 5),
    "pgd without random start": PGD(EPS, EPS / 4, 5, random_start=False),
    "pgd with restarts": PGD(EPS, EPS / 4, 3, num_restarts=3),
    "pgd l2": PGD(L2, L2 / 4, 5, norm="l2"),
    "pgd l2 with restarts": PGD(L2, L2 / 4, 3, num_restarts=3, norm="l2"),
    "one long step": PGD(EPS, 1.0, 1),
    "fgsm-rs": PGD(EPS, 1.25 * EPS, 1),
    "apgd": APGD(EPS, 7),
    "apgd dlr": APGD(EPS, 7, loss="dlr"),
    "apgd l2": APGD(L2, 7, "l2"),
    "apgd targeted": APGD(EPS, 7, loss="dlr-targeted", num_target_classes=3),
    "fab": FAB(EPS, 7, num_target_classes=3),
    "fab l2": FAB(L2, 7, "l2", num_target_classes=3),
    "square": Square(EPS, 30),
    "square l2": Square(L2, 30, "l2"),
    "autoattack": AutoAttack(EPS, num_steps=4, num_target_classes=3, num_queries=20),
    "autoattack l2": AutoAttack(L2, "l2", num_steps=4, num_target_classes=3, num_queries=20),
}
# Their passes are the most there can be: fooled examples are left out.
ADAPTIVE = {"apgd targeted", "fab", "fab l2", "square", "square l2", "autoattack", "autoattack l2"}
FIXED = {name: attack for name, attack in ATTACKS.items() if name not in ADAPTIVE}
GRADIENT = {name: attack for name, attack in ATTACKS.items() if not name.startswith("square")}


def radius(attack: Attack) -> tuple[str, float]:
    """The norm and the bound that the attack states."""
    if isinstance(attack, NFGSM):
        return "linf", attack.bound
    return getattr(attack, "norm", "linf"), attack.eps


class Counting(nn.Module):
    """A BatchNorm network that counts forwards and has a buffer which training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
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
    with torch.no_grad():  # close calls, so that some examples are fooled and some are not
        model.eval().layers[4].bias -= model(x).mean(dim=0)
    model.forwards = 0
    return model.train(), x, torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("training", [True, False])
def test_contract(name: str, training: bool, problem: tuple[Counting, torch.Tensor, torch.Tensor]) -> None:
    attack = ATTACKS[name]
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
    norm, bound = radius(attack)
    assert lengths(x_adv - x, norm).max() <= bound * (1 + 1e-6)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert torch.equal(x, copy)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(grads, (p.grad for p in model.parameters()), strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert model.training is training
    assert model.layers[1].training is False
    # An adaptive attack may stop earlier, but not after its first forward.
    fewest = 2 if name in ADAPTIVE else attack.passes.forwards
    assert fewest <= model.forwards <= attack.passes.forwards
    assert torch.equal(x_adv, attack(model, x, y, generator=generator(0, "noise")))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_it_raises_the_loss(attack: Attack, problem: tuple[Counting, torch.Tensor, torch.Tensor]) -> None:
    model, x, _ = problem
    model.eval()
    y = model(x).argmax(dim=1)  # some attacks leave misclassified inputs alone
    x_adv = attack(model, x, y, generator=generator(0, "noise"))
    assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y) + 0.01


@pytest.mark.parametrize("name", ATTACKS)
def test_batchnorm_moves_only_on_request(
    name: str, problem: tuple[Counting, torch.Tensor, torch.Tensor]
) -> None:
    attack = ATTACKS[name]
    model, x, y = problem
    model.train()
    batches = model.layers[1].num_batches_tracked
    frozen = attack(model, x, y, generator=generator(0, "noise"))
    forwards = model.forwards
    assert int(batches) == 0
    with modes.batchnorm(model, update=True):
        moving = attack(model, x, y, generator=generator(0, "noise"))
    assert int(model.layers[1].num_batches_tracked) == forwards
    assert name in ADAPTIVE or forwards == attack.passes.forwards
    assert torch.equal(frozen, moving)  # batch statistics in both: the buffers are not read


@pytest.mark.parametrize("name", GRADIENT)
def test_backwards_are_counted(
    name: str,
    problem: tuple[Counting, torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, y = problem
    model.eval()
    calls = 0
    backward = torch.autograd.grad

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return backward(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", counted)
    GRADIENT[name](model, x, y, generator=generator(0, "noise"))
    most = GRADIENT[name].passes.input_backwards
    assert 1 <= calls <= most
    assert name in ADAPTIVE or calls == most


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_inference_mode_of_the_caller_does_not_matter(
    attack: Attack, problem: tuple[Counting, torch.Tensor, torch.Tensor]
) -> None:
    model, x, y = problem
    model.eval()
    expected = attack(model, x, y, generator=generator(0, "noise"))
    with torch.inference_mode():
        found = attack(model, x.clone(), y.clone(), generator=generator(0, "noise"))
    assert torch.equal(found, expected)


def linear(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).to(dtype)
    torch.manual_seed(3)
    nn.init.normal_(model[1].weight)
    return model


EXACT: dict[str, Attack] = {
    "fgsm": FGSM(EPS),
    "pgd": PGD(EPS, EPS / 2, 4),
    "pgd without random start": PGD(EPS, EPS / 2, 4, random_start=False),
    "pgd with restarts": PGD(EPS, EPS / 2, 4, 3),
    "one long step": PGD(EPS, 1.0, 1),
    "apgd": APGD(EPS, 5),
}


@pytest.mark.parametrize("attack", EXACT.values(), ids=EXACT)
def test_the_optimum_of_a_linear_binary_model_is_reached(attack: Attack) -> None:
    """For logits Wx the worst case is x − eps·sign(w_y − w_other), clipped to the box."""
    model = linear(torch.float64)
    x, y = torch.rand(5, 1, 3, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    w = (model[1].weight[1] - model[1].weight[0]).detach().reshape(1, 3, 4)
    toward = torch.stack([w if label == 0 else -w for label in y])
    expected = (x + EPS * toward.sign()).clamp(0, 1)
    x_adv = attack(model, x, y, generator=generator(0, "noise"))
    assert torch.allclose(x_adv, expected, atol=1e-12)


@pytest.mark.parametrize(
    "attack",
    [PGD(0.2, 0.2, 40, norm="l2"), PGD(0.2, 1.0, 40, norm="l2", random_start=False), APGD(0.2, 100, "l2")],
    ids=["pgd", "long steps", "apgd"],
)
def test_the_l2_optimum_of_a_linear_binary_model_is_reached(attack: Attack) -> None:
    """Away from the walls it is x − eps·(w_y − w_other)/‖w_y − w_other‖."""
    model = linear(torch.float64)
    x, y = 0.3 + 0.4 * torch.rand(5, 1, 3, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    w = (model[1].weight[1] - model[1].weight[0]).detach().reshape(1, 3, 4)
    toward = torch.stack([w if label == 0 else -w for label in y]) / w.norm()
    x_adv = attack(model, x, y, generator=generator(0, "noise"))
    assert torch.allclose(x_adv, x + 0.2 * toward, atol=1e-6)


def test_n_fgsm_adds_its_step_to_the_noise() -> None:
    model = linear(torch.float64)
    x, y = torch.rand(50, 1, 3, 4, dtype=torch.float64), torch.zeros(50, dtype=torch.long)
    w = (model[1].weight[1] - model[1].weight[0]).detach().reshape(1, 3, 4)
    noisy = uniform_start(x, 2 * EPS, generator(0, "noise"))
    x_adv = NFGSM(EPS)(model, x, y, generator=generator(0, "noise"))
    assert torch.equal(x_adv, (noisy + EPS * w.sign()).clamp(0, 1))
    assert (x_adv - x).abs().max() > 2.5 * EPS  # outside the ball; the contract holds its bound


def test_a_targeted_attack_lowers_the_loss_on_its_targets(
    problem: tuple[Counting, torch.Tensor, torch.Tensor],
) -> None:
    model, x, _ = problem
    model.eval()
    target = (model(x).argmax(dim=1) + 2) % 5
    attack = PGD(EPS, EPS / 4, 5, 2, targeted=True)
    x_adv = attack(model, x, target, generator=generator(0, "noise"))
    before, after = (F.cross_entropy(model(z), target, reduction="none") for z in (x, x_adv))
    assert (after < before - 0.01).all()


def test_the_l2_projection_is_in_the_ball_and_the_box() -> None:
    torch.manual_seed(0)
    x = torch.rand(40, 7, dtype=torch.float64)
    far = x + 2 * torch.randn_like(x)
    found = project(far, x, 0.5, "l2")
    assert lengths(found - x, "l2").max() <= 0.5 + 1e-12
    assert found.min() >= 0
    assert found.max() <= 1
    inside = 0.4 + 0.2 * x
    scaled = project(
        inside + far - x, inside, 0.1, "l2"
    )  # no wall is near: the nearest point is the scaled one
    assert torch.allclose(scaled, inside + 0.1 * (far - x) / (far - x).norm(dim=1, keepdim=True))
    assert torch.equal(project(inside + 0.01, inside, 0.1, "l2"), inside + 0.01)


def test_the_l2_start_is_uniform_in_the_ball() -> None:
    x = torch.full((20_000, 2), 0.5)
    delta = uniform_start(x, 0.4, generator(0, "noise"), "l2") - x
    share = (delta.norm(dim=1) / 0.4) ** 2  # of the disc's area: uniform on [0, 1]
    assert abs(float(share.mean()) - 0.5) < 0.01
    assert abs(float(share.var()) - 1 / 12) < 0.003
    assert delta.mean(dim=0).abs().max() < 0.01


def test_tiny_gradients_still_point_somewhere() -> None:
    """Squares of 1e-30 vanish in fp32."""
    assert torch.allclose(lengths(torch.full((1, 4), 1e-30), "l2"), torch.tensor([2e-30]))


class Broken(nn.Module):
    """Finite logits whose gradient is NaN for the examples at odd places: the slope of √0, times 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.flatten(1).sum(dim=1, keepdim=True)
        odd = torch.arange(len(x)) % 2 == 1
        nan = torch.zeros_like(total).index_put((odd,), (total[odd] * 0).sqrt())
        return torch.cat([total + nan, -total, 0 * total, total / 2, total / 3], dim=1)


@pytest.mark.parametrize("name", list(FIXED))
def test_a_nan_gradient_is_counted(name: str) -> None:
    with pytest.raises(NaNGradientError, match="NaN for 2 of 5 examples"):
        FIXED[name](
            Broken(), torch.rand(5, 1, 6, 6), torch.zeros(5, dtype=torch.long), generator=generator(0, "n")
        )


@pytest.mark.parametrize("name", ["fab", "fab l2", "apgd targeted", "autoattack"])
def test_a_nan_gradient_stops_adaptive_attacks(name: str) -> None:
    with pytest.raises(ModelError, match=r"NaN for \d of \d examples"):
        ATTACKS[name](
            Broken(), torch.rand(5, 1, 6, 6), torch.zeros(5, dtype=torch.long), generator=generator(0, "n")
        )


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.detach().flatten(1))


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_that_detaches_its_input_is_refused(name: str, frozen: bool) -> None:
    model = Detached().requires_grad_(not frozen)
    x = torch.rand(5, 1, 6, 6)
    with pytest.raises(ModelError, match="passes no gradient to its input"):
        GRADIENT[name](model, x, model(x).argmax(dim=1), generator=generator(0, "n"))


def test_an_output_that_is_not_one_row_an_example_is_refused() -> None:
    with pytest.raises(ModelError, match=r"output is \[2, 3, 4\] for 2 inputs; it must be \[n, C\]"):
        FGSM(EPS)(nn.Identity(), torch.rand(2, 3, 4), torch.zeros(2, dtype=torch.long))


def test_examples_with_a_zero_gradient_stay() -> None:
    """A saturated softmax is no error; its neighbours are attacked as ever."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[500.0] * 4, [0.0] * 4]))
    x = torch.stack([torch.full((4,), 0.9), torch.full((4,), 0.001)])
    x_adv = PGD(EPS, EPS, 1, random_start=False)(model, x, torch.tensor([0, 0]))
    assert torch.equal(x_adv[0], x[0])
    assert (x_adv[1] < x[1]).all()


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
        (lambda: PGD(0.1, 0.1, 2.5), "num_steps=2.5 is not a whole number"),
        (lambda: PGD(0.1, 0.1, norm="l3"), "norm 'l3' is unknown; .*from 'linf', 'l2'"),
        (lambda: PGD(float("inf"), 0.1, norm="l2"), "eps=inf is out of range"),
        (lambda: NFGSM(0.1, 0.0), "noise=0 is out of range"),
        (lambda: APGD(0.1, loss="cw"), "loss 'cw' is unknown.*'ce', 'dlr', 'dlr-targeted'"),
        (lambda: APGD(0.1, num_target_classes=0), "num_target_classes=0 is out of range"),
        (lambda: FAB(0.1, norm="l1"), "norm 'l1' is unknown"),
        (lambda: Square(0.1, 0), "num_queries=0 is out of range"),
        (lambda: Square(0.1, initial_share=1.5), "initial_share=1.5 is out of range"),
        (lambda: AutoAttack(8), "write 8/255"),
    ],
)
def test_bad_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "attack",
    [PGD(0.1, 0.1), NFGSM(0.1), APGD(0.1), Square(0.1), AutoAttack(0.1)],
    ids=lambda a: type(a).__name__,
)
def test_a_random_start_without_a_generator_raises(attack: Attack) -> None:
    with pytest.raises(ConfigError, match="needs a generator"):
        attack(linear(torch.float32), torch.rand(1, 1, 3, 4), torch.tensor([0]))


def test_l2_takes_radii_above_one() -> None:
    assert PGD(2.0, 0.5, norm="l2").eps == 2.0


def test_passes_add_up() -> None:
    total = Passes(1, 2, 3).plus(Passes(10, 20, 30))
    assert total == (11, 22, 33)
    assert total.cost == 11 + 22 + 2 * 33
    for a, b in itertools.pairwise([FGSM(0.1).passes.cost, PGD(0.1, 0.1, 10).passes.cost]):
        assert (a, b) == (2, 20)
