"""What the study of catastrophic overfitting takes of a network at one checkpoint, by name.

In full, on PROBED examples: the kernel's signals (spectrum and distances of the class kernels on clean, FGSM
and PGD inputs), the rivals' (tangentlab.probes.linearity_signals), and what a step on FGSM inputs does on PGD
inputs, in which the kernel and the losses' derivatives meet (tangentlab.probes.update_signals).

Cheap, named "cheap/...": those of as many examples as BUDGET forward passes pay for, with PGD in two steps of
eps/2 and kernels of one signed sum of the logits, which are the trace kernel in the mean over signs. And, at
no more a look, pooled ones of three looks at other examples each: the shipped alarm's confidence share, the
update share, and rivals.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab import metrics, modes, randomness
from tangentlab.attacks import FGSM, Attack
from tangentlab.attacks.threat import cross_entropies, uniform_start
from tangentlab.errors import KernelError
from tangentlab.kernels import ntk
from tangentlab.probes import (
    KernelProbe,
    SignedSum,
    fgsm_pgd_gap,
    gradient_signals,
    linearity_error,
    linearity_signals,
    one_and_two_steps,
    right_confidences,
    update_products,
    update_signals,
)
from tangentlab.probes.overfitting_alarm import COST as ALARM_COST
from tangentlab.probes.overfitting_alarm import POOLED
from tangentlab.runs import RunConfig
from tangentlab.runs.build import build_attack

PROBED = 64  # training examples of all classes
BUDGET = 150  # forward passes of a cheap look: one every 25 steps of FGSM on 64 examples, 1.9 % of the passes
INPUTS = ("clean", "fgsm", "pgd")
PAIRS = ("clean~fgsm", "clean~pgd", "fgsm~pgd")
KINDS = ("class", "trace")
EIGENVALUES = ("first_eigenvalue", "second_eigenvalue", "third_eigenvalue")
COUNTS = ("entropy_rank", "participation_ratio", "intrinsic_dimension", "top_mass")
SPECTRUM = (*COUNTS, *EIGENVALUES)
ALARM_SIGNAL = "confidence_share"
RIVALS = (
    "fgsm_pgd_gap",
    "loss_ratio",
    ALARM_SIGNAL,
    "gradient_cosine",
    "linearity_error",
    "gradient_norm",
    "input_entropy_rank",
    "input_top_mass",
)
UPDATES = ("update_share", "update_cosine")
UPDATE_SIGNALS = (*UPDATES, "kernel_share", "derivative_share")
KERNEL = (
    *(f"{inputs}/{kind}/{name}" for inputs, kind, name in product(INPUTS, KINDS, SPECTRUM)),
    *(f"{pair}/{kind}/distance" for pair, kind in product(PAIRS, KINDS)),
)
# Of a cheap look: forward equivalents an example; PGD's first gradient is FGSM's too.
CRAFTING = {"clean": 0, "noise": 0, "fgsm": 2, "pgd": 4}
GRADIENT = 3  # forward, and backward to the parameters
CHEAP_SPECTRUM = {inputs: CRAFTING[inputs] + GRADIENT for inputs in ("clean", "fgsm")}
CHEAP_PAIRS = {
    f"{a}~{b}": max(CRAFTING[a], CRAFTING[b]) + 2 * GRADIENT
    for a, b in (("clean", "noise"), ("clean", "fgsm"), ("noise", "fgsm"), ("clean", "pgd"), ("fgsm", "pgd"))
}
ALARM_SHARE = f"pooled_{ALARM_SIGNAL}"
POOLED_UPDATES = {"pooled_update_share": CHEAP_PAIRS["fgsm~pgd"]}
POOLED_RIVALS = {
    ALARM_SHARE: ALARM_COST,
    "pooled_loss_ratio": ALARM_COST,
    "pooled_fgsm_pgd2_gap": 8,
    "pooled_gradient_cosine": 4,
    "pooled_linearity_error": 3,
}
POOLED_SIGNALS = {**POOLED_UPDATES, **POOLED_RIVALS}
CHEAP_UPDATES = dict.fromkeys(UPDATES, CHEAP_PAIRS["fgsm~pgd"])
CHEAP_RIVALS = {
    "fgsm_pgd_gap": 24,
    "fgsm_pgd2_gap": 8,
    "loss_ratio": ALARM_COST,
    ALARM_SIGNAL: ALARM_COST,
    "gradient_cosine": 4,
    "linearity_error": 3,
    "gradient_norm": 2,
    "input_entropy_rank": 2,
    "input_top_mass": 2,
    **POOLED_RIVALS,
}
COSTS = {
    **{f"cheap/{inputs}/{name}": cost for (inputs, cost) in CHEAP_SPECTRUM.items() for name in SPECTRUM},
    **{f"cheap/{pair}": cost for pair, cost in (CHEAP_PAIRS | CHEAP_UPDATES).items()},
    **{f"cheap/{name}": cost for name, cost in POOLED_UPDATES.items()},
    **{f"cheap/{name}": cost for name, cost in CHEAP_RIVALS.items()},
}
SIGNALS = (*KERNEL, *UPDATE_SIGNALS, *RIVALS, *COSTS)


EXAMPLES = POOLED * (BUDGET // min(POOLED_RIVALS.values()))  # that the looks need, the full ones fewer


class PooledSignals:
    """The shipped alarm's share, and others pooled in the same way: each look takes the next third of the
    examples, and the last three count together, a ratio as that of the sums."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.parts = {
            name: list(
                zip(*(part[: POOLED * (BUDGET // cost)].tensor_split(POOLED) for part in (x, y)), strict=True)
            )
            for name, cost in POOLED_SIGNALS.items()
        }
        self.looks: list[dict[str, tuple[float, float]]] = []

    def look(self, model: nn.Module, config: RunConfig) -> dict[str, float]:
        points = {name: parts[len(self.looks) % POOLED] for name, parts in self.parts.items()}
        self.looks.append(self._seen(model, points, config))
        found = {}
        if len(self.looks) >= POOLED:
            for name in POOLED_SIGNALS:
                above, below = map(sum, zip(*(look[name] for look in self.looks[-POOLED:]), strict=True))
                if below:
                    found[f"cheap/{name}"] = above / below
        return found

    def _seen(
        self, model: nn.Module, points: Mapping[str, tuple[Tensor, Tensor]], config: RunConfig
    ) -> dict[str, tuple[float, float]]:
        """Each as a numerator and a denominator."""
        eps, seed = config.eps, config.seed
        crafted = {}
        for name in (ALARM_SHARE, "pooled_update_share"):
            x, y = points[name]
            with modes.evaluation(model):
                crafted[name] = (*one_and_two_steps(model, x, y, eps=eps), y)
        right_of_one, right_of_several = right_confidences(model, *crafted[ALARM_SHARE])
        of_one, of_several = _losses(model, *crafted[ALARM_SHARE])  # as dear
        gap = fgsm_pgd_gap(model, *points["pooled_fgsm_pgd2_gap"], eps=eps, num_steps=2, seed=seed)
        gradients = gradient_signals(model, *points["pooled_gradient_cosine"], eps=eps, seed=seed)
        error = linearity_error(model, *points["pooled_linearity_error"], eps=eps, seed=seed)
        return {
            ALARM_SHARE: (right_of_several, right_of_one),
            "pooled_loss_ratio": (of_several, of_one),
            "pooled_update_share": update_products(model, *crafted["pooled_update_share"]),
            "pooled_fgsm_pgd2_gap": (gap, 1.0),
            "pooled_gradient_cosine": (gradients["gradient_cosine"], 1.0),
            "pooled_linearity_error": (error, 1.0),
        }


def full_signals(model: nn.Module, x: Tensor, y: Tensor, config: RunConfig) -> dict[str, float]:
    """Those on PROBED examples, by name."""
    x, y = x[:PROBED], y[:PROBED]
    attacks: dict[str, Attack] = {"fgsm": FGSM(config.eps), "pgd": build_attack(config, num_steps=10)}
    probe = KernelProbe(x, y, inputs={"clean": None, **attacks}, seed=config.seed)
    seen = linearity_signals(model, x, y, eps=config.eps, seed=config.seed)
    with modes.evaluation(model):
        noise = randomness.generator(config.seed, "full")
        one_step, several = (attack(model, x, y, generator=noise) for attack in attacks.values())
    of_one, of_several = _losses(model, one_step, several, y)
    seen["loss_ratio"] = of_several / of_one
    seen |= _confidence_share(model, one_step, several, y)
    seen |= update_signals(model, one_step, several, y)
    with suppress(KernelError):  # a network that has died has no kernel: its other signals remain
        seen |= _of_kernels(probe.measure(model, 0).values)
    return seen


def cheap_signals(model: nn.Module, x: Tensor, y: Tensor, config: RunConfig) -> dict[str, float]:
    """Those of BUDGET passes each, by name."""
    eps, seed = config.eps, config.seed

    def few(name: str) -> tuple[Tensor, Tensor]:
        n = BUDGET // CHEAP_RIVALS[name]
        return x[:n], y[:n]

    seen = {
        **gradient_signals(model, *few("gradient_norm"), eps=eps, seed=seed),
        "fgsm_pgd_gap": fgsm_pgd_gap(model, *few("fgsm_pgd_gap"), eps=eps, seed=seed),
        "fgsm_pgd2_gap": fgsm_pgd_gap(model, *few("fgsm_pgd2_gap"), eps=eps, num_steps=2, seed=seed),
        "linearity_error": linearity_error(model, *few("linearity_error"), eps=eps, seed=seed),
    }
    of_fewer = gradient_signals(model, *few("gradient_cosine"), eps=eps, seed=seed)
    seen["gradient_cosine"] = of_fewer["gradient_cosine"]
    points = _inputs(model, *few("gradient_norm"), config)
    n = BUDGET // CHEAP_RIVALS["loss_ratio"]
    crafted = points["fgsm"][:n], points["pgd"][:n], y[:n]
    of_one, of_several = _losses(model, *crafted)
    seen["loss_ratio"] = of_several / of_one
    seen |= _confidence_share(model, *crafted)
    with suppress(KernelError):
        seen |= _of_cheap_kernels(model, points, config)
    n = BUDGET // CHEAP_UPDATES["update_share"]
    updates = update_signals(model, points["fgsm"][:n], points["pgd"][:n], y[:n])
    seen |= {name: updates[name] for name in UPDATES if name in updates}
    return {f"cheap/{name}": value for name, value in seen.items()}


def _inputs(model: nn.Module, x: Tensor, y: Tensor, config: RunConfig) -> dict[str, Tensor]:
    noise = randomness.generator(config.seed, "cheap")
    with modes.evaluation(model):
        return {
            "clean": x,
            "noise": uniform_start(x, config.eps, noise),
            **dict(zip(("fgsm", "pgd"), one_and_two_steps(model, x, y, eps=config.eps), strict=True)),
        }


def _losses(model: nn.Module, one_step: Tensor, several: Tensor, y: Tensor) -> tuple[float, float]:
    """The mean loss on FGSM inputs, and on PGD inputs."""
    with modes.evaluation(model), torch.no_grad():
        of_one, of_several = (float(cross_entropies(model(x), y=y).mean()) for x in (one_step, several))
    return of_one, of_several


def _confidence_share(model: nn.Module, one_step: Tensor, several: Tensor, y: Tensor) -> dict[str, float]:
    """The alarm's, of these; none where FGSM leaves no confidence."""
    of_one, of_several = right_confidences(model, one_step, several, y)
    return {ALARM_SIGNAL: of_several / of_one} if of_one else {}


def _of_cheap_kernels(model: nn.Module, points: Mapping[str, Tensor], config: RunConfig) -> dict[str, float]:
    """Distances and spectra, of a prefix of the examples each."""
    signed = SignedSum(model, seed=config.seed)
    most = BUDGET // GRADIENT
    kernels = {name: ntk(signed, inputs[:most]).double() for name, inputs in points.items()}
    found: dict[str, float] = {}
    for inputs, cost in CHEAP_SPECTRUM.items():
        spectrum = metrics.spectrum(kernels[inputs][: BUDGET // cost, : BUDGET // cost])
        values = {
            "entropy_rank": spectrum.entropy_rank,
            "participation_ratio": spectrum.participation_ratio,
            "intrinsic_dimension": spectrum.intrinsic_dimension,
            "top_mass": spectrum.top_mass(min(10, BUDGET // cost)),
            **dict(zip(EIGENVALUES, spectrum.values, strict=False)),
        }
        found |= {f"{inputs}/{name}": float(values[name]) for name in SPECTRUM}
    for pair, cost in CHEAP_PAIRS.items():
        a, b = (kernels[name][: BUDGET // cost, : BUDGET // cost] for name in pair.split("~"))
        found[pair] = float(metrics.kernel_distance(a, b))
    return found


def _of_kernels(values: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for inputs, kind in product(INPUTS, KINDS):
        at = f"kernel/{inputs}/{kind}"
        largest = dict(zip(EIGENVALUES, values[f"{at}/top_eigenvalues"], strict=False))
        found |= {f"{inputs}/{kind}/{name}": values[f"{at}/{name}"] for name in COUNTS}
        found |= {f"{inputs}/{kind}/{name}": value for name, value in largest.items()}
    for pair, kind in product(PAIRS, KINDS):
        found[f"{pair}/{kind}/distance"] = values[f"kernel/{pair}/{kind}/distance"]
    return found
