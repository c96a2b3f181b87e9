"""Run one configuration: the loop, its hooks, its folder, on one process or several."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tangentlab.errors import (
    CheckpointError,
    ConfigError,
    InterruptedRunError,
    ModelError,
    OtherProcessError,
    TangentlabError,
    first_line,
)
from tangentlab.files import under
from tangentlab.records import Run, RunRecord, read_run
from tangentlab.runs.build import (
    Examples,
    build_batches,
    build_data,
    build_model,
    build_probe,
    build_state,
    every_steps,
    learning_rate,
    resolve_device,
    steps_per_epoch,
    training_batch,
)
from tangentlab.runs.config import RunConfig
from tangentlab.runs.evaluation import CHECKPOINTS, build_attacks, checkpoint_path, evaluate_checkpoints
from tangentlab.runs.hooks import (
    Checkpointing,
    Display,
    Evaluation,
    Interruption,
    Keeping,
    Log,
    Probing,
    Recording,
    Showing,
    Stopping,
    progress,
)
from tangentlab.runs.parsing import build_method, resolve, settings_in_force
from tangentlab.runs.processes import (
    agree,
    check_size,
    connect,
    is_lost_connection,
    launch,
    meet,
    share,
    wrap,
)
from tangentlab.runs.switching import build_controller, remembered
from tangentlab.training import Controller, Share, Step, StepHook, TrainingState, load_checkpoint
from tangentlab.training import train as train_loop

LONG_SECONDS = 60.0  # a run from which on the silence of the final evaluation would puzzle


def train(
    config: RunConfig,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    allow_import: Iterable[str] = (),
    display: Display | None = None,
) -> RunRecord:
    """Train as the configuration says and evaluate the best and last checkpoints on the test set.

    Args:
        config: from :func:`load_config`, :func:`resolve` or built in Python.
        out: the run folder; runs/NAME by default. With several processes the program is started once for
            each of them (by torchrun, by srun, or here); the first writes the folder.
        resume: go on from the last checkpoint of the folder, or begin where there is none.
        allow_import: packages that a model may be imported from.
        display: shows the run while it trains.

    Returns:
        The run as it lies on the disk.

    Raises:
        RunFolderError: the folder exists (without resume), is in use, or holds another configuration.
        DivergedError: the loss or a parameter is not finite; the last good checkpoint is kept.
        InterruptedRunError: Ctrl-C; the run is saved and can be resumed.
        OtherProcessError: another of the processes cannot begin, or is lost.
        StorageError, DataError, ModelError, ConfigError: one line that says what and where.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(f"config is a {type(config).__name__}; load_config or resolve makes a RunConfig")
    config = resolve(config.to_dict(), allow_import=allow_import)
    folder = Path(out) if out is not None else Path("runs") / config.name
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(config.threads or torch.get_num_threads())
        launched = launch()
        check_size(config, launched)
        # Everything that can be wrong is tried before the folder is made and other processes are started.
        try:
            examples = _rehearse(config, allow_import)
            run = (
                stack.enter_context(_open(folder, config, resume, allow_import))
                if launched.rank == 0
                else None
            )
        except TangentlabError as error:
            if not launched.alone:
                meet(connect(config, launched), error)
            raise
        try:
            fabric = connect(config, launched)
            _train(
                config,
                examples,
                folder,
                run,
                fabric,
                resume=resume,
                allow_import=allow_import,
                display=display,
            )
        except (TangentlabError, KeyboardInterrupt) as error:
            if run is not None:
                _write_end(run, error)
            if isinstance(error, TangentlabError) and not isinstance(error, InterruptedRunError):
                raise
            said = str(error) or "interrupted"
            raise InterruptedRunError(f"{said}; {_how_to_resume(folder, allow_import)}") from error
    fabric.barrier()
    return read_run(folder)


