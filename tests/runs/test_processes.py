"""Two gloo processes against one: the same curve; BatchNorm normalizes each process's share by itself.

Most runs are made by one pair of processes, one after another.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor

from tangentlab import randomness
from tangentlab.cli import main
from tangentlab.files import read_tensors
from tangentlab.records import RunRecord, read_run
from tangentlab.runs import load_config, train
from tangentlab.runs.build import (
    build_batches,
    build_data,
    build_model,
    build_state,
    learning_rate,
    method_schedule,
    training_batch,
)
from tangentlab.runs.parsing import build_method
from tangentlab.runs.processes import launch
from tangentlab.training import Network, Share
from tiny import TINY

PLAIN = ["--model", "mlp", "--model.widths", "[24]", "--model.batchnorm", "false"]


def words_of(method: str, *more: str) -> list[str]:
    tiny = [word for word in TINY if not word.startswith(("--model", "--method"))]
    return [
        *tiny,
        "--method",
        method,
        "--training.epochs",
        "2",
        "--data.crop",
        "1",
        "--data.flip",
        "true",
        *more,
    ]


def two(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TRAIN = ["-m", "tangentlab.cli", "train", "digits"]
CURVES = ["pgd", "trades", "free", "fgsm_pgi", "atta", "lazy", "spectral"]
STORING = ["free", "fgsm_pgi", "atta"]
KEEPING = [*STORING, "lazy"]
SHARES = ["pgd", "trades", "grad_align", "update_align", *STORING]


def settings(method: str) -> list[str]:
    own = {
        "free": ["--method.replays=2"],
        # From PGD to a step from what it kept, at the second look; the first process says so to the other.
        "lazy": [f"--switch.{word}" for word in ("every=1", "threshold=1.5", "resume=2", "patience=1")],
        # Raised at the third look; likewise.
        "spectral": [f"--alarm.{word}" for word in ("every=1", "threshold=0.999")],
    }
    return own.get(method, [])


def curve_words(method: str) -> list[str]:
    return words_of(method, *PLAIN, "--training.batch_size", "120", *settings(method))  # a batch an epoch


def share_words(method: str) -> list[str]:
    small = ["--model.widths=[4,4]", "--model.strides=[2,2]", "--probe.size", "0"]
    return words_of(method, *small, *settings(method))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes: curve-METHOD, share-METHOD, and resumed-METHOD, stopped in the second epoch;
    full, which cannot be saved."""
    folder = tmp_path_factory.mktemp("pair")
    runs: list[dict[str, object]] = [
        {"words": curve_words(method), "out": f"curve-{method}"} for method in CURVES
    ]
    runs += [{"words": share_words(method), "out": f"share-{method}"} for method in SHARES]
    for method in STORING:
        steps = 6 if method == "free" else 3  # an epoch
        resumed = {"words": share_words(method), "out": f"resumed-{method}"}
        runs += [{**resumed, "end": steps + 1}, {**resumed, "resume": True}]
    runs += [{"words": curve_words("atta"), "out": "full", "full": True}]
    for run in runs:
        run |= {"words": [*run["words"], "--processes", "2"], "out": str(folder / run["out"])}
    (folder / "runs.json").write_text(json.dumps(runs))
    done = two([*TORCHRUN, str(Path(__file__).with_name("several.py")), str(folder / "runs.json")])
    assert done.returncode == 0, done.stderr
    return folder


def last(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / "checkpoints" / "last.safetensors")[0]


def assert_same_curve(two: RunRecord, one: RunRecord) -> None:
    ours, other = two.series("train_loss")[1], one.series("train_loss")[1]
    # From the second step on rounding decides the signs of gradients that are nearly zero.
    assert ours[0] == pytest.approx(other[0], rel=1e-4)
    assert ours[1:] == pytest.approx(other[1:], rel=1e-3)
    assert two.series("cost")[1] == one.series("cost")[1]
    assert len(two.kernel_steps()) == len(one.kernel_steps()) > 1


