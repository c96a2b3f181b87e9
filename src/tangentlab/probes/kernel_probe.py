"""KernelProbe: the empirical NTK on a fixed set of examples, snapshot by snapshot, in anyone's loop.

Follows "Rethinking Adversarial Training with Neural Tangent Kernel" (arXiv 2312.02236), section 3: kernel
distance, effective rank and specialization along the whole training, on clean and on adversarial inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab import metrics, randomness
from tangentlab.attacks import Attack
from tangentlab.attacks.threat import check_inputs
from tangentlab.errors import ConfigError, unknown_choice
from tangentlab.kernels import ntk, sketched_ntk
from tangentlab.kernels.memory import bytes_of
from tangentlab.probes import watched
from tangentlab.records import Measurement

KINDS = ("class", "trace")
ONCE = "-once"  # ends the name of inputs that were crafted at the first snapshot and kept
TOP = 10  # eigenvalues that are recorded, and that the top mass sums


class KernelProbe:
    """Measures the kernel of a model on the examples x, y whenever it is asked to.

    Args:
        x: [n, ...] examples in [0, 1].
        y: [n] labels; specialization is recorded only if every class has an example.
        inputs: name -> attack that crafts the inputs anew at each snapshot, None for x itself. Beside the
            last attack's inputs, "<name>-once" keeps those of the first snapshot, so that the movement of
            the kernel and of its inputs can be told apart.
        kinds: "class" (one kernel an output) and "trace" (their mean).
        seed: of the attacks' noise, which is the same at every snapshot: velocity does not measure noise.
        memory: bound on the kernel engine's working memory.
        sketch: numbers that stand for the gradient of a weight in each of eight random projections, at least
            1: ``kernels`` are unbiased estimates then, cheaper for wide networks, the same projections at
            every snapshot. None for exact kernels.
        gap: steps that velocities are given over; None for those between the first two snapshots.

    ``measure`` returns ``values`` named ``kernel/<inputs>/<kind>/<metric>``, a metric of class kernels being
    the mean over the classes, and ``kernel/<a>~<b>/<kind>/distance`` between the kernels on two inputs; and
    ``kernels`` named ``<inputs>/<kind>``. Recorded are: distance_from_first, distance_from_previous, velocity
    (distance a step), angle_velocity (radians a step), angle_per_learning_rate (radians per summed learning
    rate), entropy_rank, participation_ratio, intrinsic_dimension, top_eigenvalues, top_mass (of ten),
    target_alignment, and of class kernels specialization_matrix and specialization. Velocities are given only
    over that one gap: 1 − cos is quadratic in the movement.
    Snapshots between those of a fixed gap are no part of it: they are described, and told from the first.
    With ``sketch`` every number has its 95 % interval beside it, as <metric>_interval, of the projections.

    The model comes back as it was and global random state is untouched: a run with a probe equals the run
    without it, bit for bit.

    >>> probe = KernelProbe(x, y, inputs={"clean": None, "fgsm": FGSM(8 / 255)})  # doctest: +SKIP
    >>> probe.measure(model, step=100).values["kernel/clean/class/entropy_rank"]  # doctest: +SKIP
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        inputs: Mapping[str, Attack | None] | None = None,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
        memory: str | int = "2GiB",
        sketch: int | None = None,
        gap: int | None = None,
    ) -> None:
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        if not kinds or set(kinds) - set(KINDS):
            raise ConfigError(unknown_choice("kind", next(iter(set(kinds) - set(KINDS)), None), KINDS))
        self.x, self.y = watched.own(x, y)
        self.inputs: dict[str, Attack | None] = dict(inputs) if inputs else {"clean": None}
        if any(attack is not None for attack in self.inputs.values()):
            check_inputs(self.x)
        for name in self.inputs:
            if not name or set(name) & set("/~") or name.endswith(ONCE):
                raise ConfigError(f"inputs name {name!r} is empty, holds '/' or '~', or ends in '{ONCE}'")
        self.kinds = tuple(kinds)
        self.seed = seed
        self.memory = bytes_of(memory)
        if sketch is not None and not (isinstance(sketch, int) and sketch >= 1):
            raise ConfigError(f"sketch={sketch!r} is out of range; at least 1, or None for exact kernels")
        self.sketch = sketch
        self._once: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._previous: dict[str, Tensor] = {}
        if gap is not None and gap < 1:
            raise ConfigError(
                f"gap={gap} is out of range; at least 1, or None for that of the first snapshots"
            )
        self._step = 0
        self._gap = gap or 0
        self._summed_learning_rate = 0.0

    def measure(
        self,
        model: nn.Module,
        step: int,
        *,
        summed_learning_rate: float | None = None,
        between: bool = False,
    ) -> Measurement:
        """The kernels of ``model`` as it stands, and what they say.

        Args:
            step: optimizer updates so far; must grow from call to call.
            summed_learning_rate: Σ of the learning rates so far, for movement per unit of it.
            between: a snapshot between those whose movement is followed, such as an early one; not the first.

        Raises:
            KernelError: the kernel cannot be exact for this model, or not within the memory.
        """
        if self._previous and step <= self._step:
            raise ConfigError(f"step={step} does not follow the last snapshot's, {self._step}")
        if between and not self._previous:
            raise ConfigError(f"step={step} is the first snapshot; between=True takes one before it")
        x, y = watched.placed(model, self.x, self.y)
        crafted = self._craft(model, x, y)
        values: dict[str, Any] = {}
        kernels: dict[str, Tensor] = {}
        for name, points in crafted.items():
            twin = name.removesuffix(ONCE)
            if twin != name and not self._previous:  # at the first snapshot the two are the same
                kernels |= {f"{name}/{kind}": kernels[f"{twin}/{kind}"] for kind in self.kinds}
                continue
            class_kernels = self._class_kernels(model, points)
            for kind in self.kinds:
                kernel = class_kernels if kind == "class" else class_kernels.mean(dim=-3)
                kernels[f"{name}/{kind}"] = kernel.cpu()
        if self._previous and not self._gap and not between:
            self._gap = step - self._step
        labels = self.y.cpu()
        for name, kernel in kernels.items():
            described = self._values(partial(_describe, labels), kernel)
            if between:
                described |= self._values(_told("distance_from_first"), self._first[name], kernel)
            else:
                described |= self._movement(name, kernel, step, summed_learning_rate)
            values |= {f"kernel/{name}/{metric}": value for metric, value in described.items()}
        for a, b in combinations(self.inputs, 2):
            for kind in self.kinds:
                found = self._values(_told("distance"), kernels[f"{a}/{kind}"], kernels[f"{b}/{kind}"])
                values |= {f"kernel/{a}~{b}/{kind}/{metric}": value for metric, value in found.items()}
        means = {
            name: kernel if self.sketch is None else kernel.mean(dim=0) for name, kernel in kernels.items()
        }
        measured = Measurement(step=step, values=values, kernels=means)
        if between:
            return measured
        self._previous = {name: kernel.clone() for name, kernel in kernels.items()}
        self._first = self._first or self._previous
        self._step = step
        self._summed_learning_rate = summed_learning_rate or 0.0
        return measured

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed probe needs, as plain tensors: first and last kernels, the inputs crafted once."""
        place = torch.tensor([self._step, self._gap, self._summed_learning_rate], dtype=torch.float64)
        state = {"place": place} if self._previous else {}
        for group, tensors in (("once", self._once), ("first", self._first), ("previous", self._previous)):
            state |= {f"{group}/{name}": tensor for name, tensor in tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        if not state:
            return
        step, gap, self._summed_learning_rate = state["place"].tolist()
        self._step, self._gap = int(step), int(gap)
        groups: dict[str, dict[str, Tensor]] = {"once": {}, "first": {}, "previous": {}}
        for key, tensor in state.items():
            group, _, name = key.partition("/")
            if name:
                groups[group][name] = tensor
        self._once, self._first, self._previous = groups["once"], groups["first"], groups["previous"]

    def _craft(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """name -> inputs; crafted in evaluation mode, as the kernel is taken."""
        points: dict[str, Tensor] = {}
        last = None
        with watched.seen_plainly(model, x.device):
            for name, attack in self.inputs.items():
                if attack is None:
                    points[name] = x
                    continue
                noise = randomness.generator(self.seed, f"probe/{name}", device=x.device)
                points[name] = attack(model, x, y, generator=noise)
                last = name
        if last is not None:
            self._once = self._once or {last: points[last].cpu()}
            points[last + ONCE] = self._once[last].to(x.device)
        return points

    def _movement(
        self, name: str, kernel: Tensor, step: int, summed_learning_rate: float | None
    ) -> dict[str, Any]:
        if not self._previous:
            return {}
        gap, rate = step - self._step, (summed_learning_rate or 0.0) - self._summed_learning_rate

        def moved(previous: Tensor, kernel: Tensor) -> dict[str, float]:
            distance, angle = (
                _distance(previous, kernel),
                float(metrics.kernel_angle(previous, kernel).mean()),
            )
            values = {"distance_from_previous": distance}
            if gap == self._gap:
                values |= {"velocity": distance / gap, "angle_velocity": angle / gap}
                if rate > 0:
                    values["angle_per_learning_rate"] = angle / rate
            return values

        return {
            **self._values(_told("distance_from_first"), self._first[name], kernel),
            **self._values(moved, self._previous[name], kernel),
        }

    def _class_kernels(self, model: nn.Module, points: Tensor) -> Tensor:
        """[C, n, n]; sketched ones [groups, C, n, n]."""
        if self.sketch is None:
            return ntk(model, points, kind="class", memory=self.memory)
        return sketched_ntk(model, points, features=self.sketch, seed=self.seed, memory=self.memory)

    def _values(self, function: Callable[..., Mapping[str, Any]], *kernels: Tensor) -> dict[str, Any]:
        """What the function says of the kernels; of sketched ones, the numbers with their intervals."""
        if self.sketch is None:
            return dict(function(*kernels))
        found = dict(function(*(kernel.mean(dim=0) for kernel in kernels)))
        names = [name for name, value in found.items() if isinstance(value, float)]

        def numbers(*means: Tensor) -> Tensor:
            said = function(*means)
            return torch.tensor([said[name] for name in names], dtype=torch.float64)

        for name, value, *ends in zip(names, *metrics.jackknife(numbers, *kernels), strict=True):
            found |= {name: float(value), f"{name}_interval": [float(end) for end in ends]}
        return found


def _told(name: str) -> Callable[[Tensor, Tensor], dict[str, float]]:
    """The distance of two kernels by that name."""
    return lambda K1, K2: {name: _distance(K1, K2)}


def _distance(K1: Tensor, K2: Tensor) -> float:
    """Averaged over the classes."""
    return float(metrics.kernel_distance(K1, K2).mean())


def _describe(y: Tensor, kernel: Tensor) -> dict[str, Any]:
    """What one snapshot's kernel, [n, n] or [C, n, n], says by itself."""
    spectrum = metrics.spectrum(kernel)
    top = spectrum.values[..., :TOP].reshape(-1, min(TOP, kernel.shape[-1]))
    described: dict[str, Any] = {
        "entropy_rank": float(spectrum.entropy_rank.mean()),
        "participation_ratio": float(spectrum.participation_ratio.mean()),
        "intrinsic_dimension": float(spectrum.intrinsic_dimension.mean()),
        "top_eigenvalues": top.mean(dim=0).tolist(),
        "top_mass": float(spectrum.top_mass(min(TOP, kernel.shape[-1])).mean()),
        "target_alignment": float(metrics.kernel_target_alignment(kernel, y).mean()),
    }
    # Specialization compares a class kernel with its class's examples; without some there is none to tell.
    if kernel.dim() == 3 and len(y.unique()) == len(kernel):
        matrix = metrics.kernel_specialization(kernel, y)
        described["specialization_matrix"] = matrix.tolist()
        described["specialization"] = float(metrics.specialization_score(matrix))
    return described
