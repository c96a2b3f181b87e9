"""The switch follows planted velocities, keeps to its rules, leaves no trace, and resumes."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import tangentlab as tl
from tangentlab.errors import ConfigError, KernelError
from tangentlab.probes import Look

EVERY = 10
RATE = 0.1


class Turning(nn.Module):
    """f(x) = w·(s x), s² = (cos φ, sin φ): on unit vectors the kernel is diag(s²), and turns as φ does."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.turn(0.0)

    def turn(self, angle: float) -> None:
        assert 0 <= angle <= math.pi / 2
        self.scale = torch.tensor([math.cos(angle), math.sin(angle)]).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale @ self.w).unsqueeze(1)


X, Y = torch.eye(2), torch.zeros(2, dtype=torch.int64)


def switch(**settings: object) -> tl.LazySwitch:
    return tl.LazySwitch(X, Y, **{"every": EVERY, "threshold": 0.3, "resume": 0.6, **settings})


def turned(model: Turning, one: tl.LazySwitch, angles: Sequence[float], rates: Sequence[float] = ()) -> str:
    """The phases after looks at a model that turns by these angles, as letters."""
    phases, at = [], 0.0
    for number, angle in enumerate(angles):
        model.turn(at := at + angle)
        rate = rates[number] if rates else None
        phases.append(one(model, EVERY * number, learning_rate=rate)[0])
        assert one(model, EVERY * number + 1) == one.phase  # between looks nothing is looked at
    assert len(one.looks) == len(angles)
    return "".join(phases)


FAST, MIDDLE, SLOW = 0.2, 0.09, 0.02  # of the fastest: 1, between the levels, below both


def test_the_velocity_is_the_angle_a_step() -> None:
    turned(Turning(), one := switch(), [0, FAST])
    assert one.looks[1].values["velocity"] == pytest.approx(FAST / EVERY, rel=1e-4)
    assert one.looks[1].values["lazy_below"] == pytest.approx(0.3 * FAST / EVERY, rel=1e-4)
    assert one.looks[1].values["learning_above"] == pytest.approx(0.6 * FAST / EVERY, rel=1e-4)


def test_lazy_after_patience_and_learning_again_with_hysteresis() -> None:
    one = switch(patience=2)
    #          look          f     s     s     m       m       f     m       f     f     s
    phases = turned(Turning(), one, [0, FAST, SLOW, SLOW, MIDDLE, MIDDLE, FAST, MIDDLE, FAST, FAST, SLOW])
    assert phases == "fffccccccff"
    reasons = [look.reason for look in one.looks if look.reason]
    assert len(reasons) == 2
    assert "fell below" in reasons[0]
    assert "rose above" in reasons[1]


def test_a_fallen_learning_rate_ends_the_lazy_stage_until_the_kernel_is_slow_for_it() -> None:
    # At a tenth of the rate the fastest counts as 0.32 of what it was: an eighth is more than 0.3 of that.
    angles = [0, FAST, SLOW, SLOW, SLOW, FAST / 8, SLOW / 2, SLOW / 2]
    rates = [RATE] * 4 + [RATE / 10] * 4
    one = switch(patience=1, return_on_drop=True)
    assert turned(Turning(), one, angles, rates) == "ffccffcc"
    assert one.looks[4].reason == "the learning rate fell from 0.1 to 0.01"
    assert one.looks[5].values["lazy_below"] == pytest.approx(0.3 * FAST / EVERY * 0.1**0.5, rel=1e-4)
    staying = switch(patience=1)
    assert turned(Turning(), staying, angles, rates) == "ffcccccc"
    assert staying.looks[5].values == one.looks[5].values
    smooth = [RATE * (1 - k / 10) for k in range(8)]
    assert turned(Turning(), switch(patience=1, return_on_drop=True), angles, smooth) == "ffcccccc"


def test_a_rate_that_rises_makes_no_kernel_lazy() -> None:
    rates = [RATE / 64, RATE / 16, RATE / 4, RATE, RATE, RATE]
    model, one = Turning(), switch(patience=1)
    assert turned(model, one, [0, FAST, FAST, FAST, FAST, FAST], rates) == "ffffff"
    assert one.looks[-1].values["lazy_below"] == pytest.approx(0.3 * FAST / EVERY, rel=1e-4)


def test_nothing_is_lazy_while_the_rate_rises() -> None:
    rates = [RATE / 16, RATE / 4, RATE, RATE, RATE]
    # The angle belongs to the rate before the look.
    assert turned(Turning(), switch(patience=1), [0, FAST, SLOW, SLOW, SLOW], rates) == "ffffc"
    assert turned(Turning(), switch(patience=2), [0, FAST, SLOW, SLOW, SLOW], rates) == "fffff"
    assert turned(Turning(), switch(patience=1), [0, FAST, SLOW, SLOW, SLOW]) == "ffccc"


