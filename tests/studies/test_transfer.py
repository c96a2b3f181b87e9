"""The study of frozen kernels: its runs, what is read off them, and the verdicts that planted values give."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tangentlab.attacks import PGD, Square
from tangentlab.kernels import Linearized, ntk
from tangentlab.runs import RunConfig, train
from tangentlab.runs.build import build_data, build_model
from tangentlab.runs.frozen import train_frozen
from tangentlab.studies import transfer
from tangentlab.studies.claims import Verdict
from tangentlab.studies.transfer import STUDY, TIERS
from tiny import TINY

Line = dict[str, Any]


@pytest.mark.parametrize("tier", TIERS)
def test_runs_keep_the_moments(tier: int) -> None:
    runs = STUDY.runs(tier, [2])
    turned = {f"pgd-{kind}" for kind in transfer.TURNED}
    assert set(runs) == {f"{name}-2" for name in {*TIERS[tier][2], *turned}}
    for key in turned:
        switch = runs[f"{key}-2"].switch
        assert (switch.rule, switch.epoch) == ("fixed", runs["pgd-2"].training.epochs / 2)
    for config in runs.values():
        every = config.training.keep_every
        assert every is not None
        for share in transfer.MOMENTS.values():  # each within half a gap
            assert (
                abs(share * config.training.epochs / every - round(share * config.training.epochs / every))
                < 1e-6
            )


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, RunConfig]:
    words = " ".join(word for word in TINY if not word.startswith(("--method", "--probe")))
    monkeypatch.setitem(TIERS, 0, ("digits", f"{words} --training.keep_every=1", ("standard", "pgd")))
    small = {"STEPS": 4, "BATCH": 20, "POINTS": 30, "QUERIES": 5, "FITTED": 20, "PROBED": 20}
    for name, value in small.items():
        monkeypatch.setattr(transfer, name, value)
    runs = dict(STUDY.runs(0, [1]))
    for key, config in runs.items():
        train(config, tmp_path / key)
    return runs


def test_a_run_is_read_at_its_moments(finished: dict[str, RunConfig], tmp_path: Path) -> None:
    lines = list(STUDY.measure(tmp_path / "pgd-1", finished["pgd-1"]))
    assert Counter(line["what"] for line in lines) == {"run": 4, "kernel": 5, "frozen": 21, "regression": 5}
    assert [line["epoch"] for line in lines if line["what"] == "kernel"] == [0.0, 0.0, 1.0, 2.0, 3.0]
    long = {
        (line["moment"], line["offset"], line["examples"], line["steps"])
        for line in lines
        if line.get("whole")
    }
    # Of three epochs of 120 examples, in batches of 20, what is left: they were kept at epochs 0, 1 and 2.
    left = {"early": 18, "middle": 12, "settled": 6}
    assert long == {(m, "kept", e, n) for m, n in left.items() for e in ("clean", "one-step")}
    kernels = [line for line in lines if line["what"] == "kernel"]
    assert kernels[0]["to_standard"] == pytest.approx(0, abs=1e-6)  # both before training
    last = kernels[-1]
    assert last["to_standard"] > 1e-4
    assert last["pgd_to_standard"] > 1e-4
    assert "to_pgd" not in last
    for line in lines:
        for name, value in line.items():
            assert not name.endswith("_accuracy") or 0 <= value <= 1
    own = next(line for line in lines if line["what"] == "run" and line["moment"] == "end")
    assert own["pgd_accuracy"] <= own["from_standard_accuracy"] <= own["clean_accuracy"]
    assert all(0 < line["loss"] < 10 for line in lines if line["what"] == "frozen")
    for found in (line for line in lines if line["what"] == "regression"):
        assert found["network_robust_accuracy"] == own["robust_accuracy"] <= own["pgd_accuracy"]
    assert all(line["robust_accuracy"] <= line["pgd_accuracy"] for line in lines if "robust_accuracy" in line)


def test_of_a_run_that_turned_its_end_is_read(finished: dict[str, RunConfig], tmp_path: Path) -> None:
    (line,) = STUDY.measure(tmp_path / "pgd-clean-1", finished["pgd-clean-1"])
    assert (line["what"], line["turned_to"], line["moment"], line["epoch"]) == ("run", "clean", "middle", 1.5)


class Hiding(nn.Module):
    """f = ±(x₁ rounded down to tenths − ½): no gradient says that a smaller x₁ turns it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = (10 * x[:, 0, 0, :1]).floor() / 10 - 0.5 + 0 * x.flatten(1).sum(1, keepdim=True)
        return torch.cat([f, -f], 1)


def test_what_hides_its_gradients_is_found_by_square() -> None:
    x, y = torch.full((20, 1, 2, 2), 0.55), torch.zeros(20, dtype=torch.int64)
    pgd = PGD(0.1, 0.025, 5, random_start=False)
    attack = transfer.Unhidden(pgd, Square(0.1, 50))
    noise = torch.Generator().manual_seed(0)
    withstood, both = (float((Hiding()(one(Hiding(), x, y, generator=noise)).argmax(1) == y).double().mean())
                       for one in (pgd, attack))  # fmt: skip
    assert withstood == 1
    assert both < 0.2
    assert float((attack(Hiding(), x, y, generator=noise) - x).abs().max()) <= 0.1 + 1e-6


