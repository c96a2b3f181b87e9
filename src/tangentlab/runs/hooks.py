"""What happens between steps: evaluation, the probe, the log, checkpoints, interruption.

Each is a StepHook. Checkpointing comes last, so that a checkpoint remembers everything that was recorded up
to its step; a resumed run then writes the same lines as the uninterrupted one.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from tangentlab.attacks import FGSM
from tangentlab.data import Split
from tangentlab.errors import InterruptedRunError, KernelError
from tangentlab.probes import KernelProbe
from tangentlab.records import Measurement, Run
from tangentlab.runs.build import build_attack
from tangentlab.runs.config import RunConfig
from tangentlab.runs.evaluation import checkpoint_path, count_correct
from tangentlab.training import TrainingState, check_parameters, save_checkpoint, save_weights

CHECKPOINT_SECONDS = 300.0


class Display(Protocol):
    """Shows a run while it trains."""

    def start(self, name: str, *, epochs: int, steps_per_epoch: int) -> None:
        """The run that the next steps belong to."""
        ...

    def show(self, state: TrainingState, values: Mapping[str, Any]) -> None:
        """After each step; ``values`` are the newest of every name recorded so far."""
        ...

    def say(self, text: str) -> None:
        """One line about the run."""
        ...

    def note(self, text: str) -> None:
        """One line about any run."""
        ...


class Remembering(Protocol):
    """What is carried from one look at a run to the next, as plain tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass
class Log:
    """Writes records with their step and epoch, and keeps the newest value of every name.

    An epoch takes every batch ``replays`` steps in a row.
    """

    run: Run
    steps_per_epoch: int
    replays: int = 1
    newest: dict[str, Any] = field(default_factory=dict)

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.write({"step": step, "epoch": self.epoch(step), **values})
        self.newest.update(values)


@contextmanager
def timed(state: TrainingState, purpose: str) -> Iterator[None]:
    """Add the seconds of the body to ``state.seconds[purpose]``."""
    started = time.perf_counter()
    try:
        yield
    finally:
        state.seconds[purpose] += time.perf_counter() - started


@dataclass
class Evaluation:
    """Clean, FGSM and PGD accuracy on the validation split; keeps the weights that are best under PGD."""

    config: RunConfig
    split: Split
    log: Log
    every: int
    steps: int
    best: dict[str, Any] = field(default_factory=dict)

    def __call__(self, state: TrainingState) -> None:
        if state.step % self.every and state.step != self.steps:
            return
        check_parameters(state)
        with timed(state, "evaluation"):
            device = state.loss_sum.device
            attacks = {
                "clean_accuracy": None,
                "fgsm_accuracy": FGSM(self.config.eps),
                "robust_accuracy": build_attack(self.config, num_steps=self.config.evaluation.num_steps),
            }
            values = {
                name: count_correct(state.evaluated, self.split, attack, seed=self.config.seed, device=device)
                / len(self.split)
                for name, attack in attacks.items()
            }
            self.log.write(state.step, {**values, "examples": len(self.split)})
            # The untrained network is on the curve, but is no candidate.
            if state.step and values["robust_accuracy"] > self.best.get("robust_accuracy", -1.0):
                self.best = {"step": state.step, "epoch": self.log.epoch(state.step), **values}
                save_weights(checkpoint_path(self.log.run.folder, "best"), state, self.best)


@dataclass
class Probing:
    """Measures the kernel every ``every`` steps; where ``early``, also at the powers of two before the first.

    It only watches: where a kernel cannot be measured any more (a network that has died has none), the log
    says so and training goes on. A first snapshot that fails is a wrong setting, and an error.
    """

    probe: KernelProbe
    log: Log
    every: int
    early: bool = False

    def __call__(self, state: TrainingState) -> None:
        step = state.step
        between = step % self.every != 0
        if between and not (self.early and step < self.every and step.bit_count() == 1):
            return
        check_parameters(state)
        with timed(state, "probe"):
            try:
                measurement = self.probe.measure(
                    state.model, step, summed_learning_rate=state.summed_learning_rate, between=between
                )
            except KernelError as error:
                if step == 0:
                    raise
                self.log.write(step, {"probe_error": str(error)})
                return
            values = {"epoch": self.log.epoch(step), **measurement.values}
            self.log.run.write(Measurement(step, values, measurement.kernels))
            self.log.newest.update(measurement.values)


@dataclass
class Keeping:
    """Keeps the judged network's weights every ``every`` steps."""

    log: Log
    every: int

    def __call__(self, state: TrainingState) -> None:
        if state.step % self.every == 0:
            check_parameters(state)
            path = checkpoint_path(self.log.run.folder, f"step-{state.step}")
            save_weights(path, state, {"epoch": self.log.epoch(state.step)})


