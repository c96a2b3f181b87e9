"""The alarm follows planted shares, pools its looks, leaves no trace, and resumes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import tangentlab as tl
from tangentlab.errors import ConfigError, KernelError
from tangentlab.probes import overfitting_alarm

X, Y = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def alarm(**settings: Any) -> tl.OverfittingAlarm:
    return tl.OverfittingAlarm(X, Y, eps=0.1, **settings)


def followed(
    monkeypatch: pytest.MonkeyPatch, one: tl.OverfittingAlarm, shares: Sequence[float | None], first: int = 0
) -> list[bool]:
    """The answers to planted shares, of equal weight, at the steps ``first``, ``first`` + 10, ..."""
    planted = iter(shares)

    def confidences(*_: object) -> tuple[float, float]:
        share = next(planted)
        return (0.0, 0.0) if share is None else (2.0, share * 2)

    monkeypatch.setattr(overfitting_alarm, "right_confidences", confidences)
    return [one.update(network(), first + 10 * number) for number in range(len(shares))]


def test_it_is_raised_while_three_looks_together_are_low(monkeypatch: pytest.MonkeyPatch) -> None:
    one = alarm(threshold=0.5)
    shares = [0.1, 0.9, 0.9, 0.3, 0.2, 0.2, 0.3, 0.9, 0.8]
    said = followed(monkeypatch, one, shares)
    assert said == [False] * 4 + [True, True, True, True, False]
    assert one.spoke_at == 40
    assert [look.share for look in one.looks] == pytest.approx(shares)
    assert [look.pooled for look in one.looks[:2]] == [None, None]
    assert one.looks[4].pooled == pytest.approx(1.4 / 3)
    assert [look.raised for look in one.looks] == said
    assert not one.raised


def test_looks_weigh_by_what_fgsm_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    confidences = iter([(1.0, 1.0), (1.0, 1.0), (8.0, 0.0)])
    monkeypatch.setattr(overfitting_alarm, "right_confidences", lambda *_: next(confidences))
    one = alarm()
    for step in range(3):
        one.update(network(), step)
    assert one.looks[-1].pooled == pytest.approx(2 / 10)


def test_the_threshold_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert followed(monkeypatch, alarm(threshold=0.2), [0.3] * 3) == [False] * 3
    assert followed(monkeypatch, alarm(threshold=0.4), [0.3] * 3) == [False, False, True]


def test_a_network_without_confidence_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one = alarm()
    assert followed(monkeypatch, one, [0.1, 0.1, None, 0.1, None]) == [False, False, False, True, True]
    assert one.looks[2].share is None


def test_it_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [0.9, 0.2, 0.3, 0.1, 0.9, 0.9, 0.9]
    whole = alarm()
    said = followed(monkeypatch, whole, shares)
    for cut in range(len(shares)):
        first, second = alarm(), alarm()
        before = followed(monkeypatch, first, shares[:cut])
        second.load_state_dict(first.state_dict())
        assert before + followed(monkeypatch, second, shares[cut:], 10 * cut) == said
        assert (second.cost, second.spoke_at, second.raised) == (whole.cost, whole.spoke_at, whole.raised)


def test_what_it_sees_is_the_share_and_the_model_stays() -> None:
    model, one = network(), alarm()
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        one.update(model, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    for step in (1, 2):
        one.update(model, step)
    assert one.cost == 6 * len(X) + 3  # a third at each look, and a pass that checks the model

    model.eval()
    attacks = tl.attacks.FGSM(0.1), tl.attacks.PGD(0.1, 0.05, 2, random_start=False)
    sums = []
    for third in (slice(0, 2), slice(2, 4), slice(4, 6)):
        crafted = [attack(model, X[third], Y[third]) for attack in attacks]
        chances = [model(inputs).detach().double().softmax(1) for inputs in crafted]
        sums.append([float(chance[range(2), Y[third]].sum()) for chance in chances])
    assert [look.share for look in one.looks] == pytest.approx([two / once for once, two in sums], rel=1e-5)
    once, two = map(sum, zip(*sums, strict=True))
    assert one.looks[2].pooled == pytest.approx(two / once, rel=1e-5)


def test_a_network_that_is_not_trained_is_seen_too() -> None:
    model, frozen = network(), network().requires_grad_(False)
    one, other = alarm(), alarm()
    one.update(model, 0)
    other.update(frozen, 0)
    assert one.looks == other.looks


def test_older_states_are_refused() -> None:
    state = alarm().state_dict()
    state["products"] = state.pop("confidences")
    with pytest.raises(KeyError):
        alarm().load_state_dict(state)


class Broken(nn.Module):
    """Its logits are NaN where no gradient is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(x)
        return logits if torch.is_grad_enabled() else logits * torch.nan


