"""Attacks: frozen settings, called as ``attack(model, x, y, generator=g)``, inputs in [0, 1].

An attack is a library of its own: it takes any nn.Module with logits [n, C] and knows nothing of training.
"""

from tangentlab.attacks.fgsm import FGSM
from tangentlab.attacks.pgd import PGD
from tangentlab.attacks.threat import Attack, Passes

__all__ = ["FGSM", "PGD", "Attack", "Passes"]
