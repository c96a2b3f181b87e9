"""Run folders: what is written, in which order, so that a kill at any moment leaves a readable run.

Studies' folders are read here too; they are written by their own room.

Whole files (configuration, status, weights, kernels) are replaced atomically; ``metrics.jsonl`` only grows, a
line a write, and a line that the disk refused is taken back. One process writes into a folder at a time.
Nothing read here can execute code: JSON, YAML and safetensors.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import filelock
import torch
import yaml

from tangentlab.errors import RunFolderError
from tangentlab.files import finite, json_bytes, read_tensors, refused, write_atomic, write_tensors

SCHEMA = 1


@dataclass(frozen=True)
class Measurement:
    """What a probe saw at one step: JSON-able named values, and the kernels they were taken from.

    Args:
        step: optimizer updates so far.
        values: name -> number, list or None.
        kernels: name ("inputs/kind") -> tensor, written as safetensors.
    """

    step: int
    values: Mapping[str, Any]
    kernels: Mapping[str, torch.Tensor] = field(default_factory=dict)


# --- writing ---------------------------------------------------------------------------------------------


class Run:
    """A run folder open for writing by this process alone.

    Make one with :meth:`create` or :meth:`open`; use it as a context manager or call :meth:`close`.

    >>> run = Run.create("runs/mine")  # doctest: +SKIP
    >>> run.write(probe.measure(model, step=100))  # doctest: +SKIP
    """

    def __init__(self, folder: Path, lock: filelock.BaseFileLock) -> None:
        self.folder = folder
        self._lock = lock
        self._unfinished = False
        try:
            path = folder / "metrics.jsonl"
            self._metrics = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        except OSError as error:
            lock.release()
            raise refused(path, error) from error

    @classmethod
    def create(cls, folder: str | Path, config: Mapping[str, Any] | None = None) -> Self:
        """Open a new run folder; ``config`` is whatever reruns the run.

        Raises:
            RunFolderError: the folder exists and is not empty, or another process holds it.
            StorageError: the disk refused.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise RunFolderError(f"{folder} is a file, not a folder")
        _refuse_occupied(folder)
        run = cls._locked(folder)
        try:
            _refuse_occupied(folder)  # once more: another process may have been quicker
            run.truncate_metrics(0)
            write_atomic(folder / "environment.json", json_bytes(environment()))
            run.write_status(state="running", step=0)
            run._unfinished = True
            # Last: a folder with a configuration is a run.
            write_atomic(folder / "config.yaml", _yaml({"schema": SCHEMA, **(config or {})}))
        except BaseException:
            run._unfinished = False  # nor is it finished
            run.close()
            raise
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open an existing run folder to go on with it.

        Raises:
            RunFolderError: not a run folder, or another process holds it.
        """
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise RunFolderError(f"{folder} is not a run folder: it holds no config.yaml")
        return cls._locked(folder)

    @classmethod
    def _locked(cls, folder: Path) -> Self:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(folder / ".lock")
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise RunFolderError(f"{folder} is in use by another process") from error
        except OSError as error:
            raise refused(folder, error) from error
        run = cls(folder, lock)
        # What a killed writer was about to rename; nobody else writes here now.
        for torn in (
            *folder.glob(".*.part"),
            *folder.glob("checkpoints/.*.part"),
            *folder.glob("kernels/.*.part"),
            *folder.glob("evaluations/.*.part"),
        ):
            torn.unlink(missing_ok=True)
        return run

    def write(self, record: Measurement | Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, a measurement's kernels to kernels/<step>.safetensors first."""
        if self._metrics < 0:
            raise RunFolderError(f"{self.folder} was closed; Run.open it to write more")
        if isinstance(record, Measurement):
            if record.kernels:
                write_tensors(kernel_path(self.folder, record.step), record.kernels, {"step": record.step})
            record = {"step": record.step, **record.values}
        if "step" not in record:
            raise RunFolderError(
                f"a record needs a 'step'; it has {', '.join(map(repr, record)) or 'nothing'}"
            )
        self._append(json.dumps(finite(record), allow_nan=False).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._metrics).st_size
        try:
            written = os.write(self._metrics, line)
            if written < len(line):
                os.write(self._metrics, line[written:])
        except OSError as error:
            os.ftruncate(self._metrics, size)
            raise refused(self.folder / "metrics.jsonl", error) from error

    def write_evaluations(self, lines: list[dict[str, Any]]) -> None:
        """Append to evaluations.jsonl, all or none; a repeated evaluation takes the place of the first."""
        path = self.folder / "evaluations.jsonl"
        repeated = [_what_was_evaluated(line) for line in lines]
        kept = [line for line in _read_lines(path) if _what_was_evaluated(line) not in repeated]
        write_atomic(path, b"".join(json.dumps(finite(line)).encode() + b"\n" for line in [*kept, *lines]))

    def write_status(self, **status: Any) -> None:
        """Replace status.json."""
        write_atomic(
            self.folder / "status.json", json_bytes({"schema": SCHEMA, "pid": os.getpid(), **status})
        )
        self._unfinished = self._unfinished and status.get("state") == "running"

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl that are safely on the disk, for a checkpoint to remember."""
        try:
            os.fsync(self._metrics)
        except OSError as error:
            raise refused(self.folder / "metrics.jsonl", error) from error
        return os.fstat(self._metrics).st_size

    def rewind(self, *, size: int, step: int) -> None:
        """Drop what was written after a checkpoint: lines beyond ``size`` bytes, kernels beyond ``step``."""
        self.truncate_metrics(size)
        for later in kernel_steps(self.folder):
            if later > step:
                kernel_path(self.folder, later).unlink()

    def truncate_metrics(self, size: int) -> None:
        """Cut metrics.jsonl to ``size`` bytes."""
        if os.fstat(self._metrics).st_size < size:
            raise RunFolderError(
                f"{self.folder}/metrics.jsonl is shorter than its checkpoint remembers: lines are lost "
                "and the run cannot go on; give another --out"
            )
        os.ftruncate(self._metrics, size)

    def close(self) -> None:
        """Give the folder back; a run that was created here and said nothing of its end is finished."""
        if not self._lock.is_locked:
            return
        try:
            if self._unfinished:
                self.write_status(**{**_read_json(self.folder / "status.json"), "state": "finished"})
        finally:
            os.close(self._metrics)
            self._metrics = -1  # the number may be another file's by the next write
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._unfinished = self._unfinished and kind is None
        self.close()


def in_use(folder: Path) -> bool:
    """Whether a process holds the run folder open for writing."""
    path = folder / ".lock"
    if not path.exists():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (filelock.Timeout, OSError):
        return True
    lock.release()
    return False


# --- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRecord:
    """A run as it lies on the disk, finished or not."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    @cached_property
    def state(self) -> str:
        """running, evaluating, finished, interrupted or failed; killed where nobody holds a running one."""
        state = str(self.status.get("state", "running"))
        return "killed" if state in ("running", "evaluating") and not in_use(self.folder) else state

    @property
    def axis(self) -> str:
        """What the records are plotted against: "epoch" where they carry one, else "step"."""
        return "epoch" if any("epoch" in line for line in self.metrics) else "step"

    def series(self, name: str) -> tuple[list[float], list[Any]]:
        """(epochs or steps, values) of one named value, where it was recorded."""
        lines = [line for line in self.metrics if line.get(name) is not None and self.axis in line]
        return [line[self.axis] for line in lines], [line[name] for line in lines]

    def names(self) -> list[str]:
        """Every name that some record carries, in order of first appearance."""
        return list(dict.fromkeys(name for line in self.metrics for name in line))

    def kernel_steps(self) -> list[int]:
        return kernel_steps(self.folder)

    def kernels(self, step: int) -> dict[str, torch.Tensor]:
        """The kernels of one snapshot, by name."""
        return read_tensors(kernel_path(self.folder, step))[0]


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder, a killed one included: a torn last line of a log is left out.

    Raises:
        RunFolderError: not a run folder, or its configuration cannot be read.
    """
    folder = Path(folder)
    config = _read_config(folder)
    return RunRecord(
        folder=folder,
        config=config,
        environment=_read_json(folder / "environment.json"),
        status=_read_json(folder / "status.json"),
        metrics=_read_lines(folder / "metrics.jsonl"),
        evaluations=_read_lines(folder / "evaluations.jsonl"),
    )


@dataclass(frozen=True)
class StudyRecord:
    """A study as it lies on the disk: config.yaml, study.json and the lines of values.jsonl."""

    folder: Path
    config: dict[str, Any]
    verdicts: dict[str, Any]
    values: list[dict[str, Any]]

    @cached_property
    def runs(self) -> list[RunRecord]:
        """The runs beside the values, by name; none where only the values were kept."""
        return [read_run(path.parent) for path in sorted((self.folder / "runs").glob("*/config.yaml"))]


def is_study(folder: str | Path) -> bool:
    """Whether a folder with a configuration is a study's, not a run's.

    Raises:
        RunFolderError: it is neither, or its configuration cannot be read.
    """
    return "study" in _read_config(Path(folder))


def read_study(folder: str | Path) -> StudyRecord:
    """Read the folder of a study that was judged.

    Raises:
        RunFolderError: not a study, not judged yet, or a file cannot be read.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if "study" not in config:
        raise RunFolderError(f"{folder} holds no study")
    if not (folder / "study.json").exists():
        raise RunFolderError(
            f"{folder} holds no study.json yet; tangentlab study {config['study']} --out {folder} goes on"
        )
    return StudyRecord(folder, config, _read_json(folder / "study.json"), read_values(folder))


