"""Training with the kernel that a network has, standing still: SGD on a linearised network."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from tangentlab import randomness
from tangentlab.attacks import Attack
from tangentlab.data import Augmentation, Batches, Split
from tangentlab.kernels import Linearized
from tangentlab.training.schedules import cosine

MOMENTUM = 0.9


def train_frozen(
    network: Linearized,
    split: Split,
    *,
    attack: Attack | None = None,
    steps: int,
    batch_size: int,
    peak: float,
    seed: int,
) -> float:
    """Minimise the mean cross-entropy over δ, in place: momentum SGD, a rate that falls along half a cosine.

    Returns the mean loss of the last tenth of the batches, each before its step.

    Args:
        network: its δ begins where it is.
        split: what is trained on, not augmented.
        attack: crafts each batch from the linearised network as it stands; None for clean batches.
        steps: of SGD.
        batch_size: examples a step.
        peak: the rate at first. The loss's curvature is at most half of the kernel's top eigenvalue over its
            number of examples, and momentum steps are stable up to 3.8 over it.
        seed: of the batches and of the attack's noise.
    """
    device = next(network.parameters()).device
    batches = Batches(split, batch_size=batch_size, seed=seed, augmentation=Augmentation(), device=device)
    optimizer = torch.optim.SGD(network.delta.parameters(), lr=peak, momentum=MOMENTUM)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * cosine(step / steps)
        x, y, _ = batches.batch(step)
        if attack is not None:
            x = attack(network, x, y, generator=randomness.generator(seed, "frozen", step, device=device))
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-math.ceil(steps / 10) :]).mean())
