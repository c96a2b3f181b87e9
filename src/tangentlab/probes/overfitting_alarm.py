"""OverfittingAlarm: a warning of catastrophic overfitting, in anyone's loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks.threat import check_eps, check_inputs
from tangentlab.errors import ConfigError
from tangentlab.probes import watched
from tangentlab.probes.signals import one_and_two_steps, right_confidences

COST = 4 + 2  # passes an example: FGSM and PGD in two steps, and a forward pass on either
POOLED = 3  # looks that are pooled, each at another part of the examples
# Of 0.1, 0.15, ... the largest share of collapses spoken before, less that of quiet runs spoken in, on
# digits, Fashion-MNIST and CIFAR-10 together: benchmarks/alarm_looks.py.
THRESHOLD = 0.85


@dataclass(frozen=True)
class AlarmLook:
    """What the alarm saw at a step.

    Attributes:
        step: optimizer updates so far.
        share: the confidence share of this look's examples; None where FGSM leaves none.
        pooled: that of the last three looks together; None before there are three.
        raised: the answer from then on.
    """

    step: int
    share: float | None
    pooled: float | None
    raised: bool


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Raise ConfigError for what is no threshold of a share."""
    if not 0 < threshold < 1:
        raise ConfigError(f"{name}={threshold} is out of range (0, 1)")


class OverfittingAlarm:
    """Speaks where training on one-step examples no longer trains against several steps.

    What is watched is the confidence share Σ_i p(y_i | x_P,i) / Σ_i p(y_i | x_F,i), with p the network's
    softmax, x_F the examples under FGSM and x_P under PGD in two steps of eps/2: of the confidence in the
    right classes that FGSM leaves, what PGD does. Near 1, FGSM stands for PGD; towards 0, the network has
    learned against FGSM alone. Each look takes the next third of the examples; the alarm is raised while the
    share of the last three looks together, the sum of their numerators over that of their denominators, lies
    below the threshold.

    Args:
        x, y: [n, ...] in [0, 1] and [n], n ≥ 3; examples, of those that are trained on or others, in an order
            that mixes the classes.
        eps: radius of the linf ball that is trained in.
        threshold: in (0, 1). A network that has not learned yet has a share near 1.

    ``raised`` is the last answer, ``spoke_at`` the step of the first alarm, ``looks`` are those so far and
    ``cost`` is theirs, in forward passes of one example: 2 n a look, and one that checks the outputs. The
    model comes back as it was. Where the loss has no gradient in floating point, its logits a hundred apart,
    FGSM and PGD leave an example as it is, and the alarm is blind to it.

    >>> alarm = OverfittingAlarm(x, y, eps=8 / 255)  # doctest: +SKIP
    >>> steps = 2 if alarm.update(model, step) else 1  # doctest: +SKIP
    """

    def __init__(self, x: Tensor, y: Tensor, *, eps: float, threshold: float = THRESHOLD) -> None:
        self.x, self.y = watched.own(x, y)
        check_inputs(self.x)
        if len(x) < POOLED:
            raise ConfigError(f"x holds {len(x)} examples; the alarm looks at a third of them at a time")
        check_threshold(threshold)
        check_eps(eps)
        self.eps, self.threshold = eps, threshold
        self.looks: list[AlarmLook] = []
        self.cost = 0
        self.raised = False
        self.spoke_at: int | None = None
        self._step = -1
        self._part = 0  # of the examples, at the next look
        self._confidences: list[tuple[float, float]] = []  # under FGSM and under PGD, of the last looks

    def update(self, model: nn.Module, step: int, *, eps: float | None = None) -> bool:
        """Look at the model; whether the alarm is raised. A network that FGSM fools wholly changes nothing.

        Args:
            eps: the radius that is trained in at this step, where it follows a schedule.

        Raises:
            ConfigError: the step does not follow the last look's; eps is out of range.
            KernelError: the model has no parameters.
            NaNGradientError: a loss or its gradient is NaN; such a look changes nothing.
        """
        if step <= self._step:
            raise ConfigError(f"step={step} does not follow the last look's, {self._step}")
        if eps is not None:
            check_eps(eps)
        x, y = (part.tensor_split(POOLED)[self._part] for part in watched.placed(model, self.x, self.y))
        with watched.seen_plainly(model, x.device):
            crafted = one_and_two_steps(model, x, y, eps=self.eps if eps is None else eps)
            of_one, of_several = right_confidences(model, *crafted, y)
        self.cost += COST * len(x) + 1
        self._step, self._part = step, (self._part + 1) % POOLED
        if of_one:
            self._confidences = [*self._confidences, (of_one, of_several)][-POOLED:]
        pooled = None
        if len(self._confidences) == POOLED:
            under_fgsm, under_pgd = map(sum, zip(*self._confidences, strict=True))
            pooled = under_pgd / under_fgsm
        self.raised = pooled is not None and pooled < self.threshold
        if self.raised and self.spoke_at is None:
            self.spoke_at = step
        self.looks.append(AlarmLook(step, of_several / of_one if of_one else None, pooled, self.raised))
        return self.raised

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed alarm needs, as plain tensors; the looks so far are the caller's to keep."""
        spoke_at = math.nan if self.spoke_at is None else self.spoke_at
        place = [self._step, self.cost, self._part, self.raised, spoke_at]
        return {
            "place": torch.tensor(place, dtype=torch.float64),
            "confidences": torch.tensor(self._confidences, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`; KeyError where it is of an alarm that watched something else."""
        step, cost, part, raised, spoke_at = state["place"].tolist()
        self._step, self.cost, self._part, self.raised = int(step), int(cost), int(part), bool(raised)
        self.spoke_at = None if math.isnan(spoke_at) else int(spoke_at)
        self._confidences = [(of_one, of_several) for of_one, of_several in state["confidences"].tolist()]
