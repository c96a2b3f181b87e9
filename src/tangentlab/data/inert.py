"""Pickles of NumPy arrays, read without running anything that they ask for.

A pickle is a program: each global that it names is looked up and called. Here every lookup gives an inert
stand-in that records its arguments, and the few names that a pickled uint8 array needs are the only ones
let through. The array is built afterwards, by our code, from the recorded shape and bytes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tangentlab.errors import DataError

# What pickles of byte strings and arrays name: NumPy 1 and 2, and Python 3's protocol 2, which has no bytes.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}
# Extension codes fetch an object from a table of the process, past find_class.
_EXTENSIONS = {"EXT1", "EXT2", "EXT4"}


class _Call:
    """A call that the pickle asked for: name, arguments, and the state set on its result."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args = name, args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Global(NamedTuple):
    """A global that the pickle named. A tuple, not a class: the pickle can neither change nor subclass it."""

    name: str

    def __call__(self, *args: Any) -> _Call | bytes:
        match self.name, args:
            # Python 3 writes bytes as this into a protocol 2 pickle; it is the one thing done at once
            case "encode", (str(text), *_):
                return text.encode("latin1")
        return _Call(self.name, args)


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"{self._path} asks for {module}.{name}, which no data needs; it was not run")
        return _Global(name)

    def persistent_load(self, pid: Any) -> Any:
        raise DataError(f"{self._path} refers to the outside object {pid!r}; it was not read")


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary pickled in ``path``, its keys as str; byte strings of Python 2 stay bytes.

    An array comes as a record, for :func:`as_array`.

    Raises:
        DataError: unreadable or truncated file, no dictionary, a global or a persistent id that no data
            file needs.
    """
    try:
        content = path.read_bytes()
        for opcode, _, _ in pickletools.genops(content):
            if opcode.name in _EXTENSIONS:
                raise DataError(f"{path} uses an extension code, which no data needs; it was not run")
        value = _InertUnpickler(io.BytesIO(content), path).load()
    except DataError:
        raise
    # A damaged pickle can raise nearly any exception, as the library's documentation warns.
    except Exception as error:
        raise DataError(f"{path} is not a readable pickle: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; expected a dictionary")
    return {_text(key): entry for key, entry in value.items()}


def as_array(value: Any, path: Path) -> NDArray[np.uint8]:
    """The uint8 array that a record of :func:`read_pickle` describes (read-only, any shape).

    Raises:
        DataError: the record is no uint8 array, or its bytes do not fill its shape.
    """
    try:
        match value:
            case _Call(name="_reconstruct", args=(_Global(name="ndarray"), *_)):
                _, shape, dtype, fortran, content = value.state
                order = "F" if fortran else "C"
            case _Call(name="_frombuffer"):
                content, dtype, shape, order = value.args
            case _:
                raise TypeError(f"a {type(value).__name__} stands where an array should be")
        kind = _text(dtype.args[0])
        if dtype.name != "dtype" or kind not in ("u1", "|u1"):
            raise TypeError(f"its values are {kind!r}, expected 'u1'")
        if not isinstance(content, bytes | bytearray):
            raise TypeError(f"a {type(content).__name__} stands where its bytes should be")
        if len(content) != math.prod(shape):
            raise ValueError(f"{len(content)} bytes do not fill the shape {list(shape)}")
        return np.frombuffer(content, dtype=np.uint8).reshape(
            shape, order="F" if _text(order) == "F" else "C"
        )
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise DataError(f"{path} holds a damaged array: {error}") from error


def _text(value: Any) -> str:
    """Names are bytes in pickles of Python 2 and str in those of Python 3."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
