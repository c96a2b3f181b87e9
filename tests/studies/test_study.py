"""A study trains, measures and judges once; what is there is gone on with."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tangentlab.cli import main
from tangentlab.errors import ConfigError, RunFolderError, TangentlabError
from tangentlab.records import environment, read_configs, read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig
from tangentlab.runs.display import ProgressDisplay
from tangentlab.runs.evaluation import kept_checkpoints
from tangentlab.studies import judge_study, run_study
from tangentlab.studies import study as module
from tangentlab.studies.claims import Claim, judge
from tangentlab.studies.study import Study, read_values

CLAIM = Claim("test/steps", "A run keeps more than one checkpoint.", "checkpoints kept", 1.0)
FIGURE = ValueFigure(
    "doubled", "Doubled seeds", "By step.", (Quantity("doubled", "twice the seed"),), x="step"
)
Make = Callable[..., RunConfig]


@pytest.fixture
def measured(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that were measured, by a study of tiny ones."""
    seen: list[str] = []
    base = tiny_config("--probe.size=0", "--training.keep_every=0.67")

    def runs(_: int, seeds: Sequence[int]) -> Mapping[str, RunConfig]:
        return {f"tiny-{seed}": replace(base, seed=seed) for seed in seeds}

    def measure(folder: Path, config: RunConfig) -> Iterable[Mapping[str, Any]]:
        seen.append(folder.name)
        for step in kept_checkpoints(folder):
            yield {"step": step, "doubled": 2 * config.seed}

    def judged(values: Sequence[Mapping[str, Any]], setting: str) -> list[Any]:
        counts = {line["seed"]: 0.0 for line in values}
        for line in values:
            counts[line["seed"]] += 1
        return [judge(CLAIM, setting, counts)]

    study = Study("evolution", (CLAIM,), runs, measure, judged, (FIGURE,))
    monkeypatch.setattr(module, "load_study", lambda name: study)
    return seen


def test_a_study_goes_on(measured: list[str], tmp_path: Path) -> None:
    found = run_study("evolution", tmp_path, tier=0, seeds=[0, 1])
    assert found["claims"][0]["verdict"] == "inconclusive"
    lines = read_values(tmp_path)
    assert [(line["run"], line["step"]) for line in lines if line["seed"] == 1] == [
        ("tiny-1", step) for step in (0, 2, 4, 6, 8)
    ]
    assert {line["method"] for line in lines} == {"pgd"}
    found = run_study("evolution", tmp_path, tier=0, seeds=[2, 1])
    assert measured == ["tiny-0", "tiny-1", "tiny-2"]
    assert found["claims"][0]["values"] == {"0": 5.0, "1": 5.0, "2": 5.0}
    assert found["claims"][0]["verdict"] == "supported"
    written = json.loads((tmp_path / "study.json").read_text())
    assert written.pop("environment")
    assert written == found == judge_study(tmp_path)


@pytest.mark.parametrize("asked", [None, [0, 3]])
def test_seeds_that_settings_were_chosen_on_are_left_out_or_named(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[int] | None
) -> None:
    tuned = replace(module.load_study("evolution"), tuning_seeds=(0, 2))
    monkeypatch.setattr(module, "load_study", lambda name: tuned)
    display = ProgressDisplay()
    noted: list[str] = []
    monkeypatch.setattr(display, "note", noted.append)
    found = run_study("evolution", tmp_path, tier=0, seeds=asked, display=display)
    assert measured == [f"tiny-{seed}" for seed in asked or (1, 3, 4)]
    assert set(found["claims"][0]["values"]) == {str(seed) for seed in asked or (1, 3, 4) if seed}
    told = [line for line in noted if "not judged" in line]
    assert told == ([] if asked is None else ["seed 0: for choosing settings on, and not judged"])


def test_where_values_came_from_stays_where_none_are_measured(measured: list[str], tmp_path: Path) -> None:
    run_study("evolution", tmp_path, tier=0, seeds=[0])
    path = tmp_path / "study.json"
    before = {"commit": "before"}
    path.write_text(json.dumps({"environment": before}))
    for seeds, stays in ([0], True), ([0, 1], False):
        run_study("evolution", tmp_path, tier=0, seeds=seeds)
        assert (json.loads(path.read_text())["environment"] == before) == stays


