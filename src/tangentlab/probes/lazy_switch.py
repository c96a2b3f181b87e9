"""LazySwitch: which examples to craft next, by the stage that the kernel is in, in anyone's loop.

"Rethinking Adversarial Training with Neural Tangent Kernel" (arXiv 2312.02236), case study 2: while the
kernel stands still, adversarial examples can be replaced by cheaper ones; when it moves again, they cannot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tangentlab import randomness
from tangentlab.attacks import Attack
from tangentlab.attacks.threat import check_inputs
from tangentlab.errors import ConfigError, KernelError
from tangentlab.files import under
from tangentlab.probes import watched
from tangentlab.probes.accuracy import accuracy
from tangentlab.probes.kernel_probe import KernelProbe

FULL, CHEAP = "full", "cheap"
PHASES = (FULL, CHEAP)
DROP = 0.5  # of the learning rate of the step before, or less


@dataclass(frozen=True)
class Look:
    """What the switch saw at a step, and what it answers from then on.

    Attributes:
        step: optimizer updates so far.
        phase: full or cheap.
        reason: why the phase changed, in one line; None where it did not.
        values: the evidence by name, numbers: velocity (radians a step) and the two levels it is held
            against, robust_accuracy and the level that it may fall to, learning_rate.
        error: why the kernel could not be measured, where it could not.
    """

    step: int
    phase: str
    reason: str | None
    values: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


def check_rule(*, threshold: float, resume: float, patience: int, max_fall: float, section: str = "") -> None:
    """Raise ConfigError for a setting out of range; ``section`` is what its name begins with."""
    if patience < 1:
        raise ConfigError(f"{section}patience={patience} is out of range; at least 1")
    if not 0 < threshold <= resume:
        raise ConfigError(
            f"{section}threshold={threshold} and {section}resume={resume}: 0 < threshold ≤ resume is needed"
        )
    if not 0 < max_fall < 1:
        raise ConfigError(f"{section}max_fall={max_fall} is out of range (0, 1)")


class LazySwitch:
    """Answers "full" or "cheap": whether the next examples need the full attack.

    It begins with "full". By the kernel, with v the angle a step that the class kernels turned between two
    looks, η the mean learning rate of these steps, and v* the fastest so far, max vᵢ·min(1, √(η/ηᵢ)):

    - full → cheap where v < ``threshold``·v* at ``patience`` looks in a row, while the rate does not rise:
      the lazy stage;
    - cheap → full where v > ``resume``·v* at ``patience`` looks in a row: the kernel learns again;
    - with ``return_on_drop``, cheap → full at the look after the learning rate fell to half or less from one
      call to the next. Smooth schedules fall so at their last steps alone.

    The root, since steps that jitter about a point turn the kernel in proportion to it, and a rate that falls
    is not to make it look lazy. A rate that rises leaves v* alone: early, the kernel turns as fast at small
    rates, and would look lazy at the first large one. Nor does it say that the kernel is lazy: a network that
    warms up may rest before it learns. So a v* of a warm-up's small rates stays when the rate falls to as
    small a one, and the kernel does look lazy there. Call at every step, with the rate; where none was ever
    given η is 1.

    A kernel that cannot be measured (a network that has died has none) says nothing; the rest goes on.

    With ``at`` the first two are replaced by that step, and no kernel is measured. With ``held_out`` a safety
    net: cheap → full where robust accuracy on these points is ``max_fall`` below its best since the switch;
    each time, ``patience`` doubles. After ``at`` there is no second time.

    Args:
        x, y: [n, ...] in [0, 1] and [n], the examples whose kernel is watched.
        every: steps between looks.
        attack: watch the kernel on the examples that it crafts; None for clean ones.
        at: the step to switch at, whatever the kernel does.
        threshold, resume: 0 < threshold ≤ resume.
        patience: looks in a row.
        return_on_drop: see above.
        held_out: points (x, y) that are not trained on.
        guard: the attack that they are judged by.
        max_fall: in (0, 1).
        seed: of the attacks' noise, the same at every look.
        sketch: as a KernelProbe's; None for exact kernels.
        memory: bound on the kernel engine's working memory.

    ``looks`` are those so far; ``cost`` is what they cost, in forward passes of one example: a kernel of n
    examples n(1 + 2C) for one forward and C backwards, besides what crafting takes. With an attack the probe
    follows the examples that it crafted first too, which is a second kernel.

    >>> switch = LazySwitch(x, y, every=100, attack=PGD(8 / 255, 2 / 255, 10))  # doctest: +SKIP
    >>> steps = 10 if switch(model, step, learning_rate=lr) == "full" else 1  # doctest: +SKIP
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        every: int,
        attack: Attack | None = None,
        at: int | None = None,
        threshold: float = 0.6,
        resume: float = 0.9,
        patience: int = 2,
        return_on_drop: bool = False,
        held_out: tuple[Tensor, Tensor] | None = None,
        guard: Attack | None = None,
        max_fall: float = 0.05,
        seed: int = 0,
        sketch: int | None = None,
        memory: str | int = "2GiB",
    ) -> None:
        if every < 1:
            raise ConfigError(f"every={every} is out of range; at least 1")
        if at is not None and at < 0:
            raise ConfigError(f"at={at} is out of range; at least 0, or None to follow the kernel")
        check_rule(threshold=threshold, resume=resume, patience=patience, max_fall=max_fall)
        if (held_out is None) != (guard is None):
            raise ConfigError("held_out points and the guard that attacks them come together")
        self.every, self.at = every, at
        self.threshold, self.resume, self.patience = threshold, resume, patience
        self.return_on_drop, self.max_fall = return_on_drop, max_fall
        self.seed = seed
        self.looks: list[Look] = []
        self.cost = 0
        self.phase = FULL
        self._held_out = None if held_out is None else watched.own(*held_out)
        if self._held_out is not None:
            check_inputs(self._held_out[0])
        self._inputs = "clean" if attack is None else "crafted"
        self._attack, self._guard = attack, guard
        self._probe = KernelProbe(
            x,
            y,
            inputs={self._inputs: attack},
            kinds="class",
            seed=seed,
            memory=memory,
            sketch=sketch,
            gap=every,
        )
        if at is None and len(x) < 2:
            raise ConfigError("x holds one example; a kernel that turns takes two")
        self._seen: list[list[float]] = []  # velocities, and the learning rates that they were measured at
        self._row = 0  # looks in a row that speak for the other phase
        self._best = 0.0  # robust accuracy since the switch
        self._rate = 0.0  # of learning, at the last call
        self._fell_from = 0.0  # the rate before it first fell since the last look
        self._summed, self._calls = 0.0, 0  # the rates of the calls since the last look
        self._classes = 0  # as the first kernel has them
        self._returned = False

    def due(self, step: int) -> bool:
        """Whether a call at this step looks."""
        return step % self.every == 0 or step == self.at

    def __call__(self, model: nn.Module, step: int, *, learning_rate: float | None = None) -> str:
        """The phase from this step on; looks at the model where a look is due, and leaves it as it was.

        Raises:
            KernelError: at the first look, as KernelProbe.measure.
            ConfigError: the step does not follow the last look's, or the rate is negative or not finite.
        """
        values: dict[str, float] = {}
        if learning_rate is not None:
            learning_rate = float(learning_rate)  # schedulers write into a tensor's place
            if not 0 <= learning_rate < math.inf:
                raise ConfigError(f"learning_rate={learning_rate} is out of range; at least 0, and finite")
            if learning_rate <= DROP * self._rate * (1 + 1e-9):
                self._fell_from = self._fell_from or self._rate
            self._rate = values["learning_rate"] = learning_rate
        if self.due(step):
            self._look(model, step, values)
        if learning_rate is not None:  # of the step to come
            self._summed, self._calls = self._summed + learning_rate, self._calls + 1
        return self.phase

    def _look(self, model: nn.Module, step: int, values: dict[str, float]) -> None:
        """Measure, decide, and keep both."""
        error = None
        if self.at is None:
            try:
                values |= self._kernel(model, step)
            except KernelError as failed:
                if not self._classes:
                    raise
                error = str(failed)
        if self.phase == CHEAP:
            values |= self._held_out_accuracy(model)
        reason = self._decide(step, values)
        if reason is not None:
            self._returned = self.phase == CHEAP
            self.phase = FULL if self.phase == CHEAP else CHEAP
            self._row = 0
            if self.phase == CHEAP:  # what a fall is measured from
                values |= self._held_out_accuracy(model)
                self._best = values.get("robust_accuracy", 0.0)
        self._fell_from = 0.0
        if error is None:  # else the next velocity is from the look before on
            self._summed, self._calls = 0.0, 0
        self.looks.append(Look(step, self.phase, reason, values, error))

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed switch needs, as plain tensors; the looks so far are the caller's to keep."""
        counts = (self.cost, self.patience, self._row, self._classes, self._returned, self._calls)
        rates = (self._rate, self._fell_from, self._summed)
        place = [PHASES.index(self.phase), self._best, *rates, *counts]
        state = {f"probe/{name}": tensor for name, tensor in self._probe.state_dict().items()}
        seen = torch.tensor(self._seen, dtype=torch.float64).reshape(-1, 2)
        return {**state, "place": torch.tensor(place, dtype=torch.float64), "seen": seen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        phase, self._best, *rest = state["place"].tolist()
        self.phase, self._seen = PHASES[int(phase)], state["seen"].tolist()
        self._rate, self._fell_from, self._summed, *counts = rest
        self.cost, self.patience, self._row, self._classes, returned, self._calls = map(int, counts)
        self._returned = bool(returned)
        self._probe.load_state_dict(under(state, "probe/"))

    def _decide(self, step: int, values: dict[str, float]) -> str | None:
        """Why the phase changes now, or None; the levels that the evidence is held against join it."""
        velocity = values.get("velocity")
        rate = self._summed / self._calls if self._calls else self._rate or 1.0
        rises = bool(self._seen) and rate > self._seen[-1][1] * (1 + 1e-9)
        if velocity is not None:
            self._seen.append([velocity, rate])
        fastest = max((v * math.sqrt(min(1.0, rate / r)) if r else v for v, r in self._seen), default=0.0)
        low, high = self.threshold * fastest, self.resume * fastest
        if velocity is not None:
            values |= {"lazy_below": low, "learning_above": high}
            self._row = self._row + 1 if (velocity < low if self.phase == FULL else velocity > high) else 0
        if self.phase == FULL:
            if rises or (self._fell_from and self.return_on_drop):
                self._row = 0  # what was seen before a fall says nothing of what is after it
            if self.at is None:
                return f"the kernel's velocity fell below {low:.3g}" if self._row >= self.patience else None
            return f"step {self.at} is reached" if step >= self.at and not self._returned else None
        if self._fell_from and self.return_on_drop:
            return f"the learning rate fell from {self._fell_from:g} to {self._rate:g}"
        if "robust_accuracy" in values:
            robust = values["robust_accuracy"]
            self._best = max(self._best, robust)
            values["least_robust_accuracy"] = self._best - self.max_fall
            if robust < self._best - self.max_fall:
                self.patience *= 2
                return f"robust accuracy fell from {self._best:.1%} to {robust:.1%}"
        return f"the kernel's velocity rose above {high:.3g}" if self._row >= self.patience else None

    # --- what is measured --------------------------------------------------------------------------------

    def _kernel(self, model: nn.Module, step: int) -> dict[str, float]:
        crafting = 0 if self._attack is None else self._attack.passes.cost
        # From the second look on, of the inputs of the first one too.
        kernels = 2 if self._attack is not None and self._classes else 1
        try:
            measured = self._probe.measure(model, step)
            self._classes = len(measured.kernels[f"{self._inputs}/class"])
        finally:
            self.cost += len(self._probe.x) * (crafting + kernels * (1 + 2 * self._classes))
        velocity = measured.values.get(f"kernel/{self._inputs}/class/angle_velocity")
        return {} if velocity is None else {"velocity": velocity}

    def _held_out_accuracy(self, model: nn.Module) -> dict[str, float]:
        """Robust accuracy on the points of the safety net, where there is one."""
        if self._held_out is None or self._guard is None:
            return {}
        x, y = watched.placed(model, *self._held_out)
        noise = randomness.generator(self.seed, "guard", device=x.device)
        self.cost += len(x) * (self._guard.passes.cost + 1)
        with watched.seen_plainly(model, x.device):
            return {"robust_accuracy": accuracy(model, x, y, self._guard, generator=noise)}
