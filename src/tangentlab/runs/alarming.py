"""The alarm of catastrophic overfitting along a run, as a Controller around another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tangentlab.files import under
from tangentlab.probes import OverfittingAlarm
from tangentlab.runs.evaluation import BEFORE_ALARM, checkpoint_path
from tangentlab.runs.hooks import Display, Log, timed
from tangentlab.training import (
    Controller,
    Method,
    TrainingState,
    all_weights,
    check_parameters,
    judged_weights,
    load_all_weights,
    write_weights,
)


@dataclass
class Alarming:
    """Looks every ``every`` steps, at the eps of the step; while the alarm is raised ``instead`` makes the
    steps, where there is one.

    Each time that the alarm is raised the user is told; the first time the weights of the last quiet look are
    kept as a checkpoint, for what lies between later alarms may be lost already. With ``restore`` training
    also goes back to the last quiet look.
    Where the alarm steers, its cost is the training's. Of several processes the first looks and tells the
    others.
    """

    alarm: OverfittingAlarm
    every: int
    eps: Callable[[int], float]
    quiet: Controller
    instead: Callable[[int], Method] | None
    restore: bool
    batch_size: int
    log: Log | None
    fabric: Any
    display: Display | None
    raised: bool | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    kept_at: int = -1
    good: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, state: TrainingState) -> Method:
        due = state.step % self.every == 0
        returns = due and self.log is not None and self._look(state, self.log)
        if due and self.restore:
            self._restore(state, self.fabric.broadcast(self.good if returns else None))
        if self.instead is None:
            return self.quiet(state)
        if due or self.raised is None:
            self.raised = bool(self.fabric.broadcast(self.alarm.raised))
        return self.instead(state.step) if self.raised else self.quiet(state)

    def state_dict(self) -> dict[str, Tensor]:
        """The alarm's, and the weights that are kept."""
        held = {f"alarm/{name}": tensor for name, tensor in self.alarm.state_dict().items()}
        held |= {f"kept/{name}": tensor for name, tensor in self.kept.items()}
        held |= {f"good/{name}": tensor for name, tensor in self.good.items()}
        return {**held, "kept_at": torch.tensor(self.kept_at)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        self.alarm.load_state_dict(under(state, "alarm/"))
        self.kept, self.kept_at = under(state, "kept/"), int(state["kept_at"])
        self.good = under(state, "good/")

    def _look(self, state: TrainingState, log: Log) -> bool:
        """Whether training is to go back to the good weights."""
        check_parameters(state)
        before, quiet = self.alarm.cost, not self.alarm.raised
        with timed(state, "probe" if self.instead is None else "steering"):
            raised = self.alarm.update(state.model, state.step, eps=self.eps(state.step))
        if self.instead is not None:
            state.steering += (self.alarm.cost - before) / self.batch_size
        look = self.alarm.looks[-1]
        returns = self.restore and raised and quiet and bool(self.good)
        said = {"share": look.share, "pooled": look.pooled, "threshold": self.alarm.threshold}
        log.write(
            state.step,
            {f"alarm/{name}": value for name, value in said.items() if value is not None}
            | {"alarm/raised": raised}
            | ({"alarm/restored": returns} if self.restore else {}),
        )
        if quiet and raised:
            self._speak(state, log)
        elif self.alarm.spoke_at is None:
            self.kept = {name: tensor.detach().clone() for name, tensor in judged_weights(state).items()}
            self.kept_at = state.step
        if self.restore and not raised:
            self.good = {name: tensor.detach().clone() for name, tensor in all_weights(state).items()}
        return returns

    def _restore(self, state: TrainingState, good: dict[str, Tensor] | None) -> None:
        """Take the good weights and buffers, where there are some; momentum begins at zero."""
        if good is not None:
            load_all_weights(state, good)
            state.optimizer.state.clear()

    def _speak(self, state: TrainingState, log: Log) -> None:
        """Write the weights that were kept, and tell the user."""
        path = checkpoint_path(log.run.folder, BEFORE_ALARM)
        told = ""
        if self.kept:
            write_weights(path, self.kept, self.kept_at, {"epoch": log.epoch(self.kept_at)})
            told = f"; the weights of epoch {log.epoch(self.kept_at):.3g} are kept in {path}"
            self.kept = {}
        if self.display is not None:
            self.display.say(
                f"alarm at epoch {log.epoch(state.step):.3g}: catastrophic overfitting may begin, confidence "
                f"share {self.alarm.looks[-1].pooled:.2f} below {self.alarm.threshold:g}{told}"
            )