def test_a_rate_that_fell_and_rose_again_is_held_against_what_it_was() -> None:
    # The angle belongs to the rate before the look.
    rates = [RATE, RATE / 4, RATE, RATE]
    turned(Turning(), one := switch(), [0, FAST, FAST / 4, FAST / 4], rates)
    told = [look.values["lazy_below"] / (0.3 * FAST / EVERY) for look in one.looks[1:]]
    assert told == pytest.approx([1, 0.5, 1], rel=1e-4)


def test_the_rate_of_a_look_is_the_mean_of_its_steps() -> None:
    model, one = Turning(), switch(patience=1)
    for step in range(EVERY):
        one(model, step, learning_rate=RATE * (1 + step % 2))
        if step == EVERY // 2:  # resumed between looks
            state, looks = one.state_dict(), one.looks
            one = switch(patience=1)
            one.load_state_dict(state)
            one.looks = looks
    model.turn(FAST)
    one(model, EVERY, learning_rate=RATE)
    for step in range(EVERY + 1, 2 * EVERY):
        one(model, step, learning_rate=RATE)
    one(model, 2 * EVERY)
    assert one.looks[2].values["lazy_below"] == pytest.approx(0.3 * FAST / EVERY / 1.5**0.5, rel=1e-4)


def test_a_look_at_a_fall_does_not_go_by_what_was_before_it() -> None:
    angles, rates = [0, FAST, SLOW, SLOW / 2], [RATE, RATE, RATE / 10, RATE / 10]
    assert turned(Turning(), switch(patience=1), angles, rates) == "ffcc"
    assert turned(Turning(), switch(patience=1, return_on_drop=True), angles, rates) == "fffc"


def test_a_rate_that_a_scheduler_writes_into_is_read_when_it_is_given() -> None:
    model, one = Turning(), switch(at=1, every=2, return_on_drop=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    phases = []
    for step in range(5):
        phases.append(one(model, step, learning_rate=optimizer.param_groups[0]["lr"])[0])
        optimizer.step()
        scheduler.step()
    assert "".join(phases) == "fcccf"
    for rate in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"learning_rate={rate} is out of range"):
            one(model, 6, learning_rate=rate)


def test_a_kernel_that_could_not_be_measured_once_is_followed_from_then_on() -> None:
    for missed in (1, 2):
        model, one = Turning(), switch(patience=1)
        for number, angle in enumerate([0, FAST, 2 * FAST, 3 * FAST, 3 * FAST + SLOW]):
            model.turn(angle)
            if number == missed:
                model.scale = torch.zeros(2)
            one(model, EVERY * number)
        assert one.looks[missed].error is not None
        assert [number for number, look in enumerate(one.looks) if "velocity" in look.values] == [
            number for number in range(1, 5) if number not in (missed, missed + 1)
        ]
        assert one.phase == "cheap"


def test_a_fixed_step_measures_no_kernel() -> None:
    one = switch(at=25, return_on_drop=True)
    model = Turning()
    assert [one(model, step) for step in range(24, 27)] == ["full", "cheap", "cheap"]
    assert one.cost == 0
    assert one.looks == [Look(25, "cheap", "step 25 is reached", {})]
    assert one(model, 30, learning_rate=0.1) == "cheap"
    assert one(model, 40, learning_rate=0.01) == "full"
    assert one(model, 50, learning_rate=0.01) == "full"  # once


