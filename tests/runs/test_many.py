"""Many runs, here and in processes of their own: what fails or is killed does not touch the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tangentlab import children
from tangentlab.errors import ConfigError, InterruptedRunError, TangentlabError
from tangentlab.files import read_tensors
from tangentlab.records import Run, read_run
from tangentlab.runs import Outcome, RunConfig, check_outcomes, train, train_many
from tangentlab.runs import hooks as hooks_module
from tiny import TINY

Make = Callable[..., RunConfig]
SMALL = ["--training.epochs=1", "--probe.size=0"]


def weights(folder: Path) -> dict[str, Any]:
    tensors, _ = read_tensors(folder / "checkpoints" / "last.safetensors")
    return {name: value.tolist() for name, value in tensors.items()}


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_run_is_reported_and_the_others_go_on(tiny_config: Make, tmp_path: Path, jobs: int) -> None:
    good = tiny_config(*SMALL, "--threads=1")
    train(tiny_config(*SMALL, "--eps=0.1"), tmp_path / "other")
    train(good, tmp_path / "done")
    before = (tmp_path / "done" / "evaluations.jsonl").stat()
    runs = {
        tmp_path / "other": good,
        tmp_path / "done": good,
        tmp_path / "wide": tiny_config(*SMALL, "--data.train_size=100000"),
        tmp_path / "new": good,
    }
    outcomes = train_many(runs, jobs=jobs)
    assert [outcome.folder for outcome in outcomes] == list(runs)
    assert states(outcomes) == ["failed", "already finished", "failed", "finished"]
    assert "was run with eps=0.1, not 0.28" in outcomes[0].message
    assert "100000" in outcomes[2].message
    assert (tmp_path / "done" / "evaluations.jsonl").stat() == before  # not even evaluated again
    assert weights(tmp_path / "new") == weights(tmp_path / "done")
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(TangentlabError, match="2 of 4 runs failed: other: .*; wide: "):
        check_outcomes(outcomes)


def test_an_error_of_any_kind_is_one_line(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("first\nsecond")

    monkeypatch.setattr("tangentlab.runs.many.train", fail)
    (outcome,) = train_many({tmp_path / "run": tiny_config()})
    assert str(outcome).startswith("run: failed: KeyError: ")
    assert "\n" not in str(outcome)


def test_an_interrupted_run_stops_the_rest_and_the_same_call_goes_on(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {tmp_path / f"seed-{seed}": tiny_config(f"--seed={seed}", "--probe.size=0") for seed in (0, 1)}
    train(tiny_config("--probe.size=0"), tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(hooks_module.Interruption, "stop", _stop_at(4))
        outcomes = train_many(runs)
    assert [str(outcome) for outcome in outcomes] == [
        "seed-0: interrupted: at step 4 of 9",
        "seed-1: interrupted: not started",
    ]
    with pytest.raises(InterruptedRunError, match="interrupted: 0 of 2 runs finished, 0 failed"):
        check_outcomes(outcomes)
    assert states(train_many(runs)) == ["finished", "finished"]
    assert weights(tmp_path / "seed-0") == weights(tmp_path / "whole")
    assert weights(tmp_path / "seed-1") != weights(tmp_path / "whole")


def _stop_at(number: int) -> Callable[..., None]:
    def stop(_: object, step: int, steps: int) -> None:
        if step == number:
            raise InterruptedRunError(f"interrupted at step {step} of {steps}")

    return stop


def test_a_death_and_ctrl_c(tmp_path: Path) -> None:
    """A run's process is killed: the next one starts. Then Ctrl-C, which a terminal sends to all."""
    command = [sys.executable, "-m", "tangentlab.cli", "train", "digits", *TINY, *SMALL]
    command += ["--training.epochs=4000", "--evaluation.every=100", "--seeds", "0", "1", "2", "--jobs", "2"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def running(seed: int) -> int:
        checkpoint = tmp_path / f"seed-{seed}" / "checkpoints" / "last.safetensors"
        end = time.monotonic() + 60
        while not checkpoint.exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        return json.loads((tmp_path / f"seed-{seed}" / "status.json").read_text())["pid"]

    os.kill(running(0), signal.SIGKILL)
    running(1), running(2)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "seed-0: failed: its process was killed by SIGKILL" in stderr
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("tangentlab: interrupted: 0 of 3 runs finished, 1 failed; go on with: tangentlab")
    assert [read_run(tmp_path / f"seed-{seed}").state for seed in (0, 1, 2)] == [
        "killed",
        "interrupted",
        "interrupted",
    ]
    assert not list(tmp_path.glob(".*"))


def test_who_watches_is_gone(tmp_path: Path) -> None:
    """A child stops when its standard input is closed, and its answer is still whole."""
    code = (
        "import time\nfrom tangentlab.children import answer\n"
        "def work(request):\n"
        "    try:\n        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n        print('noise')\n        return {'state': request['word']}\n"
        "answer(work)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.write(b'{"word": "saved"}\n')
    child.stdin.flush()
    time.sleep(0.5)
    said, _ = child.communicate(timeout=30)  # closes it
    assert json.loads(said) == {"state": "saved"}
    assert child.returncode == 0


def test_what_a_watcher_says_of_children_that_do_not_answer(tmp_path: Path) -> None:
    def watch(code: str, stop: Path = tmp_path / "stop", cwd: Path = tmp_path) -> tuple[str, str]:
        options: dict[str, Any] = {"key": 7, "parent": 0, "path": [], "stop": str(stop), "cwd": str(cwd)}
        key, found = children.watch(code, {}, **options)
        assert key == 7
        return found["state"], found["message"]

    assert watch("raise SystemExit(3)") == ("failed", "its process ended with code 3")
    assert watch("import os; os.abort()") == ("failed", "its process was killed by SIGABRT")
    assert watch('print(\'{"state": "a", "message": "b"}\')') == ("a", "b")
    assert watch("", cwd=tmp_path / "nowhere")[0] == "failed"
    children.request_stop(tmp_path / "below" / "stop")
    assert watch("", stop=tmp_path / "below" / "stop") == ("interrupted", "not started")


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_cluster(tiny_config: Make, tmp_path: Path, backend: str) -> None:
    package = {"dask": "distributed", "ray": "ray"}[backend]
    runs = {tmp_path / f"seed-{seed}": tiny_config(*SMALL, f"--seed={seed}") for seed in (0, 1)}
    if find_spec(package) is None:
        with pytest.raises(ConfigError, match=f"'{backend}' needs {package}, which is missing: pip install"):
            train_many(runs, backend=backend)
        return
    assert states(train_many(runs, jobs=2, backend=backend)) == ["finished", "finished"]


def test_bad_input(tiny_config: Make, tmp_path: Path) -> None:
    runs = {tmp_path / "run": tiny_config()}
    with pytest.raises(ConfigError, match="jobs=0 is out of range; at least 1"):
        train_many(runs, jobs=0)
    with pytest.raises(ConfigError, match="backend 'slurm' is unknown; choose from 'loky', 'dask', 'ray'"):
        train_many(runs, backend="slurm")
    with pytest.raises(ConfigError, match="processes=2 is for a run by itself"):
        train_many({tmp_path / "run": tiny_config("--processes=2")})
    assert train_many({}, jobs=2) == []
    assert not (tmp_path / "run").exists()


def test_a_setting_younger_than_the_folder_has_its_default(tiny_config: Make, tmp_path: Path) -> None:
    config, folder = tiny_config(*SMALL), tmp_path / "run"
    train(config, folder)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    del saved["channels_last"], saved["training"]["ema_decay"], saved["method"]["label_smoothing"]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    assert states(train_many({folder: config})) == ["already finished"]
    train(config, folder, resume=True)
    with pytest.raises(ConfigError, match="was run with channels_last=False, not True"):
        train(tiny_config(*SMALL, "--channels_last=true"), folder, resume=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(saved | {"older": 1}))
    with pytest.raises(ConfigError, match="with another configuration: setting 'older' is unknown"):
        train(config, folder, resume=True)


@pytest.mark.parametrize(
    ("section", "setting"), [("switch", {"every": 0.3, "to": {}}), ("alarm", {"threshold": 0.6, "older": 1})]
)
def test_settings_of_what_is_off_do_not_tell_runs_apart(
    tiny_config: Make, tmp_path: Path, section: str, setting: dict[str, Any]
) -> None:
    config, folder = tiny_config(*SMALL), tmp_path / "run"
    train(config, folder)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved[section] |= setting
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    assert states(train_many({folder: config})) == ["already finished"]
    for words, told in (
        (
            ("--switch.rule=fixed", "--switch.epoch=0.5", "--switch.to=fgsm_rs"),
            "switch.rule='none', not 'fixed'",
        ),
        (("--alarm.every=3",), "alarm.every=None, not 3"),
    ):
        with pytest.raises(ConfigError, match=f"was run with {told}"):
            train(tiny_config(*SMALL, *words), folder, resume=True)


def test_a_run_whose_folder_was_not_completed_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        if path.name == "config.yaml":
            raise KeyboardInterrupt

    monkeypatch.setattr("tangentlab.records.write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Run.create(tmp_path / "run", {"name": "run"})
    assert read_run(tmp_path / "run").state == "killed"
