"""AutoAttack: four parameter-free attacks, each on the points that the ones before left (Croce & Hein 2020).

APGD on the cross-entropy, APGD on the targeted DLR loss, FAB-T, Square: the "standard" version of
arXiv 2003.01690 and of RobustBench, linf and l2.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tangentlab import modes, randomness
from tangentlab.attacks.apgd import APGD, margins
from tangentlab.attacks.fab import FAB
from tangentlab.attacks.square import Square
from tangentlab.attacks.threat import (
    Attack,
    Passes,
    ascent,
    check_count,
    check_eps,
    check_generator,
    check_inputs,
    check_norm,
    crafting,
    lengths,
    predicted,
)
from tangentlab.attacks.verdicts import CLEAN, VerdictFile, Verdicts, evaluation_marks
from tangentlab.errors import ConfigError, ModelError

# The authors' thresholds (checks.py of fra31/auto-attack).
RANDOM_FORWARDS = 5
RANDOM_DIFFERENCE = 1e-4  # between logits divided by their norm
ALWAYS_RANDOM = 1e30  # stands for an infinite difference, which JSON has not
SQUARE_SHARE = 0.002  # of all points
PROBABILITY_ERROR = 1e-5


@dataclass(frozen=True)
class Flag:
    """A sign that the evaluation may overestimate the robustness: a name, and one line for the reader."""

    name: str
    text: str


@dataclass(frozen=True)
class Evaluation:
    """What :meth:`AutoAttack.run` found; ``dataclasses.asdict`` of it is JSON-able.

    Args:
        n: points evaluated.
        remaining: points still classified correctly: "clean", then after each attack, in order.
        broken_by: for each point None (robust), "clean" (misclassified without attack) or an attack's name.
        flags: reasons not to trust the number.
        seconds: wall time, summed over the parts of an evaluation that was resumed; not compared.
    """

    n: int
    remaining: dict[str, int]
    broken_by: tuple[str | None, ...]
    flags: tuple[Flag, ...]
    seconds: float = field(default=0.0, compare=False)

    @property
    def clean_accuracy(self) -> float:
        return self.remaining[CLEAN] / self.n

    @property
    def robust_accuracy(self) -> float:
        """Share of points that no attack broke: an upper bound of the true robust accuracy."""
        return self.broken_by.count(None) / self.n


@dataclass(frozen=True)
class AutoAttack:
    """The attacks in a row; only the defaults are the published "standard" version.

    With three classes the targeted DLR loss is undefined and the untargeted one is used; with two, neither
    is, and of the APGDs only the cross-entropy's runs. Subsets of the batch are attacked, so BatchNorm in
    training mode would see other statistics: meant for evaluation mode, which :meth:`run` sets.

    Args:
        eps: radius of the ball, in units of inputs in [0, 1].
        norm: "linf" or "l2".
        num_steps: of each APGD and FAB ascent.
        num_target_classes: of APGD-T and FAB-T; C − 1 where there are fewer.
        num_queries: of Square.
    """

    eps: float
    norm: str = "linf"
    num_steps: int = 100
    num_target_classes: int = 9
    num_queries: int = 5000

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_eps(self.eps, norm=self.norm)
        for name in ("num_steps", "num_target_classes", "num_queries"):
            check_count(getattr(self, name), name)

    def attacks(self, num_classes: int) -> dict[str, Attack]:
        """The attacks for a model with so many classes, by name, in the order in which they run."""
        found: dict[str, Attack] = {"apgd-ce": APGD(self.eps, self.num_steps, self.norm)}
        if num_classes >= 4:
            found["apgd-t"] = APGD(
                self.eps, self.num_steps, self.norm, "dlr-targeted", self.num_target_classes
            )
        elif num_classes == 3:
            found["apgd-dlr"] = APGD(self.eps, self.num_steps, self.norm, "dlr")
        found["fab-t"] = FAB(self.eps, self.num_steps, self.norm, self.num_target_classes)
        found["square"] = Square(self.eps, self.num_queries, self.norm)
        return found

    @property
    def passes(self) -> Passes:
        """The most passes per example, reached by a robust one: about 7,700 forwards and 1,900 backwards."""
        total = Passes(forwards=1)
        for attack in self.attacks(
            self.num_target_classes + 1 if self.num_target_classes > 3 else 4
        ).values():
            total = total.plus(attack.passes).plus(Passes(forwards=1))  # one to see who is left
        return total

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Adversarial inputs where an attack succeeds, elsewhere APGD's point of the largest cross-entropy.

        Misclassified inputs come back as they are.

        Raises:
            ConfigError: no generator, or x is not [n, channels, height, width].
            ModelError: the input gets no gradient, or a NaN.
        """
        generator = check_generator(generator)
        _check_images(x)
        with crafting(model, x, y) as (x, y):
            x_adv = x.clone()
            logits = predicted(model, x)
            left = (logits.argmax(dim=1) == y).nonzero().squeeze(1)
            for number, attack in enumerate(self.attacks(logits.shape[1]).values()):
                if not len(left):
                    break
                found = attack(model, x[left], y[left], generator=generator)
                fooled = predicted(model, found).argmax(dim=1) != y[left]
                kept = torch.ones_like(fooled) if number == 0 else fooled
                x_adv[left[kept]] = found[kept]
                left = left[~fooled]
        return x_adv

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator,
        batch_size: int = 250,
        resume: str | Path | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Evaluation:
        """Which points survive, after each attack, and whether the number is to be trusted.

        Evaluation mode, fp32, no autocast; the model comes back as it was. Each attack and batch draws from
        its own stream, seeded by one draw from ``generator``, so that an evaluation that was killed and is
        called again with the same arguments ends with the result of the uninterrupted one.

        The flags, also given as warnings (thresholds: the authors'):

        - "randomised": five forwards of the first batch differ by more than 1e-4 in normalised logits, or in
          their accuracy. Needs averaged gradients, which this evaluation has not.
        - "probabilities": the outputs are non-negative and sum to 1. Pass the logits.
        - "zero_gradients": the margin's gradient is exactly 0 at one correctly classified point or more.
        - "square_wins": Square, without gradients, breaks more than 0.2 % of all points after the others.
        - "few_classes": fewer than four; see the class.

        Args:
            model: gives logits [n, C]; parameters in fp32 or fp64.
            x: inputs in [0, 1], [n, channels, height, width], on any device.
            y: labels, [n].
            generator: the source of the evaluation's seed.
            batch_size: points attacked at a time; part of what a result depends on.
            resume: file of the state, written after every batch of every attack; read if it is there.
            progress: called with one line after every batch.

        Raises:
            ConfigError: inputs outside [0, 1], no images, no points, or labels of another length.
            ModelError: half precision, one class, or no gradient or a NaN at the input.
            CheckpointError: ``resume`` is unreadable or belongs to another evaluation.
        """
        check_count(batch_size, "batch_size")
        _check_images(x)
        _check_points(x, y)
        device = _check_precision(model, x)
        seed = _draw_seed(check_generator(generator))
        with ExitStack() as stack:
            stack.enter_context(modes.evaluation(model))
            stack.enter_context(torch.autocast(device.type, enabled=False))
            points = _Points(model, x, y, device, batch_size)
            marks = {}
            if resume is not None:
                marks = evaluation_marks(asdict(self), model, x, y, seed=seed, batch_size=batch_size)
            file = VerdictFile(None if resume is None else Path(resume), marks)
            verdicts = file.read()
            if verdicts is None:
                verdicts = points.first_look()
                file.write(verdicts)
            attacks = self.attacks(int(verdicts.signs["num_classes"]))
            for name, attack in attacks.items():
                # Those that were left when this attack began: also when it was resumed in the middle.
                here = [row for row, by in enumerate(verdicts.broken_by) if by in (None, name)]
                batches = [here[start : start + batch_size] for start in range(0, len(here), batch_size)]
                for number, rows in enumerate(batches):
                    if number < verdicts.done.get(name, 0):
                        continue
                    stream = randomness.generator(seed, f"autoattack/{name}", number, device=device)
                    for row in points.fooled(attack, torch.tensor(rows), stream):
                        verdicts.broken_by[row] = name
                    verdicts.done[name] = number + 1
                    file.write(verdicts)
                    if progress is not None:
                        left = verdicts.broken_by.count(None)
                        progress(f"{name}: batch {number + 1} of {len(batches)}, {left} of {len(x)} left")
            if not verdicts.finished:
                verdicts.finished = True
                file.write(verdicts)
        found = _evaluation(verdicts, list(attacks))
        for flag in found.flags:
            warnings.warn(flag.text, stacklevel=2)
        return found


