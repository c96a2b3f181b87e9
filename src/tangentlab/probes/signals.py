"""What others watch for catastrophic overfitting: how linear the loss is around the inputs.

The kernel's own signals are a KernelProbe's. All are taken in evaluation mode, on examples x [n, ...] in
[0, 1] with labels y [n], in a linf ball of radius eps, its uniform points clipped to the box; L_i is the
cross-entropy of example i, g_i(x) = ∂L_i/∂x.
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
    """Signals by name; the model comes back as it was. The noise is the same at every call with one seed.

    fgsm_pgd_gap         accuracy under FGSM minus under PGD in steps of eps/4 (Wong et al. 2020, section 5)
    gradient_cosine      mean of cos(g(x), g(x + η)), η uniform in the ball (Andriushchenko & Flammarion 2020,
                         equation 3); examples without a gradient are left out, 1 if all are
    linearity_error      mean of (L(x_c) − (1 − α) L(x_a) − α L(x_b))², x_a and x_b uniform in the ball, α in
                         [0, 1], x_c = (1 − α) x_a + α x_b (Abad Rocamora et al. 2024, equation 5)
    gradient_norm        mean of ‖g(x)‖₂
    input_entropy_rank, input_top_mass
                         of the Gram ⟨g_i, g_j⟩ of the gradients at unit length; the ten largest's share

    Args:
        num_steps: of PGD, from a random start.

    Raises:
        ConfigError: eps out of range.
    """
    check_eps(eps)
    noise = randomness.generator(seed, "signals", device=x.device)
    loss = partial(cross_entropies, y=y)
    with modes.evaluation(model):
        at_x = ascent(model, x, loss).gradient.flatten(1)
        moved = ascent(model, uniform_start(x, eps, noise), loss).gradient.flatten(1)
        accuracies = [
            accuracy(model, x, y, attack, generator=noise)
            for attack in (FGSM(eps), PGD(eps, eps / 4, num_steps))
        ]
        error = _linearity_error(model, x, y, eps, noise)
    there = (at_x != 0).any(dim=1) & (moved != 0).any(dim=1)
    tiny = torch.finfo(at_x.dtype).tiny
    cosines = torch.cosine_similarity(at_x[there], moved[there], dim=1, eps=tiny)
    found = {
        "fgsm_pgd_gap": accuracies[0] - accuracies[1],
        "gradient_cosine": float(cosines.mean()) if len(cosines) else 1.0,
        "linearity_error": error,
        "gradient_norm": float(at_x.norm(dim=1).mean()),
    }
    if there.any():
        directions = (at_x[there] / at_x[there].norm(dim=1, keepdim=True)).double()
        spectrum = metrics.spectrum(directions @ directions.T)
        found["input_entropy_rank"] = float(spectrum.entropy_rank)
        found["input_top_mass"] = float(spectrum.top_mass(min(TOP, len(directions))))
    return found


def _linearity_error(model: nn.Module, x: Tensor, y: Tensor, eps: float, noise: torch.Generator) -> float:
    a, b = (uniform_start(x, eps, noise) for _ in range(2))
    alpha = torch.rand(len(x), generator=noise, device=noise.device).to(x)
    mixed = a + per_example(alpha, x) * (b - a)
    with torch.no_grad():
        at_a, at_b, at_mixed = (cross_entropies(model(point), y=y) for point in (a, b, mixed))
    error = at_mixed - (1 - alpha) * at_a - alpha * at_b
    return float(error.square().mean())
