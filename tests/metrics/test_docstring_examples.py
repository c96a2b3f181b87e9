"""Every module of metrics shows examples; that they print what they say, a test of all modules checks."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from inspect import ismodule

import pytest

from tangentlab import metrics


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(metrics.__path__)])
def test_examples_are_there(name: str) -> None:
    found = doctest.DocTestFinder().find(importlib.import_module(f"tangentlab.metrics.{name}"))
    assert any(test.examples for test in found) or name.startswith("_")


def test_everything_public_is_exported() -> None:
    public = {name for name, value in vars(metrics).items() if not (name.startswith("_") or ismodule(value))}
    assert public == set(metrics.__all__)
