"""OverfittingAlarm: a warning of catastrophic overfitting, in anyone's loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from tangentlab.attacks import FGSM, PGD
from tangentlab.errors import ConfigError
from tangentlab.probes import watched
from tangentlab.probes.signals import update_signals

COST = 2 + 4 + 2 * 3  # passes an example: FGSM, PGD in two steps, and the loss's gradient on either
SMOOTHED = 3  # looks whose median is held against the threshold
THRESHOLD = 0.55  # chosen on seed 0 of tier 0 of the study of overfitting


@dataclass(frozen=True)
class AlarmLook:
    """What the alarm saw at a step.

    Attributes:
        step: optimizer updates so far.
        share: the update share of this look; None where a gradient vanished.
        median: of the last looks' shares; None before there are three.
        raised: the answer from then on.
    """

    step: int
    share: float | None
    median: float | None
    raised: bool


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Raise ConfigError for what is no threshold of a share."""
    if not 0 < threshold < 1:
        raise ConfigError(f"{name}={threshold} is out of range (0, 1)")


class OverfittingAlarm:
    """Speaks where training on one-step examples no longer trains against several steps.

    What is watched is the update share r_Fᵀ Θ(x_F, x_P) r_P / r_Pᵀ Θ(x_P, x_P) r_P, with Θ the kernel, r the
    loss's derivatives by the logits, x_F the examples under FGSM and x_P under PGD in two steps of eps/2:
    of the fall of the loss on x_P that a small step on x_P buys, what one on x_F does
    (tangentlab.probes.update_signals). Near 1, FGSM stands for PGD; towards 0, the network learns against
    FGSM alone. The alarm is raised while the median of the last three looks lies below the threshold.

    Args:
        x, y: [n, ...] in [0, 1] and [n]: examples, of those that are trained on or others.
        eps: radius of the linf ball that is trained in.
        threshold: in (0, 1).
        start: the step from which looks count; a network that has hardly learned says nothing.

    ``raised`` is the last answer, ``spoke_at`` the step of the first alarm, ``looks`` are those so far and
    ``cost`` is theirs, in forward passes of one example: 12 an example. The model comes back as it was.

    >>> alarm = OverfittingAlarm(x, y, eps=8 / 255)  # doctest: +SKIP
    >>> if step % 50 == 0 and alarm.update(model, step):
    ...     ...  # doctest: +SKIP
    """

    def __init__(
        self, x: Tensor, y: Tensor, *, eps: float, threshold: float = THRESHOLD, start: int = 0
    ) -> None:
        self.x, self.y = watched.own(x, y)
        if not len(x):
            raise ConfigError("x holds no examples; the alarm needs one at least")
        check_threshold(threshold)
        if start < 0:
            raise ConfigError(f"start={start} is out of range; at least 0")
        self._attacks = FGSM(eps), PGD(eps, eps / 2, 2, random_start=False)
        self.threshold, self.start = threshold, start
        self.looks: list[AlarmLook] = []
        self.cost = 0
        self.raised = False
        self.spoke_at: int | None = None
        self._step = -1
        self._shares: list[float] = []

    def update(self, model: nn.Module, step: int) -> bool:
        """Look at the model; whether the alarm is raised. A network that has died changes nothing.

        Raises:
            ConfigError: the step does not follow the last look's.
            KernelError: no parameter requires a gradient.
        """
        if step <= self._step:
            raise ConfigError(f"step={step} does not follow the last look's, {self._step}")
        x, y = watched.placed(model, self.x, self.y)
        with watched.seen_plainly(model, x.device):
            one_step, several = (attack(model, x, y) for attack in self._attacks)
            share = update_signals(model, one_step, several, y).get("update_share")
        self.cost += COST * len(x)
        self._step = step
        if share is not None and step >= self.start:
            self._shares = [*self._shares, share][-SMOOTHED:]
        smooth = median(self._shares) if len(self._shares) == SMOOTHED else None
        self.raised = smooth is not None and smooth < self.threshold
        if self.raised and self.spoke_at is None:
            self.spoke_at = step
        self.looks.append(AlarmLook(step, share, smooth, self.raised))
        return self.raised

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed alarm needs, as plain tensors; the looks so far are the caller's to keep."""
        spoke_at = math.nan if self.spoke_at is None else self.spoke_at
        place = [self._step, self.cost, self.raised, spoke_at, *self._shares]
        return {"place": torch.tensor(place, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        step, cost, raised, spoke_at, *self._shares = state["place"].tolist()
        self._step, self.cost, self.raised = int(step), int(cost), bool(raised)
        self.spoke_at = None if math.isnan(spoke_at) else int(spoke_at)
