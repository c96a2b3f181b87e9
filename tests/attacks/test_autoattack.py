"""AutoAttack: agreement with the authors' code, flags, and evaluations that are killed and go on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from autoattack_reference import Reference
from torch import nn

from tangentlab.attacks import AutoAttack, Evaluation, Square, square
from tangentlab.errors import CheckpointError, ConfigError, ModelError
from tangentlab.randomness import generator

SMALL = AutoAttack(0.15, num_steps=10, num_target_classes=3, num_queries=50)


def evaluate(
    attack: AutoAttack, model: nn.Module, x: torch.Tensor, y: torch.Tensor, **kwargs: object
) -> Evaluation:
    return attack.run(model, x, y, generator=generator(0, "evaluation"), **kwargs)  # type: ignore[arg-type]


def test_square_is_at_least_as_strong_as_the_authors_code(reference: Reference) -> None:
    """Their squares never reach the last row and column, which counts on images of 8 × 8."""
    n = 100
    robust = reference.robust(Square(reference.eps["linf"], 1500), n)  # theirs had 5000
    assert robust <= int(reference.masks["linf", "square"][:, :n].sum(dim=1).min())


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "square"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_attack_agrees_with_the_authors_code(
    reference: Reference, norm: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone on all points: counts within one standard error, and as few other verdicts as between seeds.

    The masks are the authors', with their settings; here 100 of the 400 points, Square with their places.
    """
    monkeypatch.setattr(square, "_places", lambda length, side: max(length - side, 1))
    n = 100
    attack = AutoAttack(reference.eps[norm], norm).attacks(10)[name]
    found = reference.survivors(attack, n)
    theirs = reference.masks[norm, name][:, :n]
    share = float(theirs.double().mean())
    error = (share * (1 - share) * n) ** 0.5
    assert abs(int(found.sum()) - share * n) <= error
    # FAB draws nothing; the others differ between the authors' own seeds.
    differing = {"apgd-ce": 8, "apgd-t": 3, "fab-t": 1, "square": 12}[name]
    assert max(int((found != mask).sum()) for mask in theirs) <= differing


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ensemble_agrees_with_the_authors_code(reference: Reference, norm: str) -> None:
    n = 100
    found = evaluate(AutoAttack(reference.eps[norm], norm), reference.model, reference.x[:n], reference.y[:n])
    theirs = reference.masks[norm, "standard"][:, :n]
    robust = torch.tensor([broken is None for broken in found.broken_by])
    assert max(int((robust != mask).sum()) for mask in theirs) <= 1
    assert found.flags == ()
    counts = list(found.remaining.values())
    assert list(found.remaining) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == int(robust.sum())
    assert found.robust_accuracy == counts[-1] / n
    assert found.clean_accuracy == counts[0] / n
    json.dumps(asdict(found))


def test_the_published_settings() -> None:
    attack = AutoAttack(8 / 255)
    assert list(attack.attacks(10)) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(attack.attacks(3)) == ["apgd-ce", "apgd-dlr", "fab-t", "square"]
    costs = {name: tuple(a.passes)[:2] for name, a in attack.attacks(10).items()}
    assert costs == {
        "apgd-ce": (101, 100),
        "apgd-t": (910, 900),
        "fab-t": (1801, 900),
        "square": (5000, 0),
    }
    assert attack.passes == (1 + 101 + 910 + 1801 + 5000 + 4, 1900, 0)


def test_called_as_an_attack_it_breaks_the_points_that_run_counts(reference: Reference) -> None:
    x, y = reference.x[:60], reference.y[:60]
    found = evaluate(SMALL, reference.model, x, y)
    robust = reference.robust(SMALL, 60)
    assert abs(robust - found.remaining["square"]) <= 1
    assert found.remaining["square"] < found.remaining["clean"]