def test_what_hides_its_gradients_is_found_by_climbing_another_network() -> None:
    x, y = torch.full((20, 1, 2, 2), 0.55), torch.zeros(20, dtype=torch.int64)
    open_one = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        open_one[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    pgd = PGD(0.1, 0.025, 5, random_start=False)
    attack = transfer.Unhidden(pgd, Square(0.1, 1), (open_one,))
    fed = attack(Hiding(), x, y, generator=torch.Generator().manual_seed(0))
    assert float((Hiding()(fed).argmax(1) == y).double().mean()) == 0
    assert attack.passes.forwards == 2 * pgd.passes.forwards + Square(0.1, 1).passes.forwards


def test_the_regression_is_the_exact_kernels() -> None:
    """Against Θ(x', x) (Θ + ridge)⁻¹ y, dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, points, y = (torch.randn(n, k, dtype=torch.float64) for n, k in ((7, 6), (5, 6), (7, 3)))
    theta, cross = (ntk(model, left, x, kind="full").permute(0, 2, 1, 3) for left in (x, points))
    theta, cross = theta.reshape(21, 21), cross.reshape(15, 21)
    exact = cross @ torch.linalg.solve(theta + 0.5 * torch.eye(21, dtype=torch.float64), y.flatten())
    fitted = transfer.fit(model, x, y, ridge=0.5)
    assert torch.allclose(fitted(points).flatten(), exact, atol=1e-10 * float(exact.abs().max()))


def test_training_a_frozen_network_lowers_its_loss(finished: dict[str, RunConfig]) -> None:
    config = finished["pgd-1"]
    examples = build_data(config)
    network = Linearized(build_model(config, examples, torch.device("cpu")))
    x, y = examples.train.x(), examples.train.labels
    before = float(nn.functional.cross_entropy(network(x), y).detach())
    settings = {"steps": 30, "batch_size": 40, "peak": 1.0, "seed": 0}
    said = train_frozen(network, examples.train, **settings)
    after = float(nn.functional.cross_entropy(network(x), y).detach())
    assert after < before - 0.05
    assert said == pytest.approx(after, abs=0.1)
    again = Linearized(build_model(config, examples, torch.device("cpu")))
    train_frozen(again, examples.train, **settings)
    assert all(torch.equal(a, b) for a, b in zip(network.delta, again.delta, strict=True))


def planted(seed: int) -> list[Line]:
    def line(what: str, method: str, moment: str, **values: Any) -> Line:
        return {"what": what, "method": method, "moment": moment, "seed": seed, **values}

    robust = {"early": 0.3, "middle": 0.5, "settled": 0.58, "end": 0.6}
    lines = [line("run", "pgd", moment, robust_accuracy=value) for moment, value in robust.items()]
    lines += [line("run", "pgd", "middle", turned_to="clean", robust_accuracy=0.05)]
    for method, robust in {"standard": 0.1, "fgsm_rs": 0.5, "pgd": 0.55}.items():
        for moment, lost in {"early": 0.2, "middle": 0.06, "settled": 0.0, "end": 0.0}.items():
            lines += [
                line(
                    "frozen",
                    method,
                    moment,
                    offset=offset,
                    examples=examples,
                    whole=whole,
                    robust_accuracy=robust - lost + more,
                )
                for offset, whole in product(transfer.OFFSETS, (False, True))
                for examples, more in {"clean": -0.02, "one-step": 0.04 + 0.001 * seed, "pgd": -0.3}.items()
            ]
        lines += [
            line("regression", method, moment, robust_accuracy=robust, network_clean_accuracy=0.8,
                 network_pgd_accuracy=0.5, transferred_accuracy=transferred)
            for moment, transferred in {"start": 0.6, "end": 0.7}.items()
        ]  # fmt: skip
    return lines


def test_verdicts_on_planted_values() -> None:
    values = [line for seed in range(6, 9) for line in planted(seed)]
    found: dict[str, Verdict] = {v.claim.id.partition("/")[2]: v for v in STUDY.judge(values, "here")}
    assert {name: verdict.verdict for name, verdict in found.items()} == {
        "suffices": "refuted",
        "settled": "supported",
        "learns": "supported",
        "early": "supported",
        "clean": "refuted",
        "keeps": "supported",
        "kernel-or-examples": "supported",
        "one-step": "refuted",
        "regression": "supported",
        "training-free": "supported",
        "last-kernel": "refuted",
    }
    assert found["suffices"].values[7] == pytest.approx(60 - 53.7)
    assert found["settled"].values[7] == pytest.approx(60 - 59.7)
    assert found["learns"].values[7] == pytest.approx(53.7 - 50)
    assert found["early"].values[7] == pytest.approx((39.7 - 30) / 30)
    assert found["keeps"].values[7] == pytest.approx(47 - 5)
    assert found["training-free"].effect == pytest.approx(2 / 3)
    assert found["last-kernel"].effect == pytest.approx(1 / 3)
    without = [line for line in values if (line["seed"], line["method"]) != (6, "fgsm_rs")]
    fewer = {v.claim.id.partition("/")[2]: v for v in STUDY.judge(without, "here")}
    assert set(fewer["one-step"].values) == {7, 8}
    assert set(fewer["suffices"].values) == {6, 7, 8}
