"""Fixtures shared by the rooms' tests: tiny runs on the embedded data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tangentlab.runs import RunConfig, load_config

TINY = [
    "--data.train_size=120",
    "--data.validation_size=60",
    "--training.epochs=3",
    "--training.batch_size=40",
    "--model.widths=[4,4]",
    "--model.strides=[2,2]",
    "--method.num_steps=2",
    "--evaluation.num_steps=2",
    "--evaluation.test_num_steps=2",
    "--evaluation.test_size=50",
    "--probe.size=20",
    "--probe.num_steps=2",
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests run beside each other: more threads than cores would only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_config() -> Callable[..., RunConfig]:
    """A PGD run on digits that takes about a second; keyword words override settings."""

    def make(*overrides: str) -> RunConfig:
        return load_config("digits", [*TINY, *overrides])

    return make


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
