import subprocess
import sys

import pytest

from tangentlab.data import DATASETS, load
from tangentlab.errors import ConfigError


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ConfigError, match="data set 'cifar' is unknown; did you mean 'cifar10'"):
        load("cifar")
    assert DATASETS == ("digits", "breast-cancer", "mnist", "fashion-mnist", "cifar10", "cifar100")


def test_the_default_root_is_the_users_cache(tmp_path, authors, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    authors.write_idx(tmp_path / "tangentlab" / "data" / "MNIST")
    assert len(load("mnist", download=False).train) == 30
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    authors.write_idx(tmp_path / "home" / ".cache" / "tangentlab" / "data", train=31)
    assert len(load("mnist", download=False).train) == 31
    authors.write_idx(tmp_path / "home" / "mine", train=32)
    assert len(load("mnist", "~/mine", download=False).train) == 32


def test_the_import_is_light():
    code = "import sys, tangentlab.data; print([m for m in ('sklearn', 'torchvision') if m in sys.modules])"
    path = ":".join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert done.stdout == "[]\n"
