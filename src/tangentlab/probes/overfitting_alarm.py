"""OverfittingAlarm: a warning of catastrophic overfitting, in anyone's loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab import metrics
from tangentlab.attacks import FGSM, PGD
from tangentlab.errors import ConfigError, KernelError
from tangentlab.kernels import ntk
from tangentlab.kernels.memory import bytes_of
from tangentlab.probes import watched

CRAFTING = 2 + 4  # passes an example: one step, and two
PSEUDO_KERNEL = 3  # a forward, and a backward to the parameters
THRESHOLD = 0.03


@dataclass(frozen=True)
class AlarmLook:
    """What the alarm saw at a step.

    Attributes:
        step: optimizer updates so far.
        raised: the answer from then on.
        distance: of the two kernels; None where they could not be measured, as ``error`` says.
    """

    step: int
    raised: bool
    distance: float | None
    error: str | None = None


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Raise ConfigError for what is no threshold of a kernel distance."""
    if not 0 < threshold < 1:
        raise ConfigError(f"{name}={threshold} is out of range (0, 1)")


class OverfittingAlarm:
    """Speaks where the network's kernel on FGSM inputs parts from that on PGD inputs.

    The distance is 1 − ⟨K_1, K_2⟩/(‖K_1‖‖K_2‖) of the pseudo kernels of x under FGSM and under PGD in two
    steps of eps/2 from x, in evaluation mode. While one step finds what two find, single-step training sees
    the worst case; where the two kernels part, it no longer does.

    Args:
        x, y: [n, ...] in [0, 1] and [n]: examples, of those that are trained on or others.
        eps: radius of the linf ball that is trained in.
        threshold: raised above this distance.
        start: the step from which it may be raised; a network that has hardly learned says nothing.
        memory: bound on the kernel engine's working memory.

    ``raised`` is the last answer, ``spoke_at`` the step of the first alarm, ``looks`` are those so far and
    ``cost`` is theirs, in forward passes of one example: 12 an example. The model comes back as it was.

    >>> alarm = OverfittingAlarm(x, y, eps=8 / 255)  # doctest: +SKIP
    >>> if step % 50 == 0 and alarm.update(model, step):
    ...     ...  # doctest: +SKIP
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        threshold: float = THRESHOLD,
        start: int = 0,
        memory: str | int = "2GiB",
    ) -> None:
        self.x, self.y = watched.own(x, y)
        if len(x) < 2:
            raise ConfigError(f"x holds {len(x)} examples; a kernel's direction needs 2 at least")
        check_threshold(threshold)
        if start < 0:
            raise ConfigError(f"start={start} is out of range; at least 0")
        self._attacks = FGSM(eps), PGD(eps, eps / 2, 2, random_start=False)
        self.threshold, self.start, self.memory = threshold, start, bytes_of(memory)
        self.looks: list[AlarmLook] = []
        self.cost = 0
        self.raised = False
        self.spoke_at: int | None = None
        self._step = -1

    def update(self, model: nn.Module, step: int) -> bool:
        """Look at the model; whether the alarm is raised.

        A kernel that cannot be measured (a network that has died has none) changes nothing.

        Raises:
            KernelError: at the first look.
            ConfigError: the step does not follow the last look's.
        """
        if step <= self._step:
            raise ConfigError(f"step={step} does not follow the last look's, {self._step}")
        distance = error = None
        try:
            distance = self._distance(model)
        except KernelError as failed:
            if self._step < 0:
                raise
            error = str(failed)
        self.cost += len(self.x) * (CRAFTING + 2 * PSEUDO_KERNEL)
        self._step = step
        if distance is not None:
            self.raised = step >= self.start and distance > self.threshold
        if self.raised and self.spoke_at is None:
            self.spoke_at = step
        self.looks.append(AlarmLook(step, self.raised, distance, error))
        return self.raised

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed alarm needs, as plain tensors; the looks so far are the caller's to keep."""
        spoke_at = math.nan if self.spoke_at is None else self.spoke_at
        place = [self._step, self.cost, self.raised, spoke_at]
        return {"place": torch.tensor(place, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        step, cost, raised, spoke_at = state["place"].tolist()
        self._step, self.cost, self.raised = int(step), int(cost), bool(raised)
        self.spoke_at = None if math.isnan(spoke_at) else int(spoke_at)

    def _distance(self, model: nn.Module) -> float:
        x, y = watched.placed(model, self.x, self.y)
        with watched.seen_plainly(model, x.device):
            crafted = [attack(model, x, y) for attack in self._attacks]
        one_step, two_steps = (
            ntk(model, points, kind="pseudo", memory=self.memory).double() for points in crafted
        )
        return float(metrics.kernel_distance(one_step, two_steps))
