"""A run that is killed at any moment and resumed equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import pytest

from tangentlab.errors import CheckpointError, ConfigError, InterruptedRunError, RunFolderError
from tangentlab.files import read_tensors, write_tensors
from tangentlab.records import read_run
from tangentlab.runs import RunConfig, train
from tangentlab.runs import hooks as hooks_module

Make = Callable[..., RunConfig]


def without_seconds(value: Any) -> Any:
    """The value without wall-clock times."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if not re.search(r"(^|_)seconds$", k)}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """Everything a run leaves, but for the seconds, the process and the environment."""
    record = read_run(folder)
    found: dict[str, Any] = {
        "config": record.config,
        "metrics": without_seconds(record.metrics),
        "evaluations": without_seconds(record.evaluations),
        "status": {k: v for k, v in without_seconds(record.status).items() if k != "pid"},
    }
    for path in sorted([*folder.glob("kernels/*"), *folder.glob("checkpoints/*")]):
        tensors, metadata = read_tensors(path)
        found[path.name] = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        found[path.name + " place"] = {
            k: without_seconds(v)
            for k, v in metadata.items()
            if k in ("step", "passes", "steering", "summed_learning_rate")
        }
    return found


@pytest.fixture
def config(tiny_config: Make) -> RunConfig:
    """Everything that goes on where it was: the probe, a switch that turns, an alarm that speaks and goes
    back, what methods keep."""
    switch = "rule=kernel every=0.34 size=10 threshold=0.9 resume=1.2 patience=1 held_out=20 max_fall=0.5"
    words = [f"--switch.{word}" for word in switch.split()]
    words += [f"--alarm.{word}" for word in ["every=2", "size=10", "threshold=0.999", "restore=true"]]
    return tiny_config("--probe.every=0.34", "--evaluation.every=0.67", *words)


@pytest.fixture
def whole(config: RunConfig, tmp_path: Path) -> dict[str, Any]:
    assert killed.run(config, tmp_path / "whole") == 0
    found = contents(tmp_path / "whole")
    assert {line.get("switch/phase") for line in found["metrics"]} == {None, "full", "cheap"}
    raised = [line["alarm/raised"] for line in found["metrics"] if "alarm/raised" in line]
    assert raised.index(True) == 2  # the third look, after a checkpoint
    assert "before-alarm.safetensors" in found
    assert any(line.get("alarm/restored") for line in found["metrics"])
    return found


def test_killed_at_any_file_operation(config: RunConfig, whole: dict[str, Any], tmp_path: Path) -> None:
    counter = killed.context.Value("i", 0)
    assert killed.run(config, tmp_path / "counted", counter=counter) == 0
    operations = counter.value
    assert operations > 40  # else nothing was watched
    draws = random.Random(20)
    # Always the first and last, which create and end the run; the others anywhere.
    moments = [1, 3, operations, *draws.sample(range(4, operations), 15)]
    for number, moment in enumerate(moments):
        folder = tmp_path / f"run{number}"
        assert killed.run(config, folder, operation=moment) == -signal.SIGKILL
        if number % 3 == 0:  # killed once more while it resumes
            killed.run(config, folder, operation=draws.randrange(1, 20))
        assert killed.run(config, folder) == 0, f"resuming after operation {moment}"
        assert contents(folder) == whole, f"killed at operation {moment} of {operations}"
        assert not list(folder.rglob("*.part"))


def test_a_run_that_the_alarm_steers_goes_on_where_it_was(tiny_config: Make, tmp_path: Path) -> None:
    # To what is cheaper, here; the looks come to lie on either side of so high a threshold.
    words = ["--switch.rule=alarm", "--switch.to=fgsm", "--alarm.every=1", "--alarm.size=10"]
    config = tiny_config(*words, "--alarm.threshold=0.999", "--evaluation.every=0.67")
    counter = killed.context.Value("i", 0)
    assert killed.run(config, tmp_path / "whole", counter=counter) == 0
    whole = contents(tmp_path / "whole")
    raised = [line["alarm/raised"] for line in whole["metrics"] if "alarm/raised" in line]
    assert {True, False} == set(raised)
    draws = random.Random(22)
    for moment in draws.sample(range(4, counter.value), 4):
        folder = tmp_path / f"run{moment}"
        assert killed.run(config, folder, operation=moment) == -signal.SIGKILL
        assert killed.run(config, folder) == 0
        assert contents(folder) == whole, f"killed at operation {moment}"


def test_killed_at_random_times(config: RunConfig, whole: dict[str, Any], tmp_path: Path) -> None:
    killed.run(config, tmp_path / "first")  # starts the server of the children, whose time is not a run's
    started = time.perf_counter()
    killed.run(config, tmp_path / "timed")
    duration = time.perf_counter() - started
    draws = random.Random(21)
    interrupted = 0
    for number in range(6):
        folder = tmp_path / f"run{number}"
        interrupted += killed.kill_after(draws.uniform(0.1, 0.95) * duration, config, folder) != 0
        assert killed.run(config, folder) == 0
        assert contents(folder) == whole
    assert interrupted > 0


def test_a_killed_run_says_so_and_a_running_one_is_left_alone(tiny_config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny_config("--training.epochs=1000")  # it does not end by itself before it is killed
    child = killed.start(config, folder)
    try:
        while not (folder / "checkpoints" / "last.safetensors").exists():
            assert child.is_alive()
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(RunFolderError, match="in use by another process"):
            train(config, folder, resume=True)
        assert read_run(folder).state == "running"
    finally:
        child.kill()
        child.join()
    assert read_run(folder).state == "killed"


def test_ctrl_c_saves_and_says_how_to_go_on(config: RunConfig, whole: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "tangentlab.cli", "train", str(tmp_path / "config.yaml"), "--out"]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [*command, str(folder)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.005)
    while process.poll() is None and not (folder / "metrics.jsonl").read_text().count("\n") > 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    last = stderr.strip().splitlines()[-1]
    assert re.search(r"interrupted at step \d+ of 9; go on with: tangentlab train \S+/run --resume", last)
    assert read_run(folder).state == "interrupted"
    assert killed.run(config, folder) == 0
    assert contents(folder) == whole


@pytest.mark.parametrize("more", [(), ("--channels_last=true", "--precision=bf16")])
def test_stopped_at_every_step_the_state_is_whole(
    tiny_config: Make, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint in the middle of an epoch goes on like one at its end."""
    folder, config = tmp_path / "run", tiny_config("--probe.every=0.34", "--evaluation.every=0.67", *more)
    train(config, tmp_path / "whole")
    monkeypatch.setattr(hooks_module.Interruption, "heard", True, raising=False)
    monkeypatch.setattr(hooks_module.Interruption, "asked", False, raising=False)
    monkeypatch.setattr(hooks_module.Interruption, "at_once", False, raising=False)
    monkeypatch.setattr(hooks_module.Interruption, "__init__", lambda self: None)
    for step in range(1, 9):
        with pytest.raises(InterruptedRunError, match=f"interrupted at step {step} of 9"):
            train(config, folder, resume=True)
    train(config, folder, resume=True)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_run_with_the_probe_equals_the_run_without(tiny_config: Make, tmp_path: Path) -> None:
    train(tiny_config("--probe.every=0.34"), tmp_path / "with")
    train(tiny_config("--probe.size=0"), tmp_path / "without")
    found = [contents(tmp_path / name) for name in ("with", "without")]
    for name in ("last.safetensors", "best.safetensors"):
        weights = [
            {k: v for k, v in f[name].items() if k.startswith(("model/", "optimizer/"))} for f in found
        ]
        assert weights[0] == weights[1]
        assert weights[0]
    lines = [
        [line for line in f["metrics"] if not any(key.startswith("kernel/") for key in line)] for f in found
    ]
    assert lines[0] == lines[1]
    assert len(found[0]["metrics"]) > len(lines[0])
    assert found[0]["evaluations"] == found[1]["evaluations"]


