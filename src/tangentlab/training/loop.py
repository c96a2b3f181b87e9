"""The training loop: one optimizer update after another, hooks after each, nothing else.

It knows no probe, no folder and no progress display: those are hooks. Everything a step depends on is in
:class:`TrainingState` or derived from (seed, step), so a state that is saved and loaded goes on as if it had
never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tangentlab import randomness
from tangentlab.attacks import NaNGradientError, Passes
from tangentlab.attacks.threat import nan_collected
from tangentlab.errors import DivergedError
from tangentlab.training.method import Batch, Memory, Method, Network


@dataclass
class TrainingState:
    """What training carries from step to step.

    Args:
        model: the bare module.
        optimizer: over the model's parameters.
        step: optimizer updates so far.
        passes: per training example of the batches so far: a PGD-10 step adds 11, 10, 1.
        steering: forward equivalents per training example of a batch that the controller spent.
        summed_learning_rate: Σ of the learning rates of the steps so far.
        loss_sum: Σ of the batch losses since the caller last reset it, on the device; with ``loss_count``.
        seconds: wall seconds by purpose ("train", "steering", "probe", "evaluation").
        memory: what the method keeps.
        averaged: the exponential moving average of the weights and buffers, where one is kept.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    passes: Passes = field(default_factory=Passes)
    steering: float = 0.0
    summed_learning_rate: float = 0.0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    loss_count: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"train": 0.0, "steering": 0.0, "probe": 0.0, "evaluation": 0.0}
    )
    memory: Memory = field(default_factory=Memory)
    averaged: AveragedModel | None = None

    @property
    def cost(self) -> float:
        """Forward equivalents per training example of the batches so far, those that steer included."""
        return self.passes.cost + self.steering

    @property
    def evaluated(self) -> nn.Module:
        """The network that is judged: the averaged one where there is one."""
        return self.model if self.averaged is None else self.averaged.module

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])


class StepHook(Protocol):
    """Called after every step, and once before the first; it may read the state and leave no trace on it."""

    def __call__(self, state: TrainingState) -> None: ...


class Controller(Protocol):
    """Says before each step which method makes it, on every process the same.

    It may look at the state, and leaves no trace on it but what the look cost, in ``steering``, unless it
    takes training back to earlier weights.
    """

    def __call__(self, state: TrainingState) -> Method: ...


@dataclass(frozen=True)
class Step:
    """How one update is made on the devices at hand.

    Args:
        trained: the module that the loss goes through: the bare one, or a wrapper around it.
        autocast: the precision's context.
        backward: from the loss to the gradients.
        agree: after the update, averages the batch's loss and the buffers over the processes.
    """

    trained: nn.Module
    autocast: Callable[[], AbstractContextManager[object]]
    backward: Callable[[Tensor], object]
    agree: Callable[[Tensor, nn.Module], Tensor] = lambda loss, _: loss


def train(
    state: TrainingState,
    *,
    controller: Controller,
    batch: Callable[[int], Batch],
    learning_rate: Callable[[int], float],
    steps: int,
    seed: int,
    make: Step,
    hooks: Sequence[StepHook] = (),
) -> None:
    """Train until ``state.step == steps``.

    Args:
        state: where training stands; changed in place.
        controller: says what turns the batch into the loss.
        batch: step -> the batch, or this process's share of it.
        learning_rate: step -> learning rate of that update.
        steps: optimizer updates in all.
        seed: the method's draws come from the stream (seed, "method", step).
        make: how an update is made.
        hooks: called in order after every step, and before the first where training begins.

    Raises:
        DivergedError: a loss is not finite; the message names the step.
    """
    network = Network(bare=state.model, trained=make.trained)
    device = state.loss_sum.device
    if state.step == 0:
        _call(hooks, state)
    while state.step < steps:
        with _diverging(state):
            current = controller(state)
        started = time.perf_counter()
        drawn = batch(state.step)
        rate = learning_rate(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        share = drawn.share
        part = (share.rank, share.world_size)
        draws = randomness.generator(seed, "method", state.step, device=device, part=part)
        state.model.train()
        state.optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), make.autocast():
            # Dropout and its like draw from the global generator: theirs is a stream too.
            torch.manual_seed(randomness.derive_seed(seed, "layers", state.step, share.rank))
            with _diverging(state), _patient(device) as nan:
                loss = current.loss(network, drawn, memory=state.memory, generator=draws)
        make.backward(loss)
        state.optimizer.step()
        with make.autocast():
            current.finish(network, drawn)
        state.memory.exchange()
        value = loss.detach()
        for seen in nan:
            value = value.masked_fill(seen, torch.nan)
        state.loss_sum += make.agree(value, state.model)
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        state.step += 1
        state.loss_count += 1
        state.summed_learning_rate += rate
        state.passes = state.passes.plus(current.passes)
        # On the CPU the look is free; elsewhere it would wait for the device at every step, and the callers
        # of check_finite, before anything is saved, do it.
        if device.type == "cpu":
            check_finite(state)
        state.seconds["train"] += time.perf_counter() - started
        _call(hooks, state)


def check_finite(state: TrainingState) -> None:
    """Raise DivergedError unless the summed loss is finite; off the CPU it is looked at now and then."""
    if not torch.isfinite(state.loss_sum):
        when = "at" if state.loss_sum.device.type == "cpu" else "by"
        raise DivergedError(f"the loss is {state.loss_sum.item()} {when} step {state.step}; training stops")


def check_parameters(state: TrainingState) -> None:
    """Raise DivergedError unless every parameter is finite; for use before a good checkpoint is replaced."""
    check_finite(state)
    for name, parameter in state.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise DivergedError(f"parameter {name} is not finite at step {state.step}; training stops")


def _call(hooks: Sequence[StepHook], state: TrainingState) -> None:
    for hook in hooks:
        with _diverging(state):
            hook(state)


def _patient(device: torch.device) -> AbstractContextManager[Sequence[Tensor]]:
    """Off the CPU an attack's NaN makes the loss one, to be found when the loss is looked at."""
    return nullcontext(()) if device.type == "cpu" else nan_collected()


@contextmanager
def _diverging(state: TrainingState) -> Iterator[None]:
    """An attack's NaN is training's own."""
    try:
        yield
    except NaNGradientError as error:
        raise DivergedError(f"{error}, at step {state.step}; training stops") from error