def _rehearse(config: RunConfig, allow_import: Iterable[str]) -> Examples:
    """Build everything once, on the CPU, for the errors; returns the data."""
    resolve_device(config.device)
    examples = build_data(config)
    model = build_model(config, examples, torch.device("cpu"), allow_import=allow_import)
    build_state(config, model)
    batches = build_batches(config, examples, torch.device("cpu"), Share(0, config.processes))
    batches.batch(0)
    build_probe(config, examples)
    per_epoch = steps_per_epoch(config, batches)
    steps = config.training.epochs * per_epoch
    build_controller(config, examples, steps=steps, steps_per_epoch=per_epoch, log=None, fabric=None)
    return examples


def _train(
    config: RunConfig,
    examples: Examples,
    folder: Path,
    run: Run | None,
    fabric: Any,
    *,
    resume: bool,
    allow_import: Iterable[str],
    display: Display | None,
) -> None:
    part = share(fabric)
    batches = build_batches(config, examples, fabric.device, part)
    replays = build_method(config).replays
    per_epoch = steps_per_epoch(config, batches)
    steps = config.training.epochs * per_epoch
    interruption = Interruption()
    hooks: list[StepHook] = [Stopping(interruption, steps)]
    checkpointing = log = None
    try:
        model = build_model(config, examples, fabric.device, allow_import=allow_import)
        state = build_state(config, model)
        if run is not None:
            log = Log(run, per_epoch, replays)
        controller = build_controller(
            config,
            examples,
            steps=steps,
            steps_per_epoch=per_epoch,
            log=log,
            fabric=fabric,
            display=display,
        )
        if log is not None:
            checkpointing, hooks = _hooks(config, examples, log, controller, steps, interruption, display)
        if resume:
            _resume(folder, state, checkpointing)
    except TangentlabError as error:
        meet(fabric, error)
        raise
    meet(fabric, None)
    wrapped = wrap(fabric, model, state.optimizer)
    try:
        with interruption.listening():
            train_loop(
                state,
                controller=controller,
                batch=lambda step: training_batch(batches, step // replays, len(examples.train), part),
                learning_rate=learning_rate(config, steps),
                steps=steps,
                seed=config.seed,
                make=Step(
                    trained=wrapped,
                    autocast=fabric.autocast,
                    backward=fabric.backward,
                    agree=partial(agree, fabric, interruption),
                ),
                hooks=hooks if fabric.world_size == 1 else [*hooks, lambda _: fabric.barrier()],
            )
            if run is not None and checkpointing is not None:
                if display is not None and state.seconds["train"] > LONG_SECONDS:
                    display.say("evaluating the checkpoints on the test set")
                interruption.at_once = True  # nothing to save any more
                _finish(config, examples, run, model, state, checkpointing)
    except (RuntimeError, ValueError) as error:
        # What PyTorch raises for a network that only fails in training mode or on a full batch.
        if isinstance(error, TangentlabError):
            raise
        if is_lost_connection(error):
            raise OtherProcessError(f"another process is lost at step {state.step}") from error
        raise ModelError(f"training fails at step {state.step}: {first_line(error)}") from error


def _hooks(
    config: RunConfig,
    examples: Examples,
    log: Log,
    controller: Controller,
    steps: int,
    interruption: Interruption,
    display: Display | None,
) -> tuple[Checkpointing, list[StepHook]]:
    per_epoch = log.steps_per_epoch
    evaluation = Evaluation(
        config, examples.validation, log, every_steps(config.evaluation.every, per_epoch), steps
    )
    probe = build_probe(config, examples)
    remembering = remembered(controller) | ({} if probe is None else {"probe": probe})
    checkpointing = Checkpointing(config, log, evaluation, remembering, steps, interruption)
    hooks: list[StepHook] = [evaluation]
    if probe is not None:
        hooks.append(Probing(probe, log, every_steps(config.probe.every, per_epoch), config.probe.early))
    if config.training.keep_every is not None:
        hooks.append(Keeping(log, every_steps(config.training.keep_every, per_epoch)))
    hooks.append(Recording(log))
    if display is not None:
        display.start(
            log.run.folder.absolute().name, epochs=config.training.epochs, steps_per_epoch=per_epoch
        )
        hooks.append(Showing(display, log))
    return checkpointing, [*hooks, checkpointing]


def _resume(folder: Path, state: TrainingState, checkpointing: Checkpointing | None) -> None:
    """Go on from the last checkpoint; where there is none the run begins."""
    path = checkpoint_path(folder, "last")
    if not path.exists():
        came = read_run(folder).status.get("step") or 0
        if came:
            raise CheckpointError(f"{folder} came to step {came}, but {path} is gone; give another --out")
        if checkpointing is not None:
            checkpointing.log.run.rewind(size=0, step=-1)
        return
    extra, tensors = load_checkpoint(path, state)
    if checkpointing is not None:
        for name, one in checkpointing.remembering.items():
            try:
                one.load_state_dict(under(tensors, f"{name}/"))
            except (IndexError, KeyError, TypeError, ValueError) as error:
                message = f"{path}: its {name} is another version's; give another --out"
                raise CheckpointError(message) from error
        checkpointing.log.run.rewind(size=extra["metrics_size"], step=state.step)
        checkpointing.log.newest = extra["newest"]
        checkpointing.evaluation.best = extra["best"]


def _finish(
    config: RunConfig,
    examples: Examples,
    run: Run,
    model: nn.Module,
    state: TrainingState,
    checkpointing: Checkpointing,
) -> None:
    run.write_status(state="evaluating", **progress(checkpointing, state))
    evaluate_checkpoints(
        run,
        config,
        examples,
        model,
        attacks=build_attacks(config),
        checkpoints=CHECKPOINTS,
        test_size=config.evaluation.test_size,
    )
    run.write_status(state="finished", **progress(checkpointing, state))


def _open(folder: Path, config: RunConfig, resume: bool, allow_import: Iterable[str]) -> Run:
    if not resume or not (folder / "config.yaml").exists():
        return Run.create(folder, config.to_dict())
    run = Run.open(folder)
    try:
        check_same(read_run(folder).config, config, folder, allow_import=allow_import)
    except BaseException:
        run.close()
        raise
    return run


def is_finished(folder: Path, config: RunConfig, *, allow_import: Iterable[str] = ()) -> bool:
    """Whether the folder holds the run of this configuration, trained and evaluated to its end."""
    try:
        record = read_run(folder)
        check_same(record.config, config, folder, allow_import=allow_import)
    except TangentlabError:
        return False
    return record.state == "finished"


def check_same(
    saved: Mapping[str, Any], config: RunConfig, folder: Path, *, allow_import: Iterable[str] = ()
) -> None:
    """What is gone on with is the same run: the first setting that differs is named.

    A setting younger than ``saved``, what the folder was run with, has its default. Settings of a switch or
    an alarm that is off do not count.

    Raises:
        ConfigError: a setting differs, or ``saved`` is no configuration.
    """
    if saved == config.to_dict():
        return
    allow = list(allow_import)
    own = settings_in_force(config.to_dict(), allow_import=allow)
    try:
        before = settings_in_force(saved, allow_import=allow)
    except TangentlabError as error:
        raise ConfigError(f"{folder} was run with another configuration: {error}") from error
    for key in {**before, **own}:
        if before.get(key) != own.get(key):
            raise ConfigError(
                f"{folder} was run with {key}={before.get(key)!r}, not {own.get(key)!r}; give another --out"
            )


def _write_end(run: Run, error: BaseException) -> None:
    """Say in status.json how the run ended, as far as the disk lets us."""
    status = read_run(run.folder).status
    if status.get("state") == "finished":
        return  # what failed was an attempt to go on where nothing was left to do
    stopped = isinstance(error, (InterruptedRunError, KeyboardInterrupt))
    status |= {"state": "interrupted" if stopped else "failed", "message": str(error) or type(error).__name__}
    status.pop("schema", None)
    status.pop("pid", None)
    try:
        run.write_status(**status)
    except TangentlabError:
        return  # the first error is the one to tell


def _how_to_resume(folder: Path, allow_import: Iterable[str]) -> str:
    words = ["tangentlab", "train", str(folder), "--resume"]
    for package in allow_import:
        words += ["--allow-import", package]
    return f"go on with: {shlex.join(words)}"
