"""CIFAR-10 and CIFAR-100 in their authors' Python and binary layouts.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). An image is 3072 bytes:
red, green and blue planes of 32×32, row by row. CIFAR-100 is labelled by its 100 fine classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tangentlab.data.dataset import Dataset, Split, check_labels
from tangentlab.data.inert import as_array, read_pickle
from tangentlab.data.layout import Layout
from tangentlab.errors import DataError

_PIXELS = 3 * 32 * 32
_CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))


@dataclass(frozen=True)
class Format:
    """A layout and how to read it.

    ``labels`` is the dictionary key of a pickle, or the number of label bytes of a binary record (the last
    of them is ours); ``names`` is the file of class names and the key in it (None for plain text).
    """

    layout: Layout
    labels: str | int
    names: tuple[str, str | None]
    num_classes: int


def _format(
    folder: str,
    train: tuple[str, ...],
    test: str,
    labels: str | int,
    names: tuple[str, str | None],
    classes: int,
) -> Format:
    return Format(Layout((folder, "."), train, (test,)), labels, names, classes)


# The Python layout first: it is preferred where both are there.
FORMATS = {
    "cifar10": (
        _format("cifar-10-batches-py", _BATCHES, "test_batch", "labels", ("batches.meta", "label_names"), 10),
        _format(
            "cifar-10-batches-bin",
            tuple(f"{batch}.bin" for batch in _BATCHES),
            "test_batch.bin",
            1,
            ("batches.meta.txt", None),
            10,
        ),
    ),
    "cifar100": (
        _format("cifar-100-python", ("train",), "test", "fine_labels", ("meta", "fine_label_names"), 100),
        _format("cifar-100-binary", ("train.bin",), "test.bin", 2, ("fine_label_names.txt", None), 100),
    ),
}


def read_cifar(name: str, format: Format, folder: Path) -> Dataset:
    """The data set ``name`` ("cifar10" or "cifar100") in ``folder``, in one of its ``FORMATS``.

    Raises:
        DataError: a file is missing or damaged, asks for code, or holds labels out of range.
    """
    layout = format.layout
    return Dataset(
        name,
        _read_split(format, [folder / file for file in layout.train]),
        _read_split(format, [folder / file for file in layout.test]),
        _classes(format, folder),
    )


def _read_split(format: Format, paths: list[Path]) -> Split:
    rows, labels = [], []
    for path in paths:
        if isinstance(format.labels, str):
            batch_rows, batch_labels = _read_python(path, format.labels, format.num_classes)
        else:
            batch_rows, batch_labels = _read_binary(path, format.labels, format.num_classes)
        rows.append(batch_rows)
        labels.append(batch_labels)
    # concatenate copies, so the tensor owns its memory
    return Split(torch.from_numpy(np.concatenate(rows)).reshape(-1, 3, 32, 32), torch.cat(labels), 255)


def _read_python(path: Path, key: str, num_classes: int) -> tuple[NDArray[np.uint8], Tensor]:
    batch = read_pickle(path)
    if absent := [entry for entry in ("data", key) if entry not in batch]:
        found = ", ".join(map(repr, sorted(batch))) or "nothing"
        raise DataError(f"{path} lacks the entry {' and '.join(map(repr, absent))}; it holds {found}")
    rows, labels = as_array(batch["data"], path), batch[key]
    if rows.ndim != 2 or rows.shape[1] != _PIXELS or not len(rows):
        raise DataError(f"{path} holds data of shape {list(rows.shape)}; expected [n, {_PIXELS}]")
    if not isinstance(labels, list):
        raise DataError(f"{path} holds {key} as a {type(labels).__name__}; expected a list")
    check_labels(labels, num_classes, path)
    if len(rows) != len(labels):
        raise DataError(f"{path} holds {len(rows)} images but {len(labels)} labels")
    return rows, torch.tensor(labels, dtype=torch.int64)


def _read_binary(path: Path, label_bytes: int, num_classes: int) -> tuple[NDArray[np.uint8], Tensor]:
    content, record = _read_bytes(path), label_bytes + _PIXELS
    if not content or len(content) % record:
        raise DataError(f"{path} has {len(content)} bytes; expected a positive multiple of {record}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    labels = records[:, label_bytes - 1].tolist()
    check_labels(labels, num_classes, path)
    return records[:, label_bytes:], torch.tensor(labels, dtype=torch.int64)


def _classes(format: Format, folder: Path) -> tuple[str, ...]:
    file, key = format.names
    path = folder / file
    if not path.is_file():
        return _CIFAR10_CLASSES if format.num_classes == 10 else tuple(map(str, range(format.num_classes)))
    if key is None:
        names = _read_bytes(path).decode("utf-8", "replace").split()
    else:
        entry = read_pickle(path).get(key)
        names = [
            name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
            for name in (entry if isinstance(entry, list) else [])
        ]
    if len(names) != format.num_classes:
        raise DataError(f"{path} names {len(names)} classes; expected {format.num_classes}")
    return tuple(names)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