def read_values(folder: Path) -> list[dict[str, Any]]:
    """A study's raw values, as far as they were measured: values.jsonl.gz, if there, then values.jsonl."""
    return _read_packed(folder, "values.jsonl")


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Run key -> {"run", "config", "commit"} of the runs that a study measured, commits where they are known.

    From configs.jsonl.gz and configs.jsonl.
    """
    return {line["run"]: line for line in _read_packed(folder, "configs.jsonl")}


def kernel_path(folder: Path, step: int) -> Path:
    """Where the snapshot of ``step`` lies."""
    return folder / "kernels" / f"{step:08d}.safetensors"


def kernel_steps(folder: Path) -> list[int]:
    """Steps of the snapshots in the folder, ascending."""
    return sorted(int(p.stem) for p in (folder / "kernels").glob("*.safetensors") if p.stem.isdecimal())


def environment() -> dict[str, Any]:
    """Versions, machine and code version, as environment.json holds them."""
    from tangentlab import __version__

    return {
        "tangentlab": __version__,
        "commit": _commit(),
        "command": " ".join([_program(sys.argv[0]), *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


# --- helpers ---------------------------------------------------------------------------------------------


# What a run that was killed before its configuration stood may have left: nothing worth keeping.
_BEGINNINGS = {".lock", "metrics.jsonl", "environment.json", "status.json"}


def _refuse_occupied(folder: Path) -> None:
    if folder.is_dir() and any(
        path.name not in _BEGINNINGS and not path.name.endswith(".part") for path in folder.iterdir()
    ):
        raise RunFolderError(f"{folder} exists; give another --out, or --resume to go on with it")


def _what_was_evaluated(line: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation without its outcome."""
    outcome = {"correct", "accuracy", "interval", "seconds", "remaining", "flags"}
    return {k: v for k, v in line.items() if k not in outcome}


