"""A few steps of a run's training again, from weights that it kept, and what each loss was taken of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError
from tangentlab.runs.build import (
    Examples,
    build_batches,
    build_state,
    learning_rate,
    method_schedule,
    steps_per_epoch,
    training_batch,
)
from tangentlab.runs.config import RunConfig
from tangentlab.runs.parsing import build_method
from tangentlab.training import Step, TrainingState, train


@dataclass
class LossTerm:
    """A forward that a step's loss was taken of; TRADES has two, of the clean and of the crafted batch.

    Attributes:
        x: the batch [n, ...].
        cotangent: ∂L/∂f(x) [n, C].
    """

    x: Tensor
    cotangent: Tensor


@dataclass
class Repeated:
    """A step that was made again.

    Attributes:
        learning_rate: of the step.
        terms: what its loss was taken of, in order of the forwards.
    """

    learning_rate: float
    terms: list[LossTerm]


def total_steps(config: RunConfig, examples: Examples) -> int:
    """Optimizer updates of the whole run."""
    batches = build_batches(config, examples, torch.device("cpu"))
    return config.training.epochs * steps_per_epoch(config, batches)


def train_again(
    config: RunConfig, examples: Examples, model: nn.Module, *, step: int, steps: int
) -> list[Repeated]:
    """Make ``steps`` updates of the run from ``model``, its weights and buffers at ``step``, in place.

    Batches, crafting, learning rate and order are the run's. Momentum begins at zero, for kept weights come
    without it, and so does what a method remembers. Beyond the run's last step its learning rate stays.

    Raises:
        ConfigError: a run with a switch: its decisions are not made again.
    """
    if config.switch.rule != "none":
        raise ConfigError(f"switch.rule={config.switch.rule!r}: a run with a switch cannot be repeated")
    device = next(model.parameters()).device
    total = total_steps(config, examples)
    batches, replays = build_batches(config, examples, device), build_method(config).replays
    rate, method = learning_rate(config, total), method_schedule(config, total)
    state = build_state(config, model)
    state.step = step
    done: list[Repeated] = []

    def begin(state: TrainingState) -> Any:
        at = min(state.step, total - 1)
        done.append(Repeated(rate(at), []))
        return method(at)

    with _recorded(model, lambda term: done[-1].terms.append(term)):
        train(
            state,
            controller=begin,
            batch=lambda at: training_batch(batches, at // replays, len(examples.train)),
            learning_rate=lambda at: rate(min(at, total - 1)),
            steps=step + steps,
            seed=config.seed,
            make=Step(trained=model, autocast=nullcontext, backward=torch.Tensor.backward),
        )
    return done


@contextmanager
def _recorded(model: nn.Module, keep: Callable[[LossTerm], None]) -> Iterator[None]:
    """Hand on every forward that the loss is taken of; its cotangent comes with the backward."""

    def forward(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # An attack's forwards have no graph, or one to their input.
        if output.requires_grad and not args[0].requires_grad:
            term = LossTerm(args[0].detach().clone(), torch.zeros_like(output))
            output.register_hook(lambda cotangent: _put(term.cotangent, cotangent))
            keep(term)

    handle = model.register_forward_hook(forward)
    try:
        yield
    finally:
        handle.remove()


def _put(into: Tensor, value: Tensor) -> None:
    # Nothing is returned: what a hook returns takes the gradient's place.
    into.copy_(value)