@dataclass
class Recording:
    """Writes the loss, the cost and the seconds, at the end of each epoch."""

    log: Log

    def __call__(self, state: TrainingState) -> None:
        if state.step == 0 or state.step % self.log.steps_per_epoch:
            return
        self.log.write(
            state.step,
            {
                "train_loss": float(state.loss_sum / state.loss_count),
                "learning_rate": state.learning_rate,
                "summed_learning_rate": state.summed_learning_rate,
                **cost(state, self.log),
                **seconds(state),
            },
        )
        state.loss_sum.zero_()
        state.loss_count = 0


@dataclass
class Checkpointing:
    """Saves the training state at the end of each epoch, every five minutes, and when asked to stop.

    ``remembering`` are what else goes on where it was, by name.
    """

    config: RunConfig
    log: Log
    evaluation: Evaluation
    remembering: Mapping[str, Remembering]
    steps: int
    interruption: Interruption
    saved: float = field(default_factory=time.monotonic)

    def __call__(self, state: TrainingState) -> None:
        if state.step == 0:
            return
        due = time.monotonic() - self.saved > CHECKPOINT_SECONDS or self.interruption.asked
        if state.step % self.log.steps_per_epoch == 0 or state.step == self.steps or due:
            self.save(state)
        self.interruption.stop(state.step, self.steps)

    def save(self, state: TrainingState) -> None:
        """Replace the last checkpoint, unless the state is not finite."""
        check_parameters(state)
        extra = {
            "epoch": self.log.epoch(state.step),
            "metrics_size": self.log.run.metrics_size(),
            "best": self.evaluation.best,
            "newest": self.log.newest,
        }
        tensors = {
            f"{name}/{key}": tensor
            for name, one in self.remembering.items()
            for key, tensor in one.state_dict().items()
        }
        save_checkpoint(checkpoint_path(self.log.run.folder, "last"), state, extra, tensors)
        self.log.run.write_status(state="running", **progress(self, state))
        self.saved = time.monotonic()


@dataclass
class Showing:
    """Passes each step on to a display."""

    display: Display
    log: Log

    def __call__(self, state: TrainingState) -> None:
        self.display.show(state, self.log.newest)


@dataclass
class Stopping:
    """Stops where it is asked to: of several processes, those that save nothing."""

    interruption: Interruption
    steps: int

    def __call__(self, state: TrainingState) -> None:
        if state.step:
            self.interruption.stop(state.step, self.steps)


class Interruption:
    """Ctrl-C, or a batch system's notice, asks for a stop at the next step boundary; a second Ctrl-C stops at
    once.

    ``heard`` says that this process was asked; ``asked``, that all of them stop, as they agree at each step.

    ``tell`` is called when a stop is asked for.
    """

    def __init__(self, tell: Callable[[], None] | None = None) -> None:
        self._tell = tell
        self.asked = False
        self.at_once = False
        self.heard = False

    def stop(self, step: int, steps: int) -> None:
        """Raise InterruptedRunError where a stop was asked for and something is left to do."""
        if self.asked and step < steps:
            raise InterruptedRunError(f"interrupted at step {step} of {steps}")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM (a batch system's notice) while the body runs, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _: object) -> None:
            # Launchers pass SIGTERM on to processes that have it already.
            if self.at_once or (self.heard and number == signal.SIGINT):
                raise KeyboardInterrupt
            self.heard = True
            if self._tell is not None:
                self._tell()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def progress(checkpointing: Checkpointing, state: TrainingState) -> dict[str, Any]:
    """How far the run came, as status.json says it."""
    log = checkpointing.log
    return {
        "step": state.step,
        "steps": checkpointing.steps,
        "epoch": log.epoch(state.step),
        "epochs": checkpointing.config.training.epochs,
        "best": checkpointing.evaluation.best,
        **cost(state, log),
        **seconds(state),
    }


def cost(state: TrainingState, log: Log) -> dict[str, float]:
    """Passes so far per training example: a PGD-10 epoch is 11 forwards, 10 input and 1 full backwards."""
    counts = {**state.passes._asdict(), "cost": state.cost}
    counts |= {"steering_cost": state.steering} if state.steering else {}
    return {name: count * log.replays / log.steps_per_epoch for name, count in counts.items()}


def seconds(state: TrainingState) -> dict[str, float]:
    """Wall seconds so far by purpose."""
    return {f"{purpose}_seconds": spent for purpose, spent in state.seconds.items()}
