"""Clean and robust accuracy of a network, and of a run's best and last checkpoints on the test set."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tangentlab import metrics, modes, randomness
from tangentlab.attacks import FGSM, Attack
from tangentlab.data import Split
from tangentlab.errors import CheckpointError
from tangentlab.records import Run, read_run
from tangentlab.runs.build import Examples, build_attack, build_data, build_model, resolve_device
from tangentlab.runs.config import RunConfig
from tangentlab.runs.parsing import resolve
from tangentlab.training import load_weights

CHECKPOINTS = ("best", "last")
BATCH = 500


def count_correct(
    model: nn.Module, split: Split, attack: Attack | None, *, seed: int, device: torch.device
) -> int:
    """How many examples of the split the model classifies correctly after the attack.

    Evaluation mode, fp32, the model's state untouched; the attack's noise is a function of (seed, batch), so
    two evaluations of one network agree.
    """
    correct = 0
    with modes.evaluation(model), torch.no_grad():
        for number, start in enumerate(range(0, len(split), BATCH)):
            part = slice(start, start + BATCH)
            x, y = split.x(part, device), split.labels[part].to(device)
            if attack is not None:
                x = attack(
                    model, x, y, generator=randomness.generator(seed, "evaluation", number, device=device)
                )
            correct += int((model(x).argmax(dim=1) == y).sum())
    return correct


def evaluate(
    run: str | Path,
    *,
    num_steps: int | None = None,
    num_restarts: int | None = None,
    test_size: int | None = None,
    device: str = "auto",
    allow_import: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Evaluate a run's best and last checkpoints on the test set; appends to its evaluations.jsonl.

    Clean, FGSM and PGD accuracy, each with n and its 95 % Wilson interval. Settings that are None are the
    run's own (``evaluation.test_num_steps`` and so on).

    Raises:
        RunFolderError, CheckpointError, DataError: there is nothing to evaluate, or not with what.
    """
    folder = Path(run)
    record = read_run(folder)
    config = resolve(record.config, allow_import=allow_import)
    if not any(checkpoint_path(folder, name).exists() for name in CHECKPOINTS):
        raise CheckpointError(f"{folder} has no checkpoint yet; train it first")
    examples = build_data(config)
    place = resolve_device(device)
    model = build_model(config, examples, place, allow_import=allow_import)
    with Run.open(folder) as writer:
        return evaluate_checkpoints(
            writer,
            config,
            examples,
            model,
            num_steps=num_steps or config.evaluation.test_num_steps,
            num_restarts=num_restarts or config.evaluation.test_num_restarts,
            test_size=test_size or config.evaluation.test_size,
        )


def evaluate_checkpoints(
    run: Run,
    config: RunConfig,
    examples: Examples,
    model: nn.Module,
    *,
    num_steps: int,
    num_restarts: int,
    test_size: int | None,
) -> list[dict[str, Any]]:
    """The lines that :func:`evaluate` writes; ``model`` is overwritten by each checkpoint's weights."""
    split = examples.test.select(torch.arange(min(test_size or len(examples.test), len(examples.test))))
    device = next(model.parameters()).device
    attacks: dict[str, Attack | None] = {
        "none": None,
        "fgsm": FGSM(config.eps),
        "pgd": build_attack(config, num_steps=num_steps, num_restarts=num_restarts),
    }
    lines = []
    for checkpoint in CHECKPOINTS:
        path = checkpoint_path(run.folder, checkpoint)
        if not path.exists():
            continue
        saved = load_weights(path, model)
        for name, attack in attacks.items():
            started = time.perf_counter()
            correct = count_correct(model, split, attack, seed=config.seed, device=device)
            lines.append(
                {
                    "checkpoint": checkpoint,
                    "step": saved["step"],
                    "epoch": saved["extra"].get("epoch"),
                    "split": "test",
                    "attack": name,
                    "settings": asdict(attack) if attack is not None else {},  # type: ignore[call-overload]
                    "n": len(split),
                    "correct": correct,
                    "accuracy": correct / len(split),
                    "interval": list(metrics.wilson_interval(correct, len(split))),
                    "seconds": time.perf_counter() - started,
                }
            )
    run.write_evaluations(lines)
    return lines


def checkpoint_path(folder: Path, name: str) -> Path:
    """Where the checkpoint called "best" or "last" lies."""
    return folder / "checkpoints" / f"{name}.safetensors"
