"""A child process and the light one that watches it: what a worker does for one of many runs.

The watcher imports no PyTorch. It starts a fresh Python, so that a run that dies takes no other with it and
gets its signals in a main thread, wherever the watcher itself runs. The child works for as long as its
standard input is open; closed, because a stop was asked for or nobody watches any more, it saves and ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2


@contextmanager
def started_uninterruptible() -> Iterator[None]:
    """Processes that the body starts are deaf to Ctrl-C, which a terminal sends to all: this one tells them.

    So is this one meanwhile: a process begins with the signals ignored that its parent ignores.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def watch(
    code: str,
    request: Mapping[str, Any],
    *,
    key: int,
    stop: str,
    parent: int,
    cwd: str,
    path: Sequence[str],
    greeting: str = "",
) -> tuple[int, dict[str, str]]:
    """Run ``code``, which calls :func:`answer`, in a child that works on the request until it is done.

    Args:
        code: what the child's Python executes.
        request: JSON-able.
        key: comes back with the answer.
        stop: a file; when it appears the child is to stop.
        parent: the process that asked; where it is this one's parent and dies, the child is to stop.
        cwd: the child's working directory.
        path: where the child looks for modules, before the watcher's own places.
        greeting: written to stderr at the start.

    Returns:
        The key, and the child's answer, {"state": ..., "message": ...}; of one that died without an answer or
        was not started, the state is failed or, where it was to stop, interrupted.
    """
    if os.path.exists(stop):
        return key, {"state": "interrupted", "message": "not started"}
    sys.stderr.write(greeting)
    watched = os.getppid() == parent
    places = dict.fromkeys(place for place in (*path, *sys.path) if place)
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
            start_new_session=True,  # the terminal's Ctrl-C is not for it
        )
    except OSError as error:
        return key, {"state": "failed", "message": f"no process started: {error.strerror or error}"}
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdout:
        with suppress(OSError), child.stdin:
            child.stdin.write(json.dumps(dict(request)).encode() + b"\n")
            child.stdin.flush()
            while child.poll() is None:
                if os.path.exists(stop) or (watched and os.getppid() != parent):
                    break
                with suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_SECONDS)
        child.wait()
        said = child.stdout.read()
    try:
        return key, json.loads(said)
    except ValueError:
        state = "interrupted" if os.path.exists(stop) else "failed"
        return key, {"state": state, "message": _death(child.returncode)}


def answer(work: Callable[[Any], Mapping[str, str]]) -> None:
    """In the child: do the work that was asked for; Ctrl-C's signal is raised where it is to stop."""
    channel = os.dup(1)
    os.dup2(2, 1)  # what the work prints is no answer
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "pthread_sigmask"):  # Ray's workers block it, and a child begins as they are
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # Unbuffered: no lock is held when the interpreter ends while the thread still reads.
    requests = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
    request = json.loads(requests.readline())

    def listen() -> None:
        while requests.read(1):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=listen, daemon=True).start()
    result = work(request)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to stop
    with suppress(BrokenPipeError), open(channel, "w") as file:  # where nobody watches any more
        json.dump(dict(result), file)


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with code {code}"
    with suppress(ValueError):
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process was killed by signal {-code}"


def request_stop(stop: Path) -> None:
    """Make the file that :func:`watch` looks for."""
    with suppress(OSError):
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()