@pytest.mark.parametrize("method", CURVES)
def test_the_curve_is_that_of_one_process(method: str, pair: Path, tmp_path: Path) -> None:
    one = train(load_config("digits", curve_words(method)), tmp_path / "one")
    assert_same_curve(read_run(pair / f"curve-{method}"), one)
    kept, expected = (
        {name: t for name, t in last(folder).items() if name.startswith("memory/")}
        for folder in (pair / f"curve-{method}", one.folder)
    )
    assert bool(expected) == (method in KEEPING)
    assert kept.keys() == expected.keys()
    for name, value in expected.items():
        assert kept[name].shape == value.shape
        far = (kept[name] - value).abs() > 1e-3 * value.abs().max()
        assert far.float().mean() < 0.01, name


@pytest.mark.parametrize("method", STORING)
def test_two_processes_resume_what_they_stored(method: str, pair: Path) -> None:
    whole, resumed = last(pair / f"share-{method}"), last(pair / f"resumed-{method}")
    lines = (pair / f"resumed-{method}" / "metrics.jsonl").read_text()
    assert len(read_run(pair / f"resumed-{method}").series("train_loss")[1]) == 2, lines
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_full_disk_of_the_first_process_ends_the_others(pair: Path) -> None:
    first, second = ((pair / f"full-{rank}.txt").read_text() for rank in range(2))
    assert re.fullmatch("StorageError: cannot write .*: File too large", first)
    assert re.fullmatch(r"OtherProcessError: another process is lost at step \d", second)
    assert not list(pair.glob("[!rf]*.txt"))  # no other failed


class Exchange:
    """What two threads gather from one another."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = [torch.empty(0)] * 2
        self.barrier = threading.Barrier(2, timeout=60)

    def share(self, rank: int) -> Share:
        def gather(rows: Tensor) -> Tensor:
            self.rows[rank] = rows
            self.barrier.wait()
            whole = torch.cat(self.rows)
            self.barrier.wait()
            return whole

        return Share(rank, 2, gather)


@pytest.mark.parametrize("method", SHARES)
def test_batchnorm_normalizes_each_share_by_itself(method: str, pair: Path, tmp_path: Path) -> None:
    saved = last(pair / f"share-{method}")
    config = load_config("digits", share_words(method))
    examples = build_data(config)
    shares = [build_model(config, examples, torch.device("cpu")) for _ in range(2)]
    states = [build_state(config, model) for model in shares]
    exchange = Exchange()
    parts = [exchange.share(rank) for rank in range(2)]
    batches = [build_batches(config, examples, torch.device("cpu"), part) for part in parts]
    replays = build_method(config).replays
    steps = config.training.epochs * batches[0].steps_per_epoch * replays

    def differentiate(rank: int, step: int) -> None:
        model, state = shares[rank], states[rank]
        drawn = training_batch(batches[rank], step // replays, len(examples.train), parts[rank])
        draws = randomness.generator(config.seed, "method", step, part=(rank, 2))
        model.train()
        state.optimizer.zero_grad()
        state.optimizer.param_groups[0]["lr"] = learning_rate(config, steps)(step)
        current = method_schedule(config, steps)(step)
        current.loss(Network(model, model), drawn, memory=state.memory, generator=draws).backward()
        state.memory.exchange()

    for step in range(steps):
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(differentiate, range(2), [step, step]))
        with torch.no_grad():
            for pair in zip(*(model.parameters() for model in shares), strict=True):
                mean = torch.stack([p.grad for p in pair]).mean(0)
                for p in pair:
                    p.grad.copy_(mean)
            for state in states:
                state.optimizer.step()
            for pair in zip(*(model.buffers() for model in shares), strict=True):
                if pair[0].is_floating_point():
                    mean = torch.stack(pair).mean(0)
                    for buffer in pair:
                        buffer.copy_(mean)
    for name, value in shares[0].state_dict().items():
        assert torch.allclose(saved[f"model/{name}"], value, rtol=1e-3, atol=1e-5), name
    # One batch of both shares would be another network.
    other = last(train(config, tmp_path / "whole").folder)
    assert not torch.allclose(
        saved["model/features.1.running_var"], other["model/features.1.running_var"], rtol=1e-3
    )


def srun(rank: int) -> dict[str, str]:
    """The variables of task ``rank`` of ``srun -n 2``, SLURM 22.05, as far as anybody looks at them."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "python",
        "SLURM_LOCALID": str(rank),
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "vm",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "vm",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_TASKS_PER_NODE": "2",
    }


