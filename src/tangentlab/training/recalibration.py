"""BatchNorm's running statistics set anew, for clean inputs, crafted ones or both; nothing else moves.

A network that was trained on crafted inputs normalizes clean ones with the crafted ones' statistics, and the
other way round. The statistics can be chosen after training, at the cost of a few forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tangentlab import modes
from tangentlab.attacks import Attack
from tangentlab.errors import ConfigError, ModelError, unknown_choice

CORRECTIONS = {"biased": 0, "unbiased": 1}
"""variance -> c of Σ(a − μ)²/(m − c)."""

Statistics = dict[_BatchNorm, tuple[Tensor, Tensor]]  # of each layer: mean and variance, [channels]


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    inputs: Attack | Sequence[Attack | None] | None = None,
    variance: str = "unbiased",
    momentum: float | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Set the running mean and variance of every BatchNorm layer that the forward reaches.

    Of the values a_1 … a_m that a channel takes over all inputs and places, with c = 0 (biased) or 1
    (unbiased):

        μ = Σ a_i / m,    σ² = Σ (a_i − μ)² / (m − c).

    momentum=None: exactly these, m over the whole loader. Layer by layer: the layers before are normalized
    by their own new statistics, so that the result is what the evaluated network sees; with
    variance="biased" it normalizes the whole set as one batch in training mode would. Neither the loader's
    order nor, but for rounding, its batch size matters.

    momentum=ρ: the average of the batches' μ and σ², m over a batch, with the weights (1 − ρ)^(T − t) of
    batch t of T, the layers before normalized by their own batch's mean and biased variance, as training
    does. With ρ = 0 it is the plain average of ``torch.optim.swa_utils.update_bn``; with PyTorch's 0.1 what
    training's buffers hold after these batches, their start forgotten. The average of small batches' biased
    variances is too small, by (m − 1)/m for independent values.

    All other layers are in evaluation mode. Inputs are crafted once, from the evaluated network as it comes,
    before any of its statistics move.

    Clean statistics can cost a network its robust accuracy (docs/training.md): evaluate it again.

    Args:
        model: any module; left as it was, submodule by submodule, but for ``running_mean`` and
            ``running_var``; on an error for these too.
        loader: batches (x, y, ...), or x where nothing is crafted. Its inputs are held on the model's device.
        inputs: None for the clean inputs, an attack for what it makes of them, or several of these for their
            union: ``(None, attack)`` is the mixture of equal parts, with ρ batch after batch in turns.
        variance: "biased" or "unbiased" (PyTorch's buffers).
        momentum: None, or ρ in [0, 1].
        generator: for the attack's noise.

    Raises:
        ConfigError: a setting out of range, no input, or too few values for a variance.
        ModelError: no BatchNorm is reached, one keeps no running statistics, or, with momentum=None, one is
            applied more than once in a forward: then there is no order of layers.

    >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Identity())
    >>> recalibrate(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
    >>> model[0].running_mean, model[0].running_var
    (tensor([3.]), tensor([7.]))
    """
    if variance not in CORRECTIONS:
        raise ConfigError(unknown_choice("variance", variance, CORRECTIONS))
    if momentum is not None and not 0 <= momentum <= 1:
        raise ConfigError(f"momentum={momentum} is out of range [0, 1]; None for the whole population")
    names = _names(model)
    kinds = inputs if isinstance(inputs, Sequence) else (inputs,)
    correction = CORRECTIONS[variance]
    with modes.preserved(model), modes.evaluation(model), torch.no_grad():
        batches = list(_gathered(model, loader, kinds, generator))
        if not batches:
            raise ConfigError("there is no input to take statistics of")
        found = (
            _population(model, names, batches, correction)
            if momentum is None
            else _averages(model, names, batches, correction, momentum)
        )
    if not found:
        raise ModelError(f"the forward of {type(model).__name__} reaches no BatchNorm layer")
    with torch.no_grad():
        for layer, (mean, var) in found.items():
            layer.running_mean.copy_(mean)  # type: ignore[union-attr]
            layer.running_var.copy_(var)  # type: ignore[union-attr]


