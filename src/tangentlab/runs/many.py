"""Many runs, fanned out through joblib over local processes, Dask or Ray.

A run that fails is reported and the others go on; what is finished is not run again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast
from uuid import uuid4

from tangentlab.children import answer, request_stop, started_uninterruptible, watch
from tangentlab.errors import ConfigError, InterruptedRunError, TangentlabError, first_line, unknown_choice
from tangentlab.runs.config import RunConfig
from tangentlab.runs.hooks import Display, Interruption
from tangentlab.runs.parsing import resolve
from tangentlab.runs.run import is_finished, train

# joblib's back-end -> the package it needs, and what to install for it
BACKENDS = {"loky": ("joblib", "joblib"), "dask": ("distributed", "dask[distributed]"), "ray": ("ray", "ray")}
CHILD = "from tangentlab.runs.many import train_child; train_child()"

State = Literal["finished", "already finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """How one of many runs ended.

    Args:
        folder: the run folder.
        state: finished, already finished (not run again), failed or interrupted.
        message: one line that says why, of a run that failed or was interrupted.
    """

    folder: Path
    state: State
    message: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.folder.name, self.state, self.message)))


def train_many(
    runs: Mapping[Path, RunConfig],
    *,
    jobs: int = 1,
    backend: str = "loky",
    allow_import: Iterable[str] = (),
    display: Display | None = None,
) -> list[Outcome]:
    """Train each configuration into its folder, as :func:`train` does with ``resume``.

    A finished run is not run again; one that was interrupted or killed goes on. An error, or the death of a
    run's process, is that run's outcome, and the others go on. Ctrl-C stops and saves all of them; the
    outcomes say so, and the same call goes on.

    ``threads`` that a configuration leaves open are PyTorch's own choice: with several jobs the cores divided
    by the jobs (or OMP_NUM_THREADS), on a cluster what it gives its workers. environment.json says how many
    they were; rounding depends on them, so set ``threads`` where ``jobs`` must not matter.

    Args:
        runs: run folder -> configuration.
        jobs: runs at a time. One at a time on this machine, they run in this process; else each has its own.
        backend: where the processes are: loky, on this machine; dask, at DASK_SCHEDULER_ADDRESS or the
            current client's; ray, at RAY_ADDRESS. Without an address the two start a local cluster. All
            machines reach the folders, and the data, under the same paths.
        allow_import: packages that a model may be imported from.
        display: shows one run at a time in full, of several at a time a line where one starts and ends.

    Returns:
        The outcomes, in order.

    Raises:
        ConfigError: jobs or backend out of range, a package missing, or a run with several processes.
    """
    allow = list(allow_import)
    if jobs < 1:
        raise ConfigError(f"jobs={jobs} is out of range; at least 1")
    if backend not in BACKENDS:
        raise ConfigError(unknown_choice("backend", backend, BACKENDS))
    package, source = BACKENDS[backend]
    if find_spec(package) is None:
        raise ConfigError(f"backend {backend!r} needs {package}, which is missing: pip install '{source}'")
    several = next((config.processes for config in runs.values() if config.processes > 1), None)
    if several is not None:
        raise ConfigError(f"processes={several} is for a run by itself; each of many runs takes processes=1")
    outcomes = {
        folder: Outcome(folder, "already finished")
        for folder, config in runs.items()
        if is_finished(folder, config, allow_import=allow)
    }
    left = {folder: config for folder, config in runs.items() if folder not in outcomes}
    here = jobs == 1 and backend == "loky"
    if here:
        ended = _in_this_process(left, allow, display)
    else:
        ended = _in_processes(left, jobs, backend, allow, greet=display is not None)
    for outcome in chain(list(outcomes.values()), ended):
        outcomes[outcome.folder] = outcome
        if display is not None and not (here and outcome.state == "finished"):  # that was shown in full
            display.note(str(outcome))
    return [outcomes[folder] for folder in runs]


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Raise where a run is not finished, with one line about all that are not.

    Raises:
        InterruptedRunError: at least one was interrupted.
        TangentlabError: at least one failed.
    """
    stopped = [outcome for outcome in outcomes if outcome.state == "interrupted"]
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    finished = len(outcomes) - len(stopped) - len(failed)
    if stopped:
        raise InterruptedRunError(
            f"interrupted: {finished} of {len(outcomes)} runs finished, {len(failed)} failed"
        )
    if failed and not finished and len({outcome.message for outcome in failed}) == 1:
        raise TangentlabError(failed[0].message)
    if failed:
        whys = "; ".join(f"{outcome.folder.name}: {outcome.message}" for outcome in failed)
        raise TangentlabError(f"{len(failed)} of {len(outcomes)} runs failed: {whys}")


