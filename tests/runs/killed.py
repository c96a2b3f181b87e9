"""Runs in child processes that are killed: at their k-th file operation, or after some time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tangentlab.errors import TangentlabError
from tangentlab.runs import RunConfig, resolve, train

# Children fork from a server that has PyTorch loaded and has run nothing.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "tangentlab.runs",
        "tangentlab.kernels",
        "tangentlab.data",
        "sklearn.datasets",
        "lightning_fabric.strategies.ddp",
    ]
)

OPERATIONS = ("fsync", "replace", "write", "ftruncate", "unlink")


def start(
    config: RunConfig, folder: Path, *, operation: int | None = None, counter: Any = None
) -> BaseProcess:
    """Start ``train(config, folder, resume=True)`` in a child that is killed at its k-th file operation."""
    child = context.Process(target=_child, args=(config.to_dict(), str(folder), operation, counter))
    child.start()
    return child


def run(config: RunConfig, folder: Path, **options: Any) -> int:
    """Start a child and wait: 0, or −9 for one that was killed."""
    child = start(config, folder, **options)
    child.join(120)
    assert child.exitcode is not None, "the run hangs"
    return child.exitcode


def kill_after(seconds: float, config: RunConfig, folder: Path) -> int:
    """Start a child and kill it from outside after some time."""
    child = start(config, folder)
    time.sleep(seconds)
    child.kill()  # unlike os.kill, no error where it has just ended
    child.join(60)
    return child.exitcode


def _child(values: dict[str, Any], folder: str, operation: int | None, counter: Any) -> None:
    torch.set_num_threads(1)
    seen = 0
    on_disk: dict[int, int] = {}
    lock = threading.Lock()

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def do(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            with lock:
                seen += 1
                if counter is not None:
                    counter.value = seen
                if seen == operation:
                    if name == "write":
                        call(args[0], args[1][: len(args[1]) // 2])  # a torn line
                    if name == "fsync" and os.path.isfile(f"/proc/self/fd/{args[0]}"):
                        # A torn file: half of what was written since the disk had all of it.
                        file = os.fstat(args[0])
                        os.truncate(args[0], (on_disk.get(file.st_ino, 0) + file.st_size) // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            found = call(*args, **kwargs)
            if name in ("fsync", "ftruncate"):  # a run is cut back to what its checkpoint knows to be there
                file = os.fstat(args[0])
                on_disk[file.st_ino] = file.st_size
            return found

        return do

    for name in OPERATIONS:
        setattr(os, name, watched(name, getattr(os, name)))
    try:
        train(resolve(values), folder, resume=True)
    except TangentlabError as error:
        raise SystemExit(str(error)) from error
