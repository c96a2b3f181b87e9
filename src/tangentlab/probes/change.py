"""What training did to a network's outputs, beside what the tangent at its start says.

On inputs x: f₊(x) − f(x) ≈ J(x) Δθ + (∂f/∂s) Δs, f₊ the network afterwards, s BatchNorm's buffers. On
adversarial inputs, x* crafted from f and x*₊ from f₊, the change is the sum of two brackets exactly:

    f₊(x*₊) − f(x*) = [f₊(x*) − f(x*)] + [f₊(x*₊) − f₊(x*)].

The tangent, and with it the kernel, speaks of the first alone (docs/theory.md).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab import modes, randomness
from tangentlab.attacks import Attack
from tangentlab.kernels import tangent_change


@dataclass(frozen=True)
class OutputChange:
    """On n inputs, [n, C] each.

    The tangent predicts ``parameters + buffers``. A step moves the buffers by a share of their own and not by
    its learning rate's; taken first and in full they leave a change of the parameters alone, which
    ``drift + parameters_after`` predicts. With batch statistics the buffers act on nothing.

    Attributes:
        actual: f(x; θ₊, s₊) − f(x; θ, s).
        parameters: J(x; θ, s) Δθ.
        buffers: (∂f/∂s) Δs at θ, s.
        drift: f(x; θ, s₊) − f(x; θ, s).
        parameters_after: J(x; θ, s₊) Δθ.
    """

    actual: Tensor
    parameters: Tensor
    buffers: Tensor
    drift: Tensor
    parameters_after: Tensor


@dataclass(frozen=True)
class AdversarialChange:
    """On adversarial inputs.

    Attributes:
        network: the first bracket, on the x* of before.
        jump: the second, the perturbation's own: f₊(x*₊) − f₊(x*), [n, C].
        x_before, x_after: x* and x*₊ [n, ...].
    """

    network: OutputChange
    jump: Tensor
    x_before: Tensor
    x_after: Tensor


def output_change(
    before: nn.Module, after: nn.Module, x: Tensor, *, batchnorm: str = "running"
) -> OutputChange:
    """The change from ``before`` to ``after``, two states of one network, at x [n, ...].

    All but BatchNorm is taken in evaluation mode; BatchNorm uses running statistics, or those of the batch x.

    Raises:
        ConfigError: ``batchnorm`` unknown.
    """
    moved = _difference(dict(before.named_parameters()), dict(after.named_parameters()))
    parameters = tangent_change(before, x, moved, batchnorm=batchnorm)
    first = _outputs(before, x, batchnorm)
    actual = _outputs(after, x, batchnorm) - first
    drifted = _difference(dict(before.named_buffers()), dict(after.named_buffers()))
    if batchnorm == "batch" or not drifted:
        none = torch.zeros_like(parameters)
        return OutputChange(actual, parameters, none, none, parameters)
    settled = drift_only(before, after)
    return OutputChange(
        actual,
        parameters,
        buffers=tangent_change(before, x, drifted),
        drift=_outputs(settled, x, batchnorm) - first,
        parameters_after=tangent_change(settled, x, moved),
    )


def drift_only(before: nn.Module, after: nn.Module) -> nn.Module:
    """A copy with the parameters of ``before`` and the buffers of ``after``."""
    settled = copy.deepcopy(before)
    settled.load_state_dict({**before.state_dict(), **dict(after.named_buffers())})
    return settled


def adversarial_change(
    before: nn.Module, after: nn.Module, x: Tensor, y: Tensor, attack: Attack, *, seed: int = 0
) -> AdversarialChange:
    """The change on adversarial inputs, crafted in evaluation mode with the same noise before and after."""

    def crafted(model: nn.Module) -> Tensor:
        with modes.evaluation(model):
            return attack(model, x, y, generator=randomness.generator(seed, "change", device=x.device))

    x_before, x_after = crafted(before), crafted(after)
    jump = _outputs(after, x_after, "running") - _outputs(after, x_before, "running")
    return AdversarialChange(output_change(before, after, x_before), jump, x_before, x_after)


def _difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what is differentiable: not of the count of batches."""
    return {
        name: after[name].detach() - value.detach()
        for name, value in before.items()
        if value.is_floating_point()
    }


def _outputs(model: nn.Module, x: Tensor, batchnorm: str) -> Tensor:
    with modes.evaluation(model), modes.batchnorm(model, statistics=batchnorm), torch.no_grad():
        found: Tensor = model(x)
    return found