@pytest.mark.parametrize("packed", [False, True])
def test_values_alone_are_gone_on_with(measured: list[str], tmp_path: Path, packed: bool) -> None:
    run_study("evolution", tmp_path, tier=0, seeds=[0, 1])
    shutil.rmtree(tmp_path / "runs")
    if packed:
        pack(tmp_path)
    found = run_study("evolution", tmp_path, tier=0, seeds=[0, 1, 2])
    assert measured == ["tiny-0", "tiny-1", "tiny-2"]
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["tiny-2"]
    assert len(found["claims"][0]["values"]) == 3


def pack(folder: Path) -> None:
    for name in ("values.jsonl", "configs.jsonl"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()


@pytest.mark.parametrize("packed", [False, True])
def test_values_of_runs_that_were_trained_otherwise_are_refused(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packed: bool
) -> None:
    study = module.load_study("evolution")
    run_study("evolution", tmp_path, tier=0, seeds=[0])
    shutil.rmtree(tmp_path / "runs")
    if packed:
        pack(tmp_path)

    def runs(tier: int, seeds: Sequence[int]) -> Mapping[str, RunConfig]:
        longer = {"training": replace(study.runs(tier, [0])["tiny-0"].training, epochs=5)}
        return {key: replace(config, **longer) for key, config in study.runs(tier, seeds).items()}

    monkeypatch.setattr(module, "load_study", lambda name: replace(study, runs=runs))
    before = read_values(tmp_path)
    with pytest.raises(ConfigError, match=r"tiny-0 was run with training.epochs=\d, not 5; give another"):
        run_study("evolution", tmp_path, tier=0, seeds=[1, 0])
    assert measured == ["tiny-0"]
    assert read_values(tmp_path) == before
    assert yaml.safe_load((tmp_path / "config.yaml").read_bytes())["seeds"] == [0]


def test_values_that_do_not_say_what_they_were_trained_with_are_refused(
    measured: list[str], tmp_path: Path
) -> None:
    run_study("evolution", tmp_path, tier=0, seeds=[0])
    (told,) = read_configs(tmp_path).values()
    assert (told["run"], told["config"]["name"]) == ("tiny-0", "digits-pgd")
    assert told["commit"] == environment()["commit"]
    (tmp_path / "configs.jsonl").unlink()
    with pytest.raises(ConfigError, match="does not say what tiny-0 was trained with; give another --out"):
        run_study("evolution", tmp_path, tier=0, seeds=[0, 1])
    run_study("evolution", tmp_path, tier=0, seeds=[1])
    assert measured == ["tiny-0", "tiny-1"]


def test_packed_values_that_were_cut_are_named(tmp_path: Path) -> None:
    (tmp_path / "values.jsonl.gz").write_bytes(gzip.compress(b'{"run": "tiny-0"}\n')[:-9])
    with pytest.raises(RunFolderError, match=r"values\.jsonl\.gz cannot be read"):
        read_values(tmp_path)


def test_a_run_that_fails_leaves_the_other_seeds(measured: list[str], tmp_path: Path) -> None:
    run_study("evolution", tmp_path, tier=0, seeds=[0])
    # Another configuration's run lies where seed 1's is to be.
    (tmp_path / "runs" / "tiny-0").rename(tmp_path / "runs" / "tiny-1")
    with pytest.raises(TangentlabError, match="1 of 2 runs failed: tiny-1"):
        run_study("evolution", tmp_path, tier=0, seeds=[0, 1, 2])
    assert {line["seed"] for line in read_values(tmp_path)} == {0, 2}


def test_a_run_that_fails_leaves_the_others_of_its_seed(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = module.load_study("evolution")

    def runs(tier: int, seeds: Sequence[int]) -> Mapping[str, RunConfig]:
        found = study.runs(tier, seeds)
        return {**found, **{f"other-{key}": replace(config, name="other") for key, config in found.items()}}

    monkeypatch.setattr(module, "load_study", lambda _: replace(study, runs=runs))
    (tmp_path / "runs" / "tiny-0").mkdir(parents=True)  # no run that could be gone on with
    (tmp_path / "runs" / "tiny-0" / "config.yaml").write_text("name: stranger\n")
    with pytest.raises(TangentlabError, match="1 of 2 runs failed: tiny-0"):
        run_study("evolution", tmp_path, tier=0, seeds=[0])
    assert measured == ["other-tiny-0"]
    shutil.rmtree(tmp_path / "runs" / "tiny-0")
    run_study("evolution", tmp_path, tier=0, seeds=[0])
    assert measured == ["other-tiny-0", "tiny-0"]


def test_a_measurement_that_is_stopped_leaves_the_others(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module._measured

    def broken(name: str, run: Path, config: RunConfig) -> list[dict[str, Any]]:
        if config.seed == 1:
            raise KeyboardInterrupt
        return right(name, run, config)

    monkeypatch.setattr(module, "_measured", broken)
    with pytest.raises(KeyboardInterrupt):
        run_study("evolution", tmp_path, tier=0, seeds=[0, 1])
    assert {line["seed"] for line in read_values(tmp_path)} == {0}
    assert json.loads((tmp_path / "study.json").read_text())["claims"][0]["values"] == {"0": 5.0}
    monkeypatch.setattr(module, "_measured", right)
    run_study("evolution", tmp_path, tier=0, seeds=[0, 1])
    assert measured == ["tiny-0", "tiny-1"]


def test_bad_input_is_named(measured: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tier 3 is unknown; choose from '0', '1', '2'$"):
        run_study("evolution", tmp_path, tier=3)
    run_study("evolution", tmp_path / "a", tier=0, seeds=[0])
    with pytest.raises(ConfigError, match="holds tier 0, not 1; give another --out"):
        run_study("evolution", tmp_path / "a", tier=1, seeds=[0])
    with pytest.raises(ConfigError, match="holds precision 'fp32', not 'bf16'; give another --out"):
        run_study("evolution", tmp_path / "a", tier=0, seeds=[0], precision="bf16")
    with pytest.raises(ConfigError, match="precision 'fp16' is unknown"):
        run_study("evolution", tmp_path / "a", tier=0, precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(RunFolderError, match="holds no study"):
        judge_study(tmp_path / "b")


def test_the_command_ends_with_a_report(
    measured: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "study"
    assert main(["study", "evolution", "--tier", "0", "--seeds", "0", "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"Study: {out}\nReport: {out / 'report.html'}\n")
    html = (out / "report.html").read_text()
    assert html.count('<span class="word" data-verdict="inconclusive">') == 1
    assert (out / "figures" / "values-doubled.svg").exists()

    assert main(["study", "all", str(out)]) == 0
    assert "| A run keeps more than one checkpoint. |" in capsys.readouterr().out
    ledger = tmp_path / "ledger.html"
    assert main(["study", "all", str(out), "--out", str(ledger)]) == 0
    assert capsys.readouterr().out == f"Ledger: {ledger}\n"
    assert "A run keeps more than one checkpoint." in ledger.read_text()


def test_the_command_names_the_studies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["study", "evolutoin", "--out", str(tmp_path / "a")]) == 2
    assert "study 'evolutoin' is unknown; did you mean 'evolution'" in capsys.readouterr().err
    assert main(["study", "all", str(tmp_path)]) == 2
    assert "holds no study" in capsys.readouterr().err
    assert main(["study", "evolution", str(tmp_path)]) == 2
    assert "is for 'all'" in capsys.readouterr().err


def test_a_study_in_bf16_says_so(measured: list[str], tmp_path: Path) -> None:
    found = run_study("evolution", tmp_path, tier=0, seeds=[0], precision="bf16")
    assert read_run(tmp_path / "runs" / "tiny-0").config["precision"] == "bf16"
    assert found["claims"][0]["setting"].endswith(", trained in bf16")


def test_only_some_runs_of_a_seed(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = module.load_study("evolution")

    def runs(tier: int, seeds: Sequence[int]) -> Mapping[str, RunConfig]:
        tiny = study.runs(tier, seeds).items()
        return {f"{name}-{key}": replace(config, name=name) for key, config in tiny for name in ("a", "b")}

    monkeypatch.setattr(module, "load_study", lambda name: {"evolution": replace(study, runs=runs)}[name])
    run_study("evolution", tmp_path, tier=0, seeds=[3], only=["b"])
    assert measured == ["b-tiny-3"]
    run_study("evolution", tmp_path, tier=0, seeds=[3])
    assert measured == ["b-tiny-3", "a-tiny-3"]
    with pytest.raises(ConfigError, match="run 'c' is unknown; choose from 'a', 'b'"):
        run_study("evolution", tmp_path, tier=0, seeds=[3], only=["c"])
