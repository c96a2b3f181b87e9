"""MNIST and Fashion-MNIST in their authors' idx files, gzipped or not.

The format: two zero bytes, a type code (8 is unsigned byte), the number of dimensions, each dimension as a
big-endian 32-bit integer, then the values, last dimension fastest (LeCun, Cortes & Burges, "The MNIST
database of handwritten digits"; Xiao, Rasul & Vollgraf, arXiv:1708.07747).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tangentlab.data.dataset import Dataset, Split, check_labels
from tangentlab.data.layout import Layout
from tangentlab.errors import DataError

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_UNSIGNED_BYTE = 8
_CHUNK = 1 << 20


def _layout(folder: str, foreign: str) -> Layout:
    return Layout(
        folders=(folder, f"{folder}/raw", ".", "raw"), suffixes=("", ".gz"), foreign=(foreign,), **_FILES
    )


LAYOUTS = {
    "mnist": _layout("MNIST", foreign="FashionMNIST"),
    "fashion-mnist": _layout("FashionMNIST", foreign="MNIST"),
}
CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}


def read_mnist(name: str, folder: Path) -> Dataset:
    """The data set ``name`` ("mnist" or "fashion-mnist") from its four files in ``folder``.

    Raises:
        DataError: a file is missing or damaged, counts differ, or a label is outside 0..9.
    """
    layout, classes = LAYOUTS[name], CLASSES[name]
    return Dataset(
        name,
        _read_split(layout, folder, layout.train, len(classes)),
        _read_split(layout, folder, layout.test, len(classes)),
        classes,
    )


def read_idx(path: Path, ndim: int) -> Tensor:
    """The unsigned bytes of one idx file (``.gz`` or plain) as uint8 with ``ndim`` dimensions.

    Raises:
        DataError: wrong magic number or number of dimensions, too few or too many bytes, damaged gzip.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse(path, file, ndim)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(path: Path, file: BinaryIO | gzip.GzipFile, ndim: int) -> Tensor:
    magic = file.read(4)
    expected = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    if magic != expected:
        raise DataError(
            f"{path} starts with {magic.hex() or 'nothing'}; an idx file starts with {expected.hex()}"
        )
    header = file.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise DataError(f"{path} is truncated within its header")
    shape = struct.unpack(f">{ndim}I", header)
    size = math.prod(shape)
    if size == 0:
        raise DataError(f"{path} is empty: its header gives the shape {list(shape)}")
    # In chunks, one byte past the end: a wrong header must not allocate what it claims.
    values = bytearray()
    while len(values) <= size and (chunk := file.read(min(_CHUNK, size + 1 - len(values)))):
        values += chunk
    if len(values) != size:
        found = f"only {len(values)}" if len(values) < size else "more"
        raise DataError(f"{path} holds {found} values; its header {list(shape)} gives {size}")
    return torch.frombuffer(values, dtype=torch.uint8).reshape(shape)


def _read_split(layout: Layout, folder: Path, files: tuple[str, ...], num_classes: int) -> Split:
    paths = [layout.path(folder, file) for file in files]
    images_path, labels_path = (path or folder / file for path, file in zip(paths, files, strict=True))
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1).long()
    if len(images) != len(labels):
        raise DataError(f"{images_path} holds {len(images)} images but {labels_path} {len(labels)} labels")
    check_labels(labels.tolist(), num_classes, labels_path)
    return Split(images.unsqueeze(1), labels, 255)