class Deciding(nn.Module):
    """Right on the first ``right`` of ten points, whatever an attack does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.right = 10

    def forward(self, x: Tensor) -> Tensor:
        wrong = torch.arange(len(x)) >= self.right
        return torch.stack([~wrong, wrong], dim=1) * self.weight + 0 * x.sum()


def test_the_safety_net_counts_from_the_best_and_doubles_the_patience() -> None:
    points = (torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64))
    model = Deciding()
    one = switch(at=0, held_out=points, guard=tl.attacks.FGSM(0.1), max_fall=0.15)
    phases = []
    for number, model.right in enumerate([7, 8, 9, 8, 7, 9]):
        phases.append(one(model, EVERY * number)[0])
    assert "".join(phases) == "ccccff"
    assert one.looks[4].reason == "robust accuracy fell from 90.0% to 70.0%"
    assert one.looks[4].values["least_robust_accuracy"] == pytest.approx(0.75)
    assert one.patience == 4
    # Points are judged from the switch to the return.
    assert one.cost == 5 * 10 * (tl.attacks.FGSM(0.1).passes.cost + 1)


def test_the_safety_net_takes_what_the_model_takes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    points = (torch.rand(6, 4), torch.arange(6) % 3)
    one = switch(at=0, held_out=points, guard=tl.attacks.FGSM(0.1))
    with torch.autocast("cpu", torch.bfloat16):
        assert one(model, 0) == "cheap"
    assert 0 <= one.looks[0].values["robust_accuracy"] <= 1
    foreign = switch(at=0, held_out=(points[0], points[1] + 1), guard=tl.attacks.FGSM(0.1))
    with pytest.raises(ConfigError, match="y holds the label 3; the model has 3 outputs"):
        foreign(model, 0)


def test_a_dead_kernel_leaves_the_safety_net() -> None:
    class Dying(Turning):
        """Right on its points while it lives."""

        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return torch.cat([z, 0.2 - z], dim=1)

    points = (X, Y)
    one = switch(patience=1, held_out=points, guard=tl.attacks.FGSM(0.01), max_fall=0.15)
    model = Dying()
    assert turned(model, one, [0, FAST, SLOW]) == "ffc"
    model.scale = torch.zeros(2)
    assert one(model, 3 * EVERY) == "full"
    assert one.looks[-1].error is not None
    assert one.looks[-1].reason == "robust accuracy fell from 100.0% to 0.0%"
    with pytest.raises(KernelError):
        switch()(model, 0)  # a wrong setting


def test_a_fall_between_two_looks_is_seen_and_half_is_one() -> None:
    model, one = Turning(), switch(at=0, return_on_drop=True)
    assert one(model, 0, learning_rate=0.1) == "cheap"
    for step, rate in ((1, 0.1), (2, 0.05), (3, 0.05)):
        assert one(model, step, learning_rate=rate) == "cheap"
    assert one(model, 4) == "cheap"  # a call without a rate says nothing of it
    assert one(model, EVERY) == "full"
    assert one.looks[-1].reason == "the learning rate fell from 0.1 to 0.05"


def test_of_two_falls_between_two_looks_the_first_is_where_the_rate_fell_from() -> None:
    model, one = Turning(), switch(patience=1)
    assert turned(model, one, [0, FAST], [RATE] * 2) == "ff"
    for step, rate in ((EVERY + 2, RATE / 4), (EVERY + 3, RATE / 16)):
        one(model, step, learning_rate=rate)
    one(model, 2 * EVERY)
    one(model, 3 * EVERY)
    assert one.looks[-1].values["lazy_below"] == pytest.approx(0.3 * FAST / EVERY / 4, rel=1e-4)


def test_the_cost_is_the_passes_made() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    attack = tl.attacks.PGD(0.1, 0.05, 4)
    one = tl.LazySwitch(torch.rand(5, 1, 4, 4), torch.arange(5) % 3, every=1, attack=attack)
    one(model, 0)
    assert one.cost == 5 * (4 + 4 + 1 + 2 * 3)
    one(model, 1)
    assert one.cost == 5 * (2 * (4 + 4) + 3 * (1 + 2 * 3))


def test_the_model_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    one = tl.LazySwitch(
        x, y, every=1, attack=tl.attacks.FGSM(0.1), held_out=(x, y), guard=tl.attacks.PGD(0.1, 0.05, 2)
    )
    state = torch.get_rng_state()
    for step in range(3):
        one(model, step)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_switch_goes_on() -> None:
    angles = [0, FAST, SLOW, SLOW, FAST, FAST, SLOW, SLOW]
    rates = [RATE] * 6 + [RATE / 10] * 2
    settings = {"patience": 2, "return_on_drop": True}
    whole = switch(**settings)
    expected = turned(Turning(), whole, angles, rates)
    assert {"f", "c"} == set(expected)
    for cut in range(1, len(angles)):
        model, first, second = Turning(), switch(**settings), switch(**settings)
        turned(model, first, angles[:cut], rates)
        second.load_state_dict(first.state_dict())
        at = sum(angles[:cut])
        for number in range(cut, len(angles)):
            model.turn(at := at + angles[number])
            second(model, EVERY * number, learning_rate=rates[number])
        assert [look.phase[0] for look in second.looks] == list(expected[cut:])
        assert second.looks == whole.looks[cut:]
        assert second.cost == whole.cost


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0 is out of range"),
        ({"patience": 0}, "patience=0"),
        ({"at": -1}, "at=-1"),
        ({"threshold": 0.5, "resume": 0.4}, "threshold=0.5 and resume=0.4"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"max_fall": 1.0}, "max_fall=1.0"),
        ({"guard": tl.attacks.FGSM(0.1)}, "come together"),
        ({"held_out": (X, Y)}, "come together"),
        ({"held_out": (X, Y[:1]), "guard": tl.attacks.FGSM(0.1)}, "y must hold the labels"),
        ({"held_out": (X[:0], Y[:0]), "guard": tl.attacks.FGSM(0.1)}, "must hold examples"),
        ({"held_out": (X + 1, Y), "guard": tl.attacks.FGSM(0.1)}, "x lies in"),
        ({"held_out": (X.numpy(), Y), "guard": tl.attacks.FGSM(0.1)}, "x is a ndarray"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        switch(**settings)


def test_too_few_examples_are_named() -> None:
    with pytest.raises(ConfigError, match="x holds one example"):
        tl.LazySwitch(X[:1], Y[:1], every=1)
    with pytest.raises(ConfigError, match="must hold examples"):
        tl.LazySwitch(X[:0], Y[:0], every=1)
    with pytest.raises(ConfigError, match=r"x lies in \[-1, 1\]"):
        tl.LazySwitch(2 * X - 1, Y, every=1, attack=tl.attacks.FGSM(0.1))
