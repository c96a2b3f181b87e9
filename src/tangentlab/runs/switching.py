"""The controller of a run: one method throughout, or two with a switch or an alarm between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tangentlab.probes import LazySwitch
from tangentlab.runs.alarming import Alarming
from tangentlab.runs.build import (
    Examples,
    build_alarm,
    build_switch,
    eps_factor,
    learning_rate,
    method_schedule,
    trained_eps,
)
from tangentlab.runs.config import RunConfig
from tangentlab.runs.hooks import Display, Log, Remembering, timed
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
    display: Display | None = None,
) -> Controller:
    """What the configuration says; ``log`` on the first process alone.

    Raises:
        ConfigError: a setting is out of range.
    """
    own, rule = method_schedule(config, steps), config.switch.rule
    other = None if rule == "none" else method_schedule(config, steps, other=True)

    def throughout(state: TrainingState) -> Method:
        return own(state.step)

    controller: Controller = throughout
    if rule in ("fixed", "kernel"):
        assert other is not None
        controller = Switching(
            build_switch(config, examples, steps=steps, steps_per_epoch=steps_per_epoch),
            {"full": own, "cheap": other},
            learning_rate(config, steps),
            config.training.batch_size,
            log,
            fabric,
        )
    if config.alarm.every is None:
        return controller
    eps, radius = trained_eps(config), eps_factor(config, steps)
    return Alarming(
        build_alarm(config, examples),
        config.alarm.every,
        lambda step: eps * radius(step),
        controller,
        other if rule == "alarm" else None,
        config.alarm.restore,
        config.training.batch_size,
        log,
        fabric,
        display,
    )


def remembered(controller: Controller) -> dict[str, Remembering]:
    """What of a controller goes on where it was, by name."""
    if isinstance(controller, Alarming):
        return {"alarm": controller, **remembered(controller.quiet)}
    return {"switch": controller.switch} if isinstance(controller, Switching) else {}