def test_the_mode_of_the_model_does_not_matter_and_comes_back(reference: Reference) -> None:
    x, y = reference.x[:40], reference.y[:40]
    expected = evaluate(SMALL, reference.model, x, y)
    model = reference.model
    held = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    model.train()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = evaluate(SMALL, model, x, y)
        assert model.training
    finally:
        model.eval()
    assert found == expected
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 5, 8])
def test_a_killed_evaluation_goes_on(reference: Reference, tmp_path: Path, after: int) -> None:
    x, y = reference.x[:50], reference.y[:50]
    lines: list[str] = []
    expected = evaluate(SMALL, reference.model, x, y, batch_size=20, progress=lines.append)
    assert len(lines) > 8
    seen: list[str] = []

    def kill(line: str) -> None:
        seen.append(line)
        if len(seen) == after:
            raise Killed

    path = tmp_path / "state.json"
    with pytest.raises(Killed):
        evaluate(SMALL, reference.model, x, y, batch_size=20, progress=kill, resume=path)
    rest: list[str] = []
    found = evaluate(SMALL, reference.model, x, y, batch_size=20, progress=rest.append, resume=path)
    assert found == expected
    assert seen + rest == lines  # nothing done twice
    assert evaluate(SMALL, reference.model, x, y, batch_size=20, resume=path) == expected


def test_a_state_of_another_evaluation_is_refused(reference: Reference, tmp_path: Path) -> None:
    x, y = reference.x[:10], reference.y[:10]
    path = tmp_path / "state.json"
    evaluate(SMALL, reference.model, x, y, resume=path)
    other = AutoAttack(0.1, num_steps=10, num_target_classes=3, num_queries=50)
    with pytest.raises(CheckpointError, match="another evaluation: settings differ"):
        evaluate(other, reference.model, x, y, resume=path)
    with pytest.raises(CheckpointError, match="inputs differ"):
        evaluate(SMALL, reference.model, 0.5 * x, y, resume=path)
    with pytest.raises(CheckpointError, match="batch_size, seed differ"):
        SMALL.run(reference.model, x, y, generator=generator(1, "evaluation"), batch_size=5, resume=path)
    path.write_text('{"codes": [0')
    with pytest.raises(CheckpointError, match="cannot be read"):
        evaluate(SMALL, reference.model, x, y, resume=path)


class Quantised(nn.Module):
    """Inputs in four steps: right answers, gradients that are exactly zero."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((3 * x).round() / 3)


class Noisy(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x + 0.05 * torch.randn_like(x))


class FirstThree(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)[:, :3]


FLAGS = {
    "randomised": (Noisy, {"randomised"}),
    "quantised": (Quantised, {"zero_gradients", "square_wins"}),
    "probabilities": (lambda model: nn.Sequential(model, nn.Softmax(dim=1)), {"probabilities"}),
    "three classes": (FirstThree, {"few_classes"}),
}


@pytest.mark.parametrize("case", FLAGS)
def test_signs_of_an_overestimate_reach_the_user(reference: Reference, case: str) -> None:
    wrap, expected = FLAGS[case]
    rows = (reference.y < 3).nonzero().squeeze(1)[:60] if case == "three classes" else slice(60)
    x, y = reference.x[rows], reference.y[rows]
    with pytest.warns(UserWarning, match=".") as seen:
        found = evaluate(SMALL, wrap(reference.model).eval(), x, y)
    names = {flag.name for flag in found.flags}
    assert expected <= names
    assert names <= expected | {"square_wins"}  # SMALL's gradient attacks are weak: Square may find some more
    assert {str(warning.message) for warning in seen} == {flag.text for flag in found.flags}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.rand(4, 64)}, ConfigError, r"needs images .*, not \[4, 64\]"),
        ({"x": 2 * torch.ones(4, 1, 8, 8)}, ConfigError, r"x lies in \[2, 2\]; inputs are in \[0, 1\]"),
        ({"x": torch.full((4, 1, 8, 8), float("nan"))}, ConfigError, r"x lies in \[nan, nan\]"),
        ({"y": torch.zeros(3)}, ConfigError, r"x has shape \[4, 1, 8, 8\] and y \[3\]"),
        ({"batch_size": 0}, ConfigError, "batch_size=0 is out of range"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).bfloat16()}, ModelError, "model.float()"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 1))}, ModelError, "1 class"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments: dict[str, object] = {
        "model": nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
        "x": torch.rand(4, 1, 8, 8),
        "y": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(error, match=message):
        SMALL.run(**{**arguments, **change}, generator=generator(0, "evaluation"))  # type: ignore[arg-type]