def _program(path: str) -> str:
    """Without the place where it is installed, which says nothing elsewhere."""
    return Path(path).name if Path(path).is_absolute() else path


def _commit() -> str | None:
    """The checkout's commit, "+" behind it where files were changed; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except FileNotFoundError as error:
        raise RunFolderError(f"{folder} is not a run folder: it holds no config.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RunFolderError(f"{folder}/config.yaml cannot be read: {_one_line(error)}") from error
    if not isinstance(config, dict) or config.get("schema") != SCHEMA:
        found = config.get("schema") if isinstance(config, dict) else None
        raise RunFolderError(f"{folder}/config.yaml has schema {found!r}; this version reads {SCHEMA}")
    return config


def _yaml(value: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(value), sort_keys=False).encode()


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a damaged one says so, and keeps nobody from reading the rest of the run."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return {"message": f"{path.name} cannot be read: {_one_line(error)}"}
    return value if isinstance(value, dict) else {"message": f"{path.name} holds no JSON object"}


def _read_packed(folder: Path, name: str) -> list[dict[str, Any]]:
    """Lines that were packed, if any were, then those that were added."""
    return [line for path in (folder / f"{name}.gz", folder / name) for line in _read_lines(path)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        # Split at b"\n" alone, and drop what follows the last one: a line is a line when it is whole.
        lines = [json.loads(line) for line in content.split(b"\n")[:-1]]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {_one_line(error)}") from error
    if not all(isinstance(line, dict) for line in lines):
        raise RunFolderError(f"{path} cannot be read: a line is no JSON object")
    return lines


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