def _names(model: nn.Module) -> dict[_BatchNorm, str]:
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    for layer, name in names.items():
        if layer.running_mean is None:
            raise ModelError(f"BatchNorm {name!r} keeps no running statistics: there are none to set")
    return names


def _gathered(
    model: nn.Module,
    loader: Iterable[Any],
    kinds: Sequence[Attack | None],
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Every batch in every kind."""
    of_model = next(chain(model.parameters(), model.buffers()))
    for batch in loader:
        x, y = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
        x = x.to(of_model.device)
        for attack in kinds:
            if attack is None:
                yield x
            elif y is None:
                raise ConfigError("crafting needs labels; the loader gives inputs alone")
            else:
                yield attack(model, x, y.to(of_model.device), generator=generator)


def _population(
    model: nn.Module, names: dict[_BatchNorm, str], batches: Sequence[Tensor], correction: int
) -> Statistics:
    order: list[_BatchNorm] = []
    with _watched(names, lambda layer, _: order.append(layer)):
        model(batches[0])
    for layer in order:
        if order.count(layer) > 1:
            raise ModelError(
                f"BatchNorm {names[layer]!r} is applied {order.count(layer)} times in a forward: its inputs "
                "depend on its own statistics; give a momentum"
            )
    found: Statistics = {}
    for layer in order:
        pool = _Pool()

        def add(_: _BatchNorm, values: Tensor, pool: _Pool = pool) -> None:
            pool.add(values)
            raise _ReachedError  # what comes after this layer is of no interest

        with _watched([layer], add):
            for x in batches:
                try:
                    model(x)
                except _ReachedError:
                    continue
        _check_count(pool.count, 1 + correction, names[layer])
        found[layer] = pool.mean, pool.squares / (pool.count - correction)
        # The layers that follow see these; the caller's context puts the old ones back.
        layer.running_mean.copy_(found[layer][0])  # type: ignore[union-attr]
        layer.running_var.copy_(found[layer][1])  # type: ignore[union-attr]
    return found


def _averages(
    model: nn.Module,
    names: dict[_BatchNorm, str],
    batches: Sequence[Tensor],
    correction: int,
    momentum: float,
) -> Statistics:
    found: Statistics = {}
    weights = dict.fromkeys(names, 0.0)

    def add(layer: _BatchNorm, values: Tensor) -> None:
        _check_count(values.shape[1], 2, names[layer])
        var, mean = torch.var_mean(values, dim=1, correction=correction)
        weights[layer] = (1 - momentum) * weights[layer] + 1
        old_mean, old_var = found.get(layer, (mean, var))
        share = 1 / weights[layer]
        found[layer] = old_mean + share * (mean - old_mean), old_var + share * (var - old_var)

    with modes.batchnorm(model, statistics="batch"), _watched(names, add):
        for x in batches:
            model(x)
    return found


class _ReachedError(BaseException):
    """Ends a forward at the layer of interest; no model's ``except Exception`` holds it up."""


class _Pool:
    """Count, mean and summed squared deviations of values that come in parts (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """``values`` [channels, m]."""
        m = values.shape[1]
        var, mean = torch.var_mean(values, dim=1, correction=0)
        total = self.count + m
        shift = mean - self.mean
        self.squares = self.squares + m * var + shift.square() * (self.count * m / total)
        self.mean = self.mean + shift * (m / total)
        self.count = total


@contextmanager
def _watched(layers: Iterable[_BatchNorm], see: Callable[[_BatchNorm, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with each of the layers that is about to run and its inputs, float64 [channels, m]."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        see(layer, x.transpose(0, 1).flatten(1).double())  # type: ignore[arg-type]

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _check_count(count: int, least: int, name: str) -> None:
    if count < least:
        raise ConfigError(f"BatchNorm {name!r} sees {count} value(s) a channel; a variance takes {least}")
