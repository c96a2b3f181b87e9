"""The examples in the docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import tangentlab


@pytest.mark.parametrize(
    "name", [module.name for module in pkgutil.walk_packages(tangentlab.__path__, "tangentlab.")]
)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