def run_as(launcher: str, words: list[str]) -> tuple[list[int], str, str]:
    """The exit codes, stdout and stderr of the command started by a launcher; srun is played."""
    if launcher == "torchrun":
        done = two([*TORCHRUN, *TRAIN, *words])
    elif launcher == "tangentlab":
        done = two([sys.executable, *TRAIN, *words])
    else:
        with ThreadPoolExecutor(2) as threads:
            port = {"MASTER_PORT": str(find_free_network_port())}
            tasks = list(
                threads.map(
                    lambda rank: two([sys.executable, *TRAIN, *words], **srun(rank), **port), range(2)
                )
            )
        return (
            [t.returncode for t in tasks],
            "".join(t.stdout for t in tasks),
            "".join(t.stderr for t in tasks),
        )
    return [done.returncode], done.stdout, done.stderr


@pytest.mark.parametrize("launcher", ["tangentlab", "torchrun", "srun"])
def test_each_launcher_starts_the_same_command(launcher: str, pair: Path, tmp_path: Path) -> None:
    words = [*curve_words("pgd"), "--processes", "2", "--out", str(tmp_path / "run")]
    codes, stdout, stderr = run_as(launcher, words)
    assert set(codes) == {0}, stderr
    assert stdout.count("Report: ") == 1  # one of them speaks
    ours, other = last(tmp_path / "run"), last(pair / "curve-pgd")
    for name, value in other.items():
        assert torch.equal(ours[name], value), name


def test_errors_before_the_processes_meet_are_one_line(pair: Path) -> None:
    words = [*curve_words("pgd"), "--out"]
    # The folder exists: the second process is told, and does not wait for the first.
    codes, _, stderr = run_as("srun", [*words, str(pair / "curve-pgd"), "--processes", "2"])
    assert codes == [2, 0], stderr
    assert len(re.findall("curve-pgd", stderr)) == 1, stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_another_number_of_processes_is_one_line(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in srun(rank).items():
        monkeypatch.setenv(name, value)
    words = ["train", "digits", *curve_words("pgd"), "--out", str(tmp_path / "run")]
    assert main([*words, "--processes", "3"]) == 2
    line = "tangentlab: processes=3, but srun started 2; give --processes 2\n"
    assert capsys.readouterr().err == ("" if rank else line)
    assert not (tmp_path / "run").exists()


def test_who_started_the_processes() -> None:
    elastic = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for environment, by, rank, size, nodes, alone in [
        ({}, "tangentlab", 0, None, 1, True),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0"}, "tangentlab", 1, None, 1, False),
        (elastic, "torchrun", 3, 4, 2, False),
        (srun(1) | elastic, "torchrun", 3, 4, 2, False),
        (srun(1), "srun", 1, 2, 1, False),
        # A batch script, and an interactive shell
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "tangentlab", 0, None, 1, True),
        (srun(0) | {"SLURM_STEP_NUM_TASKS": "1"}, "tangentlab", 0, None, 1, True),
    ]:
        found = launch(environment)
        assert (found.by, found.rank, found.world_size, found.nodes, found.alone) == (
            by,
            rank,
            size,
            nodes,
            alone,
        )


def test_an_error_and_an_interruption_are_one_line(tmp_path: Path) -> None:
    words = words_of("standard", *PLAIN, "--probe.size", "0", "--processes", "2", "--out")
    command = [sys.executable, "-m", "tangentlab.cli", "train", "digits", *words]
    done = subprocess.run(
        [*command, str(tmp_path / "far"), "--training.learning_rate", "1e30"],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 2
    assert len(re.findall("training stops", done.stderr)) == 1, done.stderr
    assert "Traceback" not in done.stderr

    folder = tmp_path / "long"
    process = subprocess.Popen(
        [*command, str(folder), "--training.epochs", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and "train_loss" in metrics.read_text()):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stderr.count("interrupted at step") == 1, stderr
    assert "Traceback" not in stderr
    assert read_run(folder).state == "interrupted"
