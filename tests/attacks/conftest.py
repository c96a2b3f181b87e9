"""The trained network and the authors' masks, loaded once."""

from __future__ import annotations

import pytest
from autoattack_reference import Reference


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference.load()