def test_resuming_needs_the_same_configuration_and_model(tiny_config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(tiny_config(), folder)
    with pytest.raises(RunFolderError, match="exists; give another --out, or --resume"):
        train(tiny_config(), folder)
    with pytest.raises(ConfigError, match="was run with seed=0, not 1; give another --out"):
        train(tiny_config("--seed=1"), folder, resume=True)
    before = contents(folder)
    train(tiny_config(), folder, resume=True)  # finished: nothing to do but to evaluate again
    after = contents(folder)
    assert before["last.safetensors"] == after["last.safetensors"]
    assert before["metrics"] == after["metrics"]


def test_a_checkpoint_of_another_model_is_refused(tiny_config: Make, tmp_path: Path) -> None:
    train(tiny_config(), tmp_path / "a")
    train(tiny_config("--model.widths=[4,6]"), tmp_path / "b")
    (tmp_path / "a" / "checkpoints" / "last.safetensors").replace(
        tmp_path / "b" / "checkpoints" / "last.safetensors"
    )
    with pytest.raises(
        CheckpointError, match="is a checkpoint of another model: features.3.weight has shape"
    ):
        train(tiny_config("--model.widths=[4,6]"), tmp_path / "b", resume=True)


@pytest.mark.parametrize("name", ["probe/place", "switch/place", "alarm/alarm/place"])
def test_a_checkpoint_whose_probe_is_another_versions_is_refused(
    config: RunConfig, tmp_path: Path, name: str
) -> None:
    train(config, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.safetensors"
    tensors, metadata = read_tensors(path)
    tensors[f"extra/{name}"] = tensors[f"extra/{name}"][:-1].clone()
    write_tensors(path, tensors, metadata)
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"its {name.partition('/')[0]} is another version's; give"):
        train(config, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before