def test_nan_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one = alarm(threshold=0.5)
    with monkeypatch.context() as planting:
        followed(planting, one, [0.1] * 3)
    state = one.state_dict()
    assert one.raised
    for model in (Broken(), network()):
        if isinstance(model, nn.Sequential):
            nn.init.constant_(model[1].weight, torch.nan)
        with pytest.raises(tl.attacks.NaNGradientError, match="2 of 2|4 of 4"):
            one.update(model, 100)
        assert all(torch.equal(one.state_dict()[name], value) for name, value in state.items())


class Restless(nn.Module):
    """Counts its forwards and draws, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        torch.rand(1)
        return self.inner(x)


def test_a_model_that_counts_and_draws_comes_back_as_it_was() -> None:
    model, state = Restless(), torch.get_rng_state()
    alarm().update(model, 0)
    switch = tl.LazySwitch(X, Y, every=1, at=0, held_out=(X, Y), guard=tl.attacks.FGSM(0.1))
    switch(model, 0)
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_look_may_have_another_eps() -> None:
    model, one, half = network(), alarm(), tl.OverfittingAlarm(X, Y, eps=0.05)
    for step, eps in enumerate((0.05, 0.1, None)):
        one.update(model, step, eps=eps)
        half.update(model, step)
    shares = [[look.share for look in seen.looks] for seen in (one, half)]
    assert shares[0][0] == shares[1][0]
    assert shares[0][1] != shares[1][1]
    plain = alarm()
    for step in range(3):
        plain.update(model, step)
    assert shares[0][1:] == [look.share for look in plain.looks][1:]


def test_examples_are_its_own() -> None:
    x = X.clone()
    one = tl.OverfittingAlarm(x, Y, eps=0.1)
    x.zero_()
    assert torch.equal(one.x, X)


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="threshold=1.5"):
        alarm(threshold=1.5)
    with pytest.raises(ConfigError, match="eps=8"):
        tl.OverfittingAlarm(X, Y, eps=8)
    with pytest.raises(ConfigError, match="2 examples"):
        tl.OverfittingAlarm(X[:2], Y[:2], eps=0.1)
    with pytest.raises(ConfigError, match="labels"):
        tl.OverfittingAlarm(X, Y[:3], eps=0.1)
    with pytest.raises(ConfigError, match=r"x lies in \[-1, .*normalisation belongs in the model"):
        tl.OverfittingAlarm(2 * (X > 0.5) - 1.0, Y, eps=0.1)
    with pytest.raises(ConfigError, match=r"x holds torch.uint8; inputs are floats in \[0, 1\]"):
        tl.OverfittingAlarm((255 * X).to(torch.uint8), Y, eps=0.1)
    with pytest.raises(ConfigError, match="label 2"):
        tl.OverfittingAlarm(X, Y, eps=0.1).update(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), 0)
    one = alarm()
    with pytest.raises(ConfigError, match="eps=8"):
        one.update(network(), 10, eps=8)
    one.update(network(), 10)
    with pytest.raises(ConfigError, match="step=10 does not follow"):
        one.update(network(), 10)
    with pytest.raises(KernelError, match="no parameters"):
        one.update(nn.Flatten(), 20)
