"""Evaluations of a run: what they say, what they keep, and that a killed one ends as the whole one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tangentlab.attacks import APGD, AutoAttack
from tangentlab.cli import main
from tangentlab.errors import CheckpointError, ConfigError
from tangentlab.files import read_tensors
from tangentlab.records import read_run
from tangentlab.report.subject import subjects
from tangentlab.report.table import attack_columns, flags, table
from tangentlab.runs import RunConfig, evaluate, evaluation, load_config, train
from tangentlab.runs.build import build_data, build_model
from tiny import TINY

ALL = ("none", "fgsm", "pgd", "apgd", "autoattack")
SMALL = partial(AutoAttack, num_steps=4, num_target_classes=2, num_queries=20)
evaluate_small = partial(evaluate, attacks=ALL, num_steps=3, test_size=50)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(load_config("digits", [*TINY, "--training.epochs=6", "--probe.size=0", "--eps=0.05"]), folder)
    # So that the two checkpoints hold different weights.
    assert main(["train", "digits", *TINY, "--probe.size=0", "--out", str(folder) + "-other"]) == 0
    other = folder.with_name("run-other") / "checkpoints" / "best.safetensors"
    shutil.copy(other, folder / "checkpoints" / "best.safetensors")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy without evaluations, to be evaluated in batches of 20 and with a short AutoAttack."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluations")
    (tmp_path / "run" / "evaluations.jsonl").unlink()
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluation.BATCH, "cpu", 20)
    monkeypatch.setattr(evaluation, "build_attacks", _with_small_autoattack(evaluation.build_attacks))


def _with_small_autoattack(build: Callable[..., Any]) -> Callable[..., Any]:
    def made(config: RunConfig, *args: Any, **kwargs: Any) -> dict[str, Any]:
        attacks = build(config, *args, **kwargs)
        return {
            name: SMALL(config.eps) if name == "autoattack" else attack for name, attack in attacks.items()
        }

    return made


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """The lines, and the verdict files."""
    kept = {path.name: json.loads(path.read_text()) for path in (folder / "evaluations").iterdir()}
    return without_seconds({"lines": read_run(folder).evaluations, **kept})


def test_every_attack_on_both_checkpoints(run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # AutoAttack's flags stand in the line
        lines = evaluate_small(run)
    assert [(line["checkpoint"], line["attack"]) for line in lines] == [
        (checkpoint, attack) for checkpoint in ("best", "last") for attack in ALL
    ]
    assert read_run(run).evaluations == lines
    for line in lines:
        kept = json.loads((run / "evaluations" / f"{line['checkpoint']}-{line['attack']}.json").read_text())
        assert kept["finished"]
        assert line["n"] == len(kept["broken_by"]) == 50
        assert line["correct"] == kept["broken_by"].count(None)
        assert line["seconds"] == kept["seconds"] > 0
        assert line["interval"][0] <= line["accuracy"] == line["correct"] / 50 <= line["interval"][1]
        clean = {"none": True, "fgsm": False, "pgd": False}.get(line["attack"], True)
        assert set(kept["broken_by"]) <= {None, line["attack"], *(["clean"] if clean else [])} | (
            {"apgd-ce", "apgd-t", "fab-t", "square"} if line["attack"] == "autoattack" else set()
        )
    none, _, pgd, apgd, auto = lines[5:]
    assert auto["correct"] <= apgd["correct"] <= none["correct"]
    assert pgd["settings"]["num_steps"] == apgd["settings"]["num_steps"] == 3
    assert auto["remaining"]["clean"] == none["correct"]
    assert auto["remaining"]["square"] == auto["correct"]
    assert lines[0]["correct"] != none["correct"]  # other weights


def test_misclassified_points_are_their_own_adversarial_examples(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked = []
    call = APGD.__call__

    def watched(self: APGD, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> Any:
        attacked.append(len(x))
        assert bool((model(x).argmax(dim=1) == y).all())
        return call(self, model, x, y, **kwargs)

    monkeypatch.setattr(APGD, "__call__", watched)
    none, _ = evaluate(run, attacks=("none", "apgd"), checkpoints=("last",), num_steps=2, test_size=50)
    assert sum(attacked) == none["correct"] < 50


def test_counts_are_those_of_the_validation_loop(run: Path) -> None:
    (line,) = evaluate(run, attacks=("pgd",), checkpoints=("last",), test_size=50)
    config = load_config(run)
    examples = build_data(config)
    model = build_model(config, examples, torch.device("cpu"))
    tensors, _ = read_tensors(run / "checkpoints" / "last.safetensors")
    model.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
    attack = evaluation.build_attacks(config, ["pgd"])["pgd"]
    split = examples.test.select(torch.arange(50))
    count = evaluation.count_correct(model, split, attack, seed=config.seed, device=torch.device("cpu"))
    assert line["correct"] == count


@pytest.mark.parametrize("where", ["pgd", "apgd", "autoattack"])
def test_an_interrupted_evaluation_ends_as_the_whole_one(run: Path, tmp_path: Path, where: str) -> None:
    whole = shutil.copytree(run, tmp_path / "whole")
    said: list[str] = []
    evaluate_small(whole, progress=said.append)
    moments = [number for number, text in enumerate(said) if f"last, {where}" in text]
    seen: list[str] = []

    def interrupt(text: str) -> None:
        seen.append(text)
        if len(seen) == moments[2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_small(run, progress=interrupt)
    rest: list[str] = []
    evaluate_small(run, progress=rest.append)
    assert contents(run) == contents(whole)
    batches = [text for text in seen + rest if "batch" in text]
    assert batches == [text for text in said if "batch" in text]  # nothing done twice
    again: list[str] = []
    assert evaluate_small(run, progress=again.append) == read_run(run).evaluations
    assert not [text for text in again if "batch" in text]  # read


def test_a_killed_evaluation_ends_as_the_whole_one(run: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(run, tmp_path / "whole")
    code = (
        "import os, signal, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from tangentlab.runs import evaluate, evaluation\n"
        "evaluation.BATCH['cpu'] = 20\n"
        "def kill(text):\n"
        "    if text.startswith('last, apgd: batch 2'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "evaluate(sys.argv[1], attacks=('none', 'apgd'), num_steps=3, test_size=50, progress=kill)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run)], check=False).returncode == -9
    kept = json.loads((run / "evaluations" / "last-apgd.json").read_text())
    assert (kept["done"], kept["finished"]) == ({"apgd": 2}, False)
    assert len(read_run(run).evaluations) == 3
    for folder in (run, whole):
        evaluate(folder, attacks=("none", "apgd"), num_steps=3, test_size=50)
    assert contents(run) == contents(whole)


def test_ctrl_c_says_how_to_go_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> Iterator[str]:
        raise KeyboardInterrupt

    words = ["evaluate", str(run), "--attacks", "none", "apgd", "--test_size", "20"]
    with monkeypatch.context() as patch:
        patch.setattr(APGD, "__call__", interrupt)
        assert main(words) == 130
    assert capsys.readouterr().err == f"tangentlab: interrupted; go on with: tangentlab {' '.join(words)}\n"
    assert [line["attack"] for line in read_run(run).evaluations] == ["none"]
    assert main(words) == 0


@pytest.mark.parametrize("attack", ["pgd", "autoattack"])
@pytest.mark.parametrize("change", ["weights", "size", "damage"])
def test_a_state_of_another_evaluation_is_replaced(run: Path, attack: str, change: str) -> None:
    first = evaluate(run, attacks=(attack,), checkpoints=("last",), test_size=20)
    path = run / "evaluations" / f"last-{attack}.json"
    if change == "damage":
        path.write_text(path.read_text()[:-9])
    if change == "weights":
        best = run / "checkpoints" / "best.safetensors"
        shutil.copy(best, run / "checkpoints" / "last.safetensors")
    size = 21 if change == "size" else 20
    (line,) = evaluate(run, attacks=(attack,), checkpoints=("last",), test_size=size)
    kept = json.loads(path.read_text())
    assert line["n"] == len(kept["broken_by"]) == size
    if change == "weights":
        (expected,) = evaluate(run, attacks=(attack,), checkpoints=("best",), test_size=size)
        assert line["correct"] == expected["correct"] != first[0]["correct"]
    if change == "damage":
        assert without_seconds(line) == without_seconds(first[0])
    if change == "size":
        assert [line["n"] for line in read_run(run).evaluations] == [20, 21]  # nothing lost


def test_checkpoints_of_equal_weights_are_evaluated_once(run: Path) -> None:
    shutil.copy(run / "checkpoints" / "last.safetensors", run / "checkpoints" / "best.safetensors")
    said: list[str] = []
    lines = evaluate(run, attacks=("none", "autoattack"), test_size=30, progress=said.append)
    assert not [text for text in said if text.startswith("last") and "batch" in text]
    for best, last in zip(lines[:2], lines[2:], strict=True):
        assert {**best, "checkpoint": "last"} == last
    assert (run / "evaluations" / "last-autoattack.json").exists()


def test_lines_that_were_found_survive_an_attack_that_fails(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("AutoAttack needs images")

    monkeypatch.setattr(AutoAttack, "run", refuse)
    assert main(["evaluate", str(run), "--attacks", "none", "autoattack", "--test_size", "20"]) == 2
    assert capsys.readouterr().err == "tangentlab: AutoAttack needs images\n"
    assert [line["attack"] for line in read_run(run).evaluations] == ["none"]


def test_flags_reach_the_user(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--attacks", "autoattack", "--checkpoints", "last", "--test_size", "20"]
    assert main(["evaluate", str(run), *words]) == 0
    evaluated = read_run(run)
    (line,) = evaluated.evaluations
    line["settings"]["num_queries"] = 5000
    line["flags"] = [{"name": "square_wins", "text": "Square broke 3"}]
    (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--attacks", "none", "--test_size", "20"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "Flag: last, autoattack: Square broke 3 [square_wins]"
    assert "time" in out
    assert "num_queries=5000" in out
    record = read_run(run)
    assert flags(record) == ["last, autoattack: Square broke 3 [square_wins]"]
    assert attack_columns(subjects([record])) == ["none", "fgsm", "pgd", "autoattack"]
    (row,) = table(subjects([record]))
    assert [cell.value for cell in row.last][1:3] == ["–", "–"]
    assert "flag: square_wins" in row.last[3].notes
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Robustness may be overestimated" in page
    assert "Square broke 3" in page
    assert ">AutoAttack</th>" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"attacks": ("pdg",)}, "attack 'pdg' is unknown; did you mean 'pgd'? Choose from 'none', 'fgsm',"),
        ({"attacks": ()}, "no attack is named; choose from 'none'"),
        ({"checkpoints": ("first",)}, "checkpoint 'first' is unknown; choose from 'best', 'last'"),
        ({"attacks": ("none", "apgd"), "num_restarts": 2}, "num_restarts=2 is a setting of 'pgd'; chosen: "),
        (
            {"attacks": ("autoattack",), "num_steps": 9},
            "num_steps=9 is a setting of 'pgd' and 'apgd'; chosen:",
        ),
        ({"num_steps": 0}, "num_steps=0 is out of range; at least 1"),
        ({"test_size": 0}, "test_size=0 is out of range; at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(run: Path, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        evaluate(run, **words)
    assert message in str(error.value)
    assert not (run / "evaluations").exists()


def test_a_checkpoint_that_is_asked_for_must_be_there(run: Path) -> None:
    (run / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no checkpoint 'best'; choose 'last'"):
        evaluate(run, checkpoints=("best",))
    assert {line["checkpoint"] for line in evaluate(run, attacks=("none",))} == {"last"}


def test_precision_layout_and_autocast_do_not_matter(tiny_config: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(tiny_config("--precision=bf16", "--channels_last=true", "--probe.size=0"), folder)
    expected = without_seconds(evaluate_small(folder, attacks=("pgd", "apgd", "autoattack")))
    shutil.rmtree(folder / "evaluations")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = without_seconds(evaluate_small(folder, attacks=("pgd", "apgd", "autoattack")))
    assert found == expected
