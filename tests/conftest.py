"""Fixtures shared by the rooms' tests: tiny runs on the embedded data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import authors as authors_module
from tangentlab.runs import RunConfig, load_config
from tiny import TINY


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


@pytest.fixture
def authors() -> ModuleType:
    """Writers of the data sets' layouts."""
    return authors_module
