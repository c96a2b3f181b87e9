"""The study's settings, what it measures on a tiny run, and the verdicts that planted values give."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tangentlab import modes
from tangentlab.attacks import PGD
from tangentlab.models import MODELS
from tangentlab.randomness import generator
from tangentlab.runs import RunConfig, train
from tangentlab.runs.build import build_data, build_model, resolve_device
from tangentlab.runs.evaluation import checkpoint_path, count_correct
from tangentlab.studies import normalization_settings
from tangentlab.studies.normalization import STUDY
from tangentlab.studies.normalization_settings import TIERS, Setting, Tier, average, current, population
from tangentlab.training import load_weights, recalibrate

SHAPES = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


@pytest.mark.parametrize("tier", TIERS)
def test_runs_are_named_by_variant_and_seed(tier: int) -> None:
    runs = STUDY.runs(tier, [0, 5])
    assert len(runs) == 2 * (len(TIERS[tier].methods) + len(TIERS[tier].variants))
    for key, config in runs.items():
        assert key == f"{config.name}-{config.seed}"
        assert config.threads == 1
    pgd, trained = runs["pgd-5"], {config.method["name"] for config in runs.values()}
    assert pgd.method["step_size"] == pgd.eps / 2
    assert trained == set(TIERS[tier].methods)


@pytest.mark.parametrize("tier", TIERS)
def test_the_smallest_batches_give_the_last_batchnorm_at_most_64_values(tier: int) -> None:
    config = STUDY.runs(tier, [0])["pgd-0"]
    settings = {key: value for key, value in config.model.items() if key != "name"}
    model = MODELS[config.model["name"]](SHAPES[config.data.name], 10, **settings)
    counts: list[int] = []
    for layer in modes.batchnorm_modules(model):
        layer.register_forward_pre_hook(lambda _, args: counts.append(args[0].transpose(0, 1)[0].numel()))
    model.eval()(torch.rand(TIERS[tier].smallest, *SHAPES[config.data.name]))
    assert 1 < min(counts) <= 64
    assert 128 * min(counts) / TIERS[tier].smallest >= 500  # usual


def test_each_setting_is_measured_once() -> None:
    for tier in TIERS.values():
        for variant in (*tier.methods, *normalization_settings.VARIANTS):
            found = normalization_settings.settings(variant, tier)
            assert len(set(found)) == len(found)


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> Tier:
    small = replace(TIERS[0], population=60, points=50, smallest=4)
    monkeypatch.setitem(normalization_settings.TIERS, 0, small)
    return small


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, RunConfig]]:
    folder = tmp_path_factory.mktemp("runs")
    found, configs = {}, STUDY.runs(0, [3])
    for variant in ("pgd", "dual"):
        config = configs[f"{variant}-3"]
        config = replace(
            config,
            model={**config.model, "widths": (4, 4), "strides": (2, 2)},
            training=replace(config.training, epochs=2, batch_size=16),
        )
        train(config, folder / variant)
        found[variant] = folder / variant, config
    return found


def test_the_attack_meets_the_defenders_statistics(tier: Tier, trained: dict) -> None:
    folder, config = trained["pgd"]
    lines = list(STUDY.measure(folder, config))
    names = list(asdict(Setting()))
    by_setting = {Setting(**{name: line[name] for name in names}): line for line in lines}
    assert list(by_setting) == normalization_settings.settings("pgd", tier)
    assert all(line["n"] == 50 and line["variant"] == "pgd" for line in lines)

    examples = build_data(config)
    model = build_model(config, examples, resolve_device("cpu"))
    load_weights(checkpoint_path(folder, "last"), model)
    points = examples.test.select(torch.arange(50))
    x, y = points.x(), points.labels
    attack = PGD(config.eps, config.eps / 4, 20)

    def counted(setting: Setting) -> tuple[int, int]:
        line = by_setting[setting]
        return round(50 * line["clean_accuracy"]), round(50 * line["robust_accuracy"])

    def direct(attack: PGD | None) -> int:
        return count_correct(model, points, attack, seed=3, device=torch.device("cpu"))

    assert counted(Setting()) == (direct(None), direct(attack))
    inputs = examples.train.x(slice(0, 60))
    with modes.buffers_kept(model):
        recalibrate(model, [inputs])
        assert counted(population("clean")) == (direct(None), direct(attack))
    with modes.buffers_kept(model):
        recalibrate(model, inputs.split(4), variance="biased", momentum=0.0)
        assert counted(average(4, "biased")) == (direct(None), direct(attack))

    def crafted() -> torch.Tensor:
        return attack(model, x, y, generator=generator(3, "normalization/evaluation", 0))

    def correct(fed: torch.Tensor) -> int:
        with torch.no_grad():
            return int((model(fed).argmax(1) == y).sum())

    with modes.evaluation(model), modes.buffers_kept(model):
        recalibrate(model, [x], variance="biased")
        held = crafted()
        assert counted(Setting("clean-batch", "biased", 128)) == (correct(x), correct(held))
        with modes.batchnorm(model, statistics="batch"):
            joint = crafted()
            assert counted(current(128)) == (correct(x), min(correct(joint), correct(held)))
            assert not torch.equal(joint, held)


def test_dual_batchnorm_is_judged_by_both_branches(tier: Tier, trained: dict) -> None:
    lines = list(STUDY.measure(*trained["dual"]))
    assert [line["branch"] for line in lines] == ["clean", "crafted"]
    assert lines[0]["robust_accuracy"] != lines[1]["robust_accuracy"]


def planted(changes: dict[tuple[str, Setting], tuple[float, float]]) -> list[dict[str, Any]]:
    """Every line of three seeds, (0.9, 0.5) where nothing else is said."""
    lines = []
    for seed in range(3):
        for variant in (*TIERS[0].methods, *normalization_settings.VARIANTS):
            for setting in normalization_settings.settings(variant, TIERS[0]):
                clean, robust = changes.get((variant, setting), (0.9, 0.5))
                place = {"run": f"{variant}-{seed}", "seed": seed, "variant": variant}
                noise = 1e-4 * seed
                accuracies = {"clean_accuracy": clean + noise, "robust_accuracy": robust + noise}
                lines.append({**place, **asdict(setting), **accuracies, "n": 360})
    return lines


def verdicts(values: list[dict[str, Any]]) -> dict[str, tuple[float | None, str]]:
    found = STUDY.judge(values, "here")
    assert [verdict.claim for verdict in found] == list(STUDY.claims)
    return {
        v.claim.id.split("/")[1]: (None if v.effect is None else round(v.effect, 6), v.verdict) for v in found
    }


def test_without_effects_all_but_the_null_are_refuted() -> None:
    found = verdicts(planted({}))
    assert found.pop("null") == (0, "supported")
    assert found.pop("none") == (0, "inconclusive")
    assert set(found.values()) == {(0, "refuted")}


def test_each_claim_reads_its_own_effect() -> None:
    changes = {
        ("pgd", Setting()): (0.88, 0.5),
        ("pgd", population("crafted")): (0.85, 0.58),
        ("pgd", current(128)): (0.9, 0.46),
        ("pgd", average(128, "biased")): (0.9, 0.49),
        ("standard", average(128, "biased")): (0.92, 0.5),
        ("standard", average(8, "biased")): (0.88, 0.5),
        ("running", Setting()): (0.93, 0.5),
        ("dual", Setting(branch="clean")): (0.96, 0.4),
        ("none", Setting()): (0.9, 0.55),
    }
    assert verdicts(planted(changes)) == {
        "clean-statistics": (2, "supported"),
        "trade": (5, "supported"),
        "batch": (4, "supported"),
        "null": (1.5, "refuted"),
        "small-batches": (1, "supported"),
        "crafting": (3, "supported"),
        "dual": (6, "supported"),
        "none": (5, "supported"),
    }


def test_what_was_not_measured_is_not_judged() -> None:
    values = [line for line in planted({}) if line["variant"] in ("standard", "pgd")]
    found = verdicts([line for line in values if line["seed"] == 0 or line["variant"] == "pgd"])
    assert found["dual"] == (None, "inconclusive")
    assert found["clean-statistics"] == (0, "refuted")
    assert found["null"] == (0, "inconclusive")
