"""The controller of a run: one method throughout, or two with a switch between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tangentlab.probes import LazySwitch
from tangentlab.runs.build import (
    Examples,
    build_switch,
    learning_rate,
    method_schedule,
)
from tangentlab.runs.config import RunConfig
from tangentlab.runs.hooks import Log, timed
from tangentlab.training import Controller, Method, TrainingState, check_parameters


@dataclass
class Switching:
    """A Controller: the phase's method; each look and its evidence go to the log, its cost to the state.

    Of several processes the first looks and tells the others.
    """

    switch: LazySwitch
    methods: dict[str, Callable[[int], Method]]
    learning_rate: Callable[[int], float]
    batch_size: int
    log: Log | None
    fabric: Any
    phase: str | None = None

    def __call__(self, state: TrainingState) -> Method:
        if self.log is not None:
            self._look(state, self.log)
        if self.phase is None or self.switch.due(state.step):
            self.phase = str(self.fabric.broadcast(self.switch.phase))
        return self.methods[self.phase](state.step)

    def _look(self, state: TrainingState, log: Log) -> None:
        step, before, seen = state.step, self.switch.cost, len(self.switch.looks)
        if self.switch.due(step):
            check_parameters(state)
        with timed(state, "steering"):
            self.switch(state.model, step, learning_rate=self.learning_rate(step))
        state.steering += (self.switch.cost - before) / self.batch_size
        for look in self.switch.looks[seen:]:
            values = {name: value for name, value in look.values.items() if name != "learning_rate"}
            said = {"phase": look.phase, **values, "reason": look.reason, "error": look.error}
            log.write(step, {f"switch/{name}": value for name, value in said.items() if value is not None})


def build_controller(
    config: RunConfig,
    examples: Examples,
    *,
    steps: int,
    steps_per_epoch: int,
    log: Log | None,
    fabric: Any,
) -> Controller:
    """What the configuration says; ``log`` on the first process alone.

    Raises:
        ConfigError: a setting is out of range.
    """
    full = method_schedule(config, steps)
    if config.switch.rule == "none":
        return lambda state: full(state.step)
    return Switching(
        build_switch(config, examples, steps_per_epoch),
        {"full": full, "cheap": method_schedule(config, steps, cheaper=True)},
        learning_rate(config, steps),
        config.training.batch_size,
        log,
        fabric,
    )
