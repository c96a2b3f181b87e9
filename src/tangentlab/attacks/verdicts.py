"""Verdicts on points under attack, in a file that says them and that a killed evaluation goes on from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab import __version__, files
from tangentlab.errors import CheckpointError

CLEAN = "clean"  # what broke a point that is misclassified without an attack


@dataclass
class Verdicts:
    """What an evaluation knows so far.

    Args:
        broken_by: for each point None (still classified correctly), "clean" or an attack's name.
        done: finished batches of each attack.
        seconds: wall time, summed over the parts of an evaluation that was interrupted.
        signs: what was measured before the attacks.
        finished: no attack is left.
    """

    broken_by: list[str | None]
    done: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    signs: dict[str, float] = field(default_factory=dict)
    finished: bool = False


class VerdictFile:
    """The file of one evaluation, which its ``marks`` tell from others; with no path nothing is kept.

    The clock of ``Verdicts.seconds`` starts here and is read at each write.
    """

    def __init__(self, path: Path | None, marks: Mapping[str, Any]) -> None:
        self._path, self._marks = path, marks
        self._since = time.perf_counter()

    def write(self, verdicts: Verdicts) -> None:
        """Replace the file atomically."""
        now = time.perf_counter()
        verdicts.seconds += now - self._since
        self._since = now
        if self._path is not None:
            kept = {"evaluation": self._marks, **asdict(verdicts)}
            files.write_atomic(self._path, json.dumps(kept).encode())

    def read(self) -> Verdicts | None:
        """What was kept, None if nothing was; raises CheckpointError for another evaluation's file."""
        if self._path is None or not self._path.exists():
            return None
        try:
            kept = json.loads(self._path.read_bytes())
            theirs = dict(kept.pop("evaluation"))
            verdicts = Verdicts(**kept)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"resume={self._path} cannot be read: {type(error).__name__}: {error}"
            ) from error
        differing = [name for name, value in self._marks.items() if theirs.get(name) != value]
        if differing:
            raise CheckpointError(
                f"resume={self._path} belongs to another evaluation: {', '.join(differing)} differ; "
                "choose another file"
            )
        return verdicts


def evaluation_marks(
    settings: Mapping[str, Any], model: nn.Module, x: Tensor, y: Tensor, *, seed: int, batch_size: int
) -> dict[str, Any]:
    """What an evaluation's result depends on, JSON-able; tensors by their SHA-256."""
    return {
        "version": __version__,
        "settings": dict(settings),
        "batch_size": batch_size,
        "seed": seed,
        "inputs": _digest({"x": x}),
        "labels": _digest({"y": y}),
        "model": weights_digest(model),
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the model's parameters and buffers."""
    return _digest(model.state_dict())


def _digest(tensors: Mapping[str, Any]) -> str:
    digest: Any = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return str(digest.hexdigest())
