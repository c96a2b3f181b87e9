"""Attacks: frozen settings, called as ``attack(model, x, y, generator=g)``, inputs in [0, 1].

An attack is a library of its own: it takes any nn.Module with logits [n, C] and knows nothing of training.
"""

from tangentlab.attacks.apgd import APGD
from tangentlab.attacks.autoattack import AutoAttack, Evaluation, Flag
from tangentlab.attacks.fab import FAB
from tangentlab.attacks.fgsm import FGSM
from tangentlab.attacks.nfgsm import NFGSM
from tangentlab.attacks.pgd import PGD
from tangentlab.attacks.square import Square
from tangentlab.attacks.threat import Attack, NaNGradientError, Passes

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "NFGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Evaluation",
    "Flag",
    "NaNGradientError",
    "Passes",
    "Square",
]
