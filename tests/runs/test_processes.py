"""Two gloo processes against one: the same curve; BatchNorm normalizes each process's share by itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tangentlab import randomness
from tangentlab.errors import ConfigError
from tangentlab.files import read_tensors
from tangentlab.records import RunRecord, read_run
from tangentlab.runs import load_config, train
from tangentlab.runs.build import build_data, build_model, build_state, learning_rate, method_schedule
from tangentlab.runs.run import _batches
from tangentlab.training import Batch, Network
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


def in_processes(words: list[str], folder: Path, processes: int) -> RunRecord:
    command = [sys.executable, "-m", "tangentlab.cli", "train", "digits", *words]
    done = subprocess.run(
        [*command, "--processes", str(processes), "--out", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: ") == 1  # one of them speaks
    return read_run(folder)


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_the_curve_is_that_of_one_process(method: str, tmp_path: Path) -> None:
    words = words_of(method, *PLAIN, "--training.batch_size", "120")  # a step an epoch
    two = in_processes(words, tmp_path / "two", 2)
    one = train(load_config("digits", words), tmp_path / "one")
    ours, other = two.series("train_loss")[1], one.series("train_loss")[1]
    assert ours[0] == pytest.approx(other[0], rel=1e-6)
    # From the second step on rounding decides the signs of gradients that are nearly zero.
    assert ours[1:] == pytest.approx(other[1:], rel=1e-3)
    assert two.series("cost")[1] == one.series("cost")[1]
    assert len(two.kernel_steps()) == len(one.kernel_steps()) > 1


@pytest.mark.parametrize("method", ["pgd", "trades", "grad_align"])
def test_batchnorm_normalizes_each_share_by_itself(method: str, tmp_path: Path) -> None:
    words = words_of(method, "--model.widths=[4,4]", "--model.strides=[2,2]", "--probe.size", "0")
    in_processes(words, tmp_path / "run", 2)
    saved, _ = read_tensors(tmp_path / "run" / "checkpoints" / "last.safetensors")

    config = load_config("digits", words)
    examples = build_data(config)
    shares = [build_model(config, examples, torch.device("cpu")) for _ in range(2)]
    states = [build_state(config, model) for model in shares]
    batches = [_batches(config, examples, torch.device("cpu"), rank, 2) for rank in range(2)]
    steps = config.training.epochs * batches[0].steps_per_epoch
    for step in range(steps):
        for rank, (model, state) in enumerate(zip(shares, states, strict=True)):
            x, y, index = batches[rank].batch(step)
            draws = randomness.generator(config.seed, "method", step, part=(rank, 2))
            model.train()
            state.optimizer.zero_grad()
            state.optimizer.param_groups[0]["lr"] = learning_rate(config, steps)(step)
            current = method_schedule(config, steps)(step)
            current.loss(Network(model, model), Batch(x, y, index), memory={}, generator=draws).backward()
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
    whole = train(load_config("digits", words), tmp_path / "whole")
    other, _ = read_tensors(whole.folder / "checkpoints" / "last.safetensors")
    assert not torch.allclose(
        saved["model/features.1.running_var"], other["model/features.1.running_var"], rtol=1e-3
    )


def test_an_error_and_an_interruption_are_one_line(tmp_path: Path) -> None:
    words = words_of("standard", *PLAIN, "--probe.size", "0", "--processes", "2", "--out")
    command = [sys.executable, "-m", "tangentlab.cli", "train", "digits", *words]
    done = subprocess.run(
        [*command, str(tmp_path / "far"), "--training.learning_rate", "1e30"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
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


def test_methods_that_remember_are_refused() -> None:
    with pytest.raises(ConfigError, match="method 'free' keeps perturbations from step to step"):
        train(load_config("digits", [*words_of("free"), "--processes", "2"]), "never-made")
    assert not Path("never-made").exists()
