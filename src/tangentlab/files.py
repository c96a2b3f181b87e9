"""Files that are whole or not there: written beside their name, flushed to the disk, renamed.

Weights and kernels are safetensors with JSON metadata; nothing read here can execute code.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from tangentlab.errors import CheckpointError, StorageError


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` under ``path`` so that a reader sees the old file or the new one, never a part.

    Raises:
        StorageError: the disk refused; the old file, if any, is untouched.
    """
    # One name a process: reports may be written by several at once.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise refused(path, error) from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Named tensors and JSON-able ``metadata`` as one safetensors file, atomically."""
    # Tied parameters are one storage under two names, which safetensors refuses: each gets its own copy.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(plain, {"tangentlab": json.dumps(finite(metadata))}))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote.

    Raises:
        CheckpointError: missing, truncated, or not written by this package.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["tangentlab"])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Indented JSON for a small file."""
    return (json.dumps(finite(value), indent=2) + "\n").encode()


def refused(path: Path, error: OSError) -> StorageError:
    """What the system said when it refused a write, as one line."""
    return StorageError(f"cannot write {path}: {error.strerror or error}")


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose name begins with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
