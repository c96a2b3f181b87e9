"""Signals of catastrophic overfitting: what others watch, and what a step on FGSM inputs does to PGD's loss.

The spectrum's and the kernel distances are a KernelProbe's. All are taken in evaluation mode, on examples
x [n, ...] in [0, 1] with labels y [n], in a linf ball of radius eps, its uniform points clipped to the box;
L_i is the cross-entropy of example i, g_i(x) = ∂L_i/∂x. The noise is the same at every call with one seed,
and the model comes back as it was. ConfigError is raised where eps is out of range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tangentlab import metrics, modes, randomness
from tangentlab.attacks import FGSM, PGD
from tangentlab.attacks.threat import (
    NaNWatch,
    ascent,
    check_eps,
    crafting,
    cross_entropies,
    per_example,
    project,
    uniform_start,
)
from tangentlab.errors import KernelError
from tangentlab.probes.accuracy import accuracy

TOP = 10


class SignedSum(nn.Module):
    """Σ_c v_c f_c(x) as the one output of ``model``, with signs v drawn once of the seed, as many of either.

    Its kernel vᵀΘv costs one backward pass and is C times the trace kernel in the mean over independent
    signs. Balanced ones leave the logits' sum out, which no softmax sees.
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.model, self.seed = model, seed

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        count = logits.shape[1]
        order = torch.randperm(count, generator=randomness.generator(self.seed, "signs"))
        signs = torch.where(order < count // 2, 1.0, -1.0).to(logits)
        return logits @ signs[:, None]


def linearity_signals(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, num_steps: int = 10, seed: int = 0
) -> dict[str, float]:
    """fgsm_pgd_gap, linearity_error and the gradient signals, by name.

    Args:
        num_steps: of PGD.
    """
    return {
        "fgsm_pgd_gap": fgsm_pgd_gap(model, x, y, eps=eps, num_steps=num_steps, seed=seed),
        "linearity_error": linearity_error(model, x, y, eps=eps, seed=seed),
        **gradient_signals(model, x, y, eps=eps, seed=seed),
    }


def fgsm_pgd_gap(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, num_steps: int = 10, seed: int = 0
) -> float:
    """Accuracy under FGSM minus under PGD (Wong et al. 2020, section 5), 2·num_steps + 4 passes an example.

    Args:
        num_steps: of PGD from a random start, of eps/4 or, of few, 1.25·eps/num_steps.
    """
    check_eps(eps)
    noise = randomness.generator(seed, "gap", device=x.device)
    pgd = PGD(eps, max(eps / 4, 1.25 * eps / num_steps), num_steps)
    of_fgsm, of_pgd = (accuracy(model, x, y, attack, generator=noise) for attack in (FGSM(eps), pgd))
    return of_fgsm - of_pgd


def gradient_signals(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, seed: int = 0
) -> dict[str, float]:
    """Signals of the input gradients by name, two passes an example and for the cosine four.

    gradient_cosine      mean of cos(g(x), g(x + η)), η uniform in the ball (Andriushchenko & Flammarion 2020,
                         equation 3); examples without a gradient are left out, 1 if all are
    gradient_norm        mean of ‖g(x)‖₂
    input_entropy_rank, input_top_mass
                         of the Gram ⟨g_i, g_j⟩ of the gradients at unit length; the ten largest's share
    """
    check_eps(eps)
    noise = randomness.generator(seed, "cosine", device=x.device)
    loss = partial(cross_entropies, y=y)
    with modes.evaluation(model):
        at_x = ascent(model, x, loss).gradient.flatten(1)
        moved = ascent(model, uniform_start(x, eps, noise), loss).gradient.flatten(1)
    there = (at_x != 0).any(dim=1) & (moved != 0).any(dim=1)
    tiny = torch.finfo(at_x.dtype).tiny
    cosines = torch.cosine_similarity(at_x[there], moved[there], dim=1, eps=tiny)
    found = {
        "gradient_cosine": float(cosines.mean()) if len(cosines) else 1.0,
        "gradient_norm": float(at_x.norm(dim=1).mean()),
    }
    if there.any():
        directions = (at_x[there] / at_x[there].norm(dim=1, keepdim=True)).double()
        spectrum = metrics.spectrum(directions @ directions.T)
        found["input_entropy_rank"] = float(spectrum.entropy_rank)
        found["input_top_mass"] = float(spectrum.top_mass(min(TOP, len(directions))))
    return found


def linearity_error(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, seed: int = 0) -> float:
    """Mean of (L(x_c) − (1 − α) L(x_a) − α L(x_b))², x_a and x_b uniform in the ball, α in [0, 1],
    x_c = (1 − α) x_a + α x_b (Abad Rocamora et al. 2024, equation 5): three passes an example."""
    check_eps(eps)
    noise = randomness.generator(seed, "linearity", device=x.device)
    a, b = (uniform_start(x, eps, noise) for _ in range(2))
    alpha = torch.rand(len(x), generator=noise, device=noise.device).to(x)
    mixed = a + per_example(alpha, x) * (b - a)
    with modes.evaluation(model), torch.no_grad():
        at_a, at_b, at_mixed = (cross_entropies(model(point), y=y) for point in (a, b, mixed))
    error = at_mixed - (1 - alpha) * at_a - alpha * at_b
    return float(error.square().mean())


def one_and_two_steps(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """FGSM's inputs, and PGD's in two steps of eps/2 from x: four passes an example, for both begin with the
    gradient at x."""
    check_eps(eps)
    watch = NaNWatch()
    with crafting(model, x, y) as (x, y):
        loss = partial(cross_entropies, y=y)
        first = watch.see(ascent(model, x, loss).gradient).sign()
        halfway = project(x + eps / 2 * first, x, eps)
        second = watch.see(ascent(model, halfway, loss).gradient).sign()
        one, two = project(x + eps * first, x, eps), project(halfway + eps / 2 * second, x, eps)
    watch.refuse()
    return one, two


def right_confidences(model: nn.Module, one_step: Tensor, several: Tensor, y: Tensor) -> tuple[float, float]:
    """Σ_i softmax(f(x_i))_{y_i} over ``one_step`` [n, ...] and over ``several`` [n, ...], in float64: the
    expected number that a label drawn by the network's softmax gets right. Two passes an example.

    Raises:
        NaNGradientError: a logit is NaN.
    """
    watch = NaNWatch()
    with modes.evaluation(model), torch.no_grad():
        logits = model(torch.cat([one_step, several])).double()
        right = watch.see(cross_entropies(logits, y=torch.cat([y, y]))).neg().exp()
    watch.refuse()
    of_one, of_several = right.split(len(y))
    return float(of_one.sum()), float(of_several.sum())


def update_signals(model: nn.Module, one_step: Tensor, several: Tensor, y: Tensor) -> dict[str, float]:
    """What training on one-step inputs x_F [n, ...] does, to first order, to the loss L_P on x_P [n, ...].

    With g = ∂L/∂θ of the mean loss on either: a small step along −g_F lowers L_P by ⟨g_F, g_P⟩ times its
    size, one along −g_P by ‖g_P‖². In the kernel's words ⟨g_F, g_P⟩ = r_Fᵀ Θ(x_F, x_P) r_P with r = ∂L/∂f.
    Those that crafted the inputs not counted, ten passes an example.

    update_share         ⟨g_F, g_P⟩ / ‖g_P‖²: of the fall that training on x_P would buy, what x_F's does
    update_cosine        ⟨g_F, g_P⟩ / (‖g_F‖ ‖g_P‖)
    kernel_share         r_Pᵀ Θ(x_F, x_P) r_P / ‖g_P‖²: the share if the losses' derivatives on x_F were those
                         on x_P, what the kernel alone leaves of it
    derivative_share     r_Fᵀ Θ(x_P, x_P) r_P / ‖g_P‖²: the share if the kernel between the inputs were that
                         on x_P, what the derivatives alone leave

    {} where a gradient vanishes. Raises KernelError as :func:`update_products`.
    """
    parameters = _trained(model)
    with modes.evaluation(model), torch.enable_grad():
        at_one, at_several = model(one_step), model(several)
        r_one, r_several = (_derivatives(logits, y) for logits in (at_one, at_several))
        of_one, by_kernel = (_pulled_back(at_one, r, parameters) for r in (r_one, r_several))
        by_derivatives, of_several = (_pulled_back(at_several, r, parameters) for r in (r_one, r_several))
    inner, square = float(of_one @ of_several), float(of_several @ of_several)
    if not of_one.any() or not square:
        return {}
    return {
        "update_share": inner / square,
        "update_cosine": inner / (float(of_one.norm()) * math.sqrt(square)),
        "kernel_share": float(by_kernel @ of_several) / square,
        "derivative_share": float(by_derivatives @ of_several) / square,
    }


def update_products(model: nn.Module, one_step: Tensor, several: Tensor, y: Tensor) -> tuple[float, float]:
    """⟨g_F, g_P⟩ and ‖g_P‖², as :func:`update_signals` has them, in six passes an example.

    Raises:
        KernelError: no parameter requires a gradient.
    """
    parameters = _trained(model)
    with modes.evaluation(model), torch.enable_grad():
        of_one, of_several = (
            _pulled_back(logits, _derivatives(logits, y), parameters)
            for logits in (model(one_step), model(several))
        )
    return float(of_one @ of_several), float(of_several @ of_several)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise KernelError("no parameter of the model requires a gradient: a step would change nothing")
    return found


def _derivatives(logits: Tensor, y: Tensor) -> Tensor:
    """r = ∂L/∂f [n, C] of the mean cross-entropy."""
    leaf = logits.detach().requires_grad_(True)
    (found,) = torch.autograd.grad(cross_entropies(leaf, y=y).mean(), leaf)
    return found


def _pulled_back(logits: Tensor, r: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """J(x)ᵀ r [P] in float64; the graph stays."""
    found = torch.autograd.grad(
        logits, parameters, r, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([part.flatten() for part in found]).double()
