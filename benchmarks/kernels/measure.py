"""One measurement in one process: seconds of repeated calls, growth of memory, error against the reference.

Needs the standard library and numpy alone: the processes of both environments import it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Spec = dict[str, Any]
Result = TypeVar("Result")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def worker(
    build: Callable[[Spec], tuple[Callable[[], Array], list[str]]],
    more: Callable[[Spec, float], dict[str, Any]] | None = None,
) -> None:
    """Main function of a measuring process: spec from the command line, answer into the file it names.

    ``build`` makes the call to be measured, with everything before it (imports, network, inputs) done, and
    names the packages whose versions belong to the answer; ``more`` adds to it, given the median seconds.
    """
    spec: Spec = json.loads(sys.argv[1])
    answer: dict[str, Any]
    try:
        call, packages = build(spec)
        answer = {"status": "ok", "versions": {name: metadata.version(name) for name in packages}}
        K, found = timed(call, spec["calls"], spec["seconds"])
        answer |= found
        if spec["reference"]:
            answer["error"] = relative_error(K, spec["reference"], spec["case"]["kind"])
        if more is not None:
            answer |= more(spec, float(np.median(answer["seconds"])))
    except Exception as error:  # a peer that cannot is a row of the table
        line = " ".join(f"{type(error).__name__}: {error}".split())
        answer = {"status": "failed", "reason": line[:300]}
    Path(spec["answer"]).write_text(json.dumps(answer))


def timed(call: Callable[[], Array], calls: int, seconds: float) -> tuple[Array, dict[str, Any]]:
    """One call to warm up, then at most ``calls``, no further one begun after ``seconds``.

    growth_bytes: peak resident memory during all calls, minus that before the first.
    growth_warm_bytes: peak during the calls after the first, minus that before them.
    """
    before = memory("VmRSS")
    reset_peak()
    K, first = clocked(call)
    peak, warm = memory("VmHWM"), memory("VmRSS")
    reset_peak()
    each: list[float] = []
    while not each or (len(each) < calls and sum(each) < seconds):
        del K
        K, spent = clocked(call)
        each.append(spent)
    warm_peak = memory("VmHWM")
    return K, {
        "first_seconds": first,
        "seconds": each,
        "growth_bytes": max(peak, warm_peak) - before if before else None,
        "growth_warm_bytes": warm_peak - warm if before else None,
    }


def clocked(call: Callable[[], Result]) -> tuple[Result, float]:
    """What the call returns, and its seconds."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def memory(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak since the last reset); 0 where the system does not tell."""
    if not STATUS.exists():
        return 0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Let VmHWM begin anew (proc(5), clear_refs)."""
    if CLEAR.exists():
        CLEAR.write_text("5")


def relative_error(K: Array, reference: str, kind: str) -> float:
    """‖K − K₆₄‖_F / ‖K₆₄‖_F over the examples that the reference holds."""
    with np.load(reference) as stored:
        exact, rows = stored["kernel"], stored["examples"]
    pair = np.ix_(rows, rows)
    K = np.asarray(K[:, pair[0], pair[1]] if kind == "class" else K[pair], dtype=np.float64)
    if K.shape != exact.shape:
        raise ValueError(f"a kernel of shape {K.shape}, the reference's is {exact.shape}")
    return float(np.linalg.norm(K - exact) / np.linalg.norm(exact))
