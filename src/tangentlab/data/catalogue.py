"""Data sets by name, read from their authors' files and downloaded where they are missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tangentlab.data.cifar import FORMATS, read_cifar
from tangentlab.data.dataset import Dataset
from tangentlab.data.digits import load_digits
from tangentlab.data.download import fetch
from tangentlab.data.idx import LAYOUTS, read_mnist
from tangentlab.data.layout import Layout
from tangentlab.data.sources import SOURCES
from tangentlab.data.tabular import load_breast_cancer
from tangentlab.errors import ConfigError, DataError, unknown_choice

# Those that scikit-learn brings along, and those in files.
_EMBEDDED = {"digits": load_digits, "breast-cancer": load_breast_cancer}
DATASETS = (*_EMBEDDED, "mnist", "fashion-mnist", "cifar10", "cifar100")


def load(name: str, root: str | os.PathLike[str] | None = None, *, download: bool = True) -> Dataset:
    """The data set ``name``, one of ``DATASETS``.

    Args:
        root: folder of data sets; by default ``tangentlab/data`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
            The files are found in the authors' or torchvision's folders below it, or in ``root`` itself.
        download: fetch files that are missing.

    Raises:
        ConfigError: the name is unknown.
        DataError: files are missing and cannot be fetched (the text says which to put where), or damaged.

    >>> load("digits").input_shape
    (1, 8, 8)
    """
    if name not in DATASETS:
        raise ConfigError(unknown_choice("data set", name, DATASETS))
    if name in _EMBEDDED:
        return _EMBEDDED[name]()
    folder = default_root() if root is None else Path(root).expanduser()
    advice = f"{name}: {_formats(name)[0][0].advice(folder)}"
    found = _find(name, folder)
    if found is None and download:
        fetch(SOURCES[name], folder, advice=advice)
        found = _find(name, folder)
    if found is None:
        raise DataError(f"files are missing; {advice}")
    return found


def default_root() -> Path:
    """Where the data sets are unless said otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "tangentlab" / "data"


def _formats(name: str) -> list[tuple[Layout, Callable[[Path], Dataset]]]:
    """The layouts of a data set with their readers, the preferred one first."""
    if name in LAYOUTS:
        return [(LAYOUTS[name], partial(read_mnist, name))]
    return [(format.layout, partial(read_cifar, name, format)) for format in FORMATS[name]]


def _find(name: str, root: Path) -> Dataset | None:
    for layout, read in _formats(name):
        if folder := layout.locate(root):
            return read(folder)
    return None