@dataclass(frozen=True)
class _Points:
    """The points under evaluation, moved to the model's device batch by batch."""

    model: nn.Module
    x: Tensor
    y: Tensor
    device: torch.device
    batch_size: int

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.x[rows.to(self.x.device)], self.y[rows.to(self.y.device)]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.to(self.device, dtype), y.to(self.device)

    def first_look(self) -> Verdicts:
        """Which points are misclassified without an attack, and the signs that the flags come from."""
        broken: list[str | None] = []
        num_classes, zero = 0, 0
        for rows in torch.arange(len(self.x)).split(self.batch_size):
            logits, without_gradient = self.look(rows)
            num_classes = logits.shape[1]
            if num_classes < 2:
                raise ModelError(f"the model has {num_classes} class; an attack needs at least 2")
            right = logits.argmax(dim=1).cpu() == self.y[rows.to(self.y.device)].cpu()
            zero += int((without_gradient.cpu() & right).sum())
            broken += [None if correct else CLEAN for correct in right.tolist()]
        signs = {"num_classes": num_classes, "zero_gradients": zero, **self.first_batch_signs()}
        return Verdicts(broken, signs=signs)

    def fooled(self, attack: Attack, rows: Tensor, stream: torch.Generator) -> list[int]:
        """Those of the rows that the attack breaks."""
        x, y = self.batch(rows)
        x_adv = attack(self.model, x, y, generator=stream)
        with crafting(self.model, x_adv, y):
            fooled = (predicted(self.model, x_adv).argmax(dim=1) != y).cpu()
        found: list[int] = rows[fooled].tolist()
        return found

    def look(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and which points have a margin whose gradient is exactly 0."""
        x, y = self.batch(rows)
        with crafting(self.model, x, y) as (x, y):
            found = ascent(self.model, x, lambda logits: margins(logits, y))
        return found.logits, lengths(found.gradient, "linf") == 0

    def first_batch_signs(self) -> dict[str, float]:
        """How much five forwards of the first batch differ, and whether they are probabilities."""
        x, y = self.batch(torch.arange(min(self.batch_size, len(self.x))))
        with crafting(self.model, x, y) as (x, y):
            outputs = [predicted(self.model, x) for _ in range(RANDOM_FORWARDS)]
        unit = [z / lengths(z, "l2").clamp_min(1e-10)[:, None] for z in outputs]
        differences = [float(lengths(z - unit[0], "l2").max()) for z in unit[1:]]
        counts = {int((z.argmax(dim=1) == y).sum()) for z in outputs}
        sums = (outputs[0].sum(dim=1) - 1).abs().max()
        probable = float(outputs[0].min()) > -PROBABILITY_ERROR and float(sums) < PROBABILITY_ERROR
        return {
            "difference": min(max(differences), ALWAYS_RANDOM) if len(counts) == 1 else ALWAYS_RANDOM,
            "probabilities": float(probable),
        }


def _evaluation(verdicts: Verdicts, attacks: list[str]) -> Evaluation:
    broken = Counter(verdicts.broken_by)
    n = left = len(verdicts.broken_by)
    remaining = {}
    for name in (CLEAN, *attacks):
        left -= broken[name]
        remaining[name] = left
    flags = _flags(verdicts.signs, n, remaining[CLEAN], broken["square"])
    return Evaluation(n, remaining, tuple(verdicts.broken_by), tuple(flags), verdicts.seconds)


def _flags(signs: dict[str, float], n: int, correct: int, by_square: int) -> list[Flag]:
    found = []
    if signs["difference"] > RANDOM_DIFFERENCE:
        text = (
            "forwards of the same inputs differ: a randomised model needs gradients averaged over its noise"
        )
        found.append(Flag("randomised", text))
    if signs["probabilities"]:
        text = "the outputs look like probabilities: pass the logits, whose gradients do not vanish"
        found.append(Flag("probabilities", text))
    if zero := int(signs["zero_gradients"]):
        text = (
            f"the gradient is exactly 0 at {zero} of {correct} correctly classified points: it may be masked "
            "(quantised inputs, saturation)"
        )
        found.append(Flag("zero_gradients", text))
    if by_square > SQUARE_SHARE * n:
        text = (
            f"Square, which uses no gradients, broke {by_square} of {n} points after the gradient attacks: "
            "gradients may be masked, and the robust accuracy lower still"
        )
        found.append(Flag("square_wins", text))
    if (num_classes := int(signs["num_classes"])) < 4:
        instead = "the untargeted one is used" if num_classes == 3 else "only the cross-entropy is used"
        text = f"{num_classes} classes: the targeted DLR loss is undefined below 4, {instead}"
        found.append(Flag("few_classes", text))
    return found


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


def _check_images(x: Tensor) -> None:
    # Before the hours that the gradient attacks take, not when Square begins.
    if x.dim() != 4:
        raise ConfigError(
            f"AutoAttack needs images [n, channels, height, width] for Square, not {list(x.shape)}"
        )


def _check_points(x: Tensor, y: Tensor) -> None:
    if not len(x) or y.shape != (len(x),):
        raise ConfigError(
            f"x has shape {list(x.shape)} and y {list(y.shape)}; y must be [n], and n at least 1"
        )
    check_inputs(x)


def _check_precision(model: nn.Module, x: Tensor) -> torch.device:
    """The device to work on; ModelError where the model has half-precision parameters."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ModelError(
                f"parameter {name} is {parameter.dtype}: gradients underflow; evaluate model.float()"
            )
    return next((parameter.device for parameter in model.parameters()), x.device)
