"""What a change of parameters and buffers does to the outputs to first order: J(x) Δθ + (∂f/∂s) Δs.

Products with the Jacobian and its transpose, matrix-free: no kernel is formed, and
Θ(x, X) c = ``tangent_change(model, x, pullback(model, X, c))``. The theory is in docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from tangentlab.errors import ConfigError, unknown_choice
from tangentlab.kernels.moments import WrittenOut
from tangentlab.kernels.structure import trained
from tangentlab.modes import STATISTICS, evaluation, preserved
from tangentlab.modes import batchnorm as normalized


def tangent_change(
    model: nn.Module, x: Tensor, change: Mapping[str, Tensor], *, batchnorm: str = "running"
) -> Tensor:
    """Σ_p (∂f/∂p) Δp, the first-order change of the outputs, by one forward in forward mode.

    Args:
        model: in any mode; all but BatchNorm is taken in evaluation mode. It comes back as it was.
        x: [n, ...] on the model's device.
        change: Δp by name, of parameters and, with ``batchnorm="running"``, of buffers: ∂f/∂s Δs is the part
            that the drift of the running statistics has. What is not named stays as it is.
        batchnorm: "running", or "batch": statistics of the whole x, derivative through them.

    Returns:
        [n, C], without a graph.

    Raises:
        ConfigError: an unknown name or ``batchnorm``; a buffer where batch statistics leave it unread.

    Example:
        >>> model = nn.Linear(2, 1)  # f = w·x + b
        >>> tangent_change(model, torch.tensor([[1.0, 2.0]]), {"weight": torch.tensor([[10.0, 1.0]])})
        tensor([[12.]])
    """
    if batchnorm not in STATISTICS:
        raise ConfigError(unknown_choice("batchnorm", batchnorm, STATISTICS))
    state: dict[str, Tensor] = dict(model.named_parameters())
    if batchnorm == "running":
        state |= dict(model.named_buffers())
    for name in change:
        if name not in state:
            raise ConfigError(unknown_choice("change", name, state))
    at = {name: state[name].detach() for name in change}
    along = {name: value.to(at[name]) for name, value in change.items()}

    def outputs(point: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, point, (x,))
        return found

    with (
        preserved(model),
        evaluation(model),
        normalized(model, statistics=batchnorm),
        torch.no_grad(),
        WrittenOut(),
    ):
        moved: Tensor = jvp(outputs, (at,), (along,))[1]
    return moved


def pullback(
    model: nn.Module, x: Tensor, cotangent: Tensor, *, batchnorm: str = "batch"
) -> dict[str, Tensor]:
    """J(x)ᵀ c over the parameters that require grad, by one backward: with c = ∂L/∂f the gradient of a loss.

    Args:
        model: in any mode; all but BatchNorm is taken in evaluation mode. It comes back as it was.
        x: [n, ...] on the model's device.
        cotangent: c [n, C].
        batchnorm: "batch", statistics of the whole x, derivative through them; or "running".

    Returns:
        name -> Σ_ic c_ic ∂f_c(x_i)/∂p, zero for a parameter that does not act.

    Raises:
        ConfigError: ``batchnorm`` unknown.
        KernelError: no parameter requires grad.
    """
    if batchnorm not in STATISTICS:
        raise ConfigError(unknown_choice("batchnorm", batchnorm, STATISTICS))
    parameters = trained(model)
    with (
        preserved(model),
        evaluation(model),
        normalized(model, statistics=batchnorm),
        torch.enable_grad(),
    ):
        gradients = torch.autograd.grad(
            model(x), list(parameters.values()), cotangent, allow_unused=True, materialize_grads=True
        )
    return dict(zip(parameters, gradients, strict=True))


def sgd_change(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    *,
    learning_rate: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of SGD as PyTorch makes it: b₊ = μ b + ∇L + λ θ and Δθ = −η b₊.

    Args:
        parameters: θ by name.
        gradients: ∇L by name.
        momenta: b by name; empty before the first step.
        learning_rate: η.
        momentum: μ, in [0, 1).
        weight_decay: λ, at least 0.

    Returns:
        Δθ and b₊ by name.
    """
    after = {}
    for name, gradient in gradients.items():
        after[name] = gradient + weight_decay * parameters[name].detach()
        if name in momenta:
            after[name] = after[name] + momentum * momenta[name]
    return {name: -learning_rate * b for name, b in after.items()}, after
