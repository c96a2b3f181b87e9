"""What others watch for catastrophic overfitting: how linear the loss is around the inputs.

The kernel's own signals are a KernelProbe's. All are taken in evaluation mode, on examples x [n, ...] in
[0, 1] with labels y [n], in a linf ball of radius eps, its uniform points clipped to the box; L_i is the
cross-entropy of example i, g_i(x) = ∂L_i/∂x. The noise is the same at every call with one seed, and the model
comes back as it was. Each raises ConfigError where eps is out of range.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tangentlab import metrics, modes, randomness
from tangentlab.attacks import FGSM, PGD
from tangentlab.attacks.threat import ascent, check_eps, cross_entropies, per_example, uniform_start
from tangentlab.probes.accuracy import accuracy

TOP = 10


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
