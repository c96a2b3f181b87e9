"""The examples in the docstrings of metrics print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from inspect import ismodule

import pytest

from tangentlab import metrics


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(metrics.__path__)])
def test_examples(name: str) -> None:
    module = importlib.import_module(f"tangentlab.metrics.{name}")
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0 or name.startswith("_")


def test_everything_public_is_exported() -> None:
    public = {name for name, value in vars(metrics).items() if not (name.startswith("_") or ismodule(value))}
    assert public == set(metrics.__all__)
