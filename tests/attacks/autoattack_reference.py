"""A small adversarially trained network, digits, and which of them the authors' AutoAttack leaves robust.

``reference.npz`` is written by ``make_reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tangentlab.attacks import Attack
from tangentlab.models.small_cnn import SmallCNN
from tangentlab.randomness import generator

PATH = Path(__file__).with_name("reference.npz")
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square", "standard")


def network() -> nn.Module:
    return SmallCNN((1, 8, 8), 10, widths=(8, 16), strides=(1, 2), hidden=0)


@dataclass(frozen=True)
class Reference:
    """Inputs [n, 1, 8, 8], labels, radii, and ``masks[norm, attack]``, [seeds, n], True for robust."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    eps: dict[str, float]
    masks: dict[tuple[str, str], torch.Tensor]

    @classmethod
    def load(cls) -> Reference:
        with np.load(PATH) as file:
            stored = {name: torch.from_numpy(file[name]) for name in file.files}
        model = network()
        model.load_state_dict(
            {name.removeprefix("model/"): v for name, v in stored.items() if name.startswith("model/")}
        )
        masks = {(norm, attack): stored[f"{norm}/{attack}"] for norm in ("linf", "l2") for attack in ATTACKS}
        eps = {norm: float(stored[f"eps/{norm}"]) for norm in ("linf", "l2")}
        return cls(model.eval(), stored["x"].float() / 16, stored["y"].long(), eps, masks)

    def survivors(self, attack: Attack, n: int, seed: int = 0) -> torch.Tensor:
        """Which of the first n points are classified correctly after the attack."""
        x, y = self.x[:n], self.y[:n]
        x_adv = attack(self.model, x, y, generator=generator(seed, "attack"))
        with torch.no_grad():
            clean, attacked = (self.model(z).argmax(dim=1) == y for z in (x, x_adv))
        return clean & attacked

    def robust(self, attack: Attack, n: int) -> int:
        return int(self.survivors(attack, n).sum())