def train_child() -> None:
    """In the process of a run: train as :func:`train_many` asked, and answer with state and message."""

    def work(request: Any) -> dict[str, str]:
        try:
            config = resolve(request["config"], allow_import=request["allow_import"])
        except TangentlabError as error:
            return {"state": "failed", "message": str(error)}
        outcome = _train(config, Path(request["folder"]), request["allow_import"], None)
        return {"state": outcome.state, "message": outcome.message}

    answer(work)


def _in_this_process(
    runs: Mapping[Path, RunConfig], allow: list[str], display: Display | None
) -> Iterator[Outcome]:
    stopped = False
    for folder, config in runs.items():
        outcome = Outcome(folder, "interrupted", "not started")
        if not stopped:
            outcome = _train(config, folder, allow, display)
        stopped = outcome.state == "interrupted"
        yield outcome


def _train(config: RunConfig, folder: Path, allow: list[str], display: Display | None) -> Outcome:
    try:
        train(config, folder, resume=True, allow_import=allow, display=display)
    except InterruptedRunError as error:
        where = str(error).partition(";")[0].removeprefix("interrupted").strip()
        return Outcome(folder, "interrupted", where)
    except KeyboardInterrupt:
        return Outcome(folder, "interrupted", "before its first step")
    except TangentlabError as error:
        return Outcome(folder, "failed", " ".join(str(error).split()))
    except Exception as error:  # whatever it is, the other runs go on
        return Outcome(folder, "failed", f"{type(error).__name__}: {first_line(error)}")
    return Outcome(folder, "finished")


def _in_processes(
    runs: Mapping[Path, RunConfig], jobs: int, backend: str, allow: list[str], *, greet: bool
) -> Iterator[Outcome]:
    """Each in a process of its own, watched by one of joblib's workers; outcomes as they come."""
    from joblib import Parallel, delayed

    if not runs:
        return
    left = list(runs)
    # Through the folders' own disk: back-ends have no way of their own to tell a worker to save.
    stop = left[0].absolute().parent / f".stop-{uuid4().hex}"
    interruption = Interruption(lambda: request_stop(stop))
    tasks = (
        delayed(watch)(
            CHILD,
            {"config": config.to_dict(), "folder": str(folder.absolute()), "allow_import": allow},
            key=number,
            stop=str(stop),
            parent=os.getpid(),
            cwd=os.getcwd(),
            path=[os.path.abspath(place) for place in sys.path],
            greeting=f"{folder.name}: started\n" if greet else "",
        )
        for number, (folder, config) in enumerate(runs.items())
    )
    lost = ""
    with ExitStack() as stack:
        stack.callback(stop.unlink, missing_ok=True)
        stack.enter_context(interruption.listening())
        try:
            with started_uninterruptible():
                _enter_backend(stack, backend, jobs)
                # No more than jobs are handed out, however many workers a cluster has.
                parallel = Parallel(
                    n_jobs=jobs,
                    batch_size=1,
                    pre_dispatch=jobs,
                    return_as="list" if backend == "ray" else "generator_unordered",  # Ray has no other
                )
                answers = parallel(tasks) if backend != "ray" else None
            if answers is None:  # a list: here until the last run ends
                answers = parallel(tasks)
            for number, found in answers:
                folder = list(runs)[number]
                left.remove(folder)
                yield Outcome(folder, cast(State, found["state"]), found["message"])
        except Exception as error:  # the back-end's: what a run raises is an answer
            lost = f"{type(error).__name__}: {first_line(error)}"
    for folder in left:
        yield Outcome(folder, "interrupted" if interruption.heard else "failed", lost)


def _enter_backend(stack: ExitStack, backend: str, jobs: int) -> None:
    """Make joblib's next Parallel use the back-end, until the stack is closed."""
    from joblib import parallel_config

    if backend == "ray":
        import ray
        from ray.util.joblib import register_ray

        if not ray.is_initialized():
            ray.init()
            stack.callback(ray.shutdown)
        register_ray()
    if backend == "dask":
        import dask
        from distributed import Client, get_client

        try:
            get_client()
        except ValueError:  # there is none yet
            address = dask.config.get("scheduler-address", None)
            own = {} if address else {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
            stack.enter_context(Client(address, **own))
    stack.enter_context(parallel_config(backend))
