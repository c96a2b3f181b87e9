"""RunConfig: everything that determines a run, as frozen dataclasses that validate themselves.

Where one comes from, YAML, dotted overrides or plain values, is parsing.py's matter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tangentlab.attacks.threat import check_eps
from tangentlab.data import DATASETS, Augmentation
from tangentlab.errors import ConfigError, unknown_choice
from tangentlab.probes.lazy_switch import check_rule
from tangentlab.probes.overfitting_alarm import THRESHOLD, check_threshold
from tangentlab.records import SCHEMA
from tangentlab.training import SCHEDULES

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class DataConfig:
    """The data set and what is done to its images.

    Args:
        name: digits, breast-cancer, mnist, fashion-mnist, cifar10 or cifar100.
        root: folder that holds the data in their authors' layout; none for the cache folder.
        train_size: training examples, class-balanced; none for all that validation leaves.
        validation_size: examples of the training set kept for validation, class-balanced.
        crop: pixels of padding before a random crop; 0 for no crop.
        padding: zero or reflect.
        flip: flip horizontally with probability one half.
        normalize: as the network's first layer, subtract the training images' channel means and divide by
            their standard deviations (true), or each image's own mean and standard deviation (per-image).
    """

    name: str = "digits"
    root: str | None = None
    train_size: int | None = None
    validation_size: int = 300
    crop: int = 0
    padding: Literal["zero", "reflect"] = "zero"
    flip: bool = False
    normalize: bool | Literal["per-image"] = False

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise ConfigError(unknown_choice("data.name", self.name, DATASETS))
        _at_least("data.train_size", self.train_size, 1)
        _at_least("data.validation_size", self.validation_size, 1)
        _ = self.augmentation

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(crop=self.crop, padding=self.padding, flip=self.flip)


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer, SGD with momentum, and how long it runs.

    Args:
        epochs: passes over the training set.
        batch_size: examples an update, over all processes.
        learning_rate: the schedule's peak.
        momentum: in [0, 1).
        weight_decay: added to the gradient times the weights.
        schedule: of the learning rate: constant, piecewise, cyclic, cosine, one_cycle or linear.
        warmup: share of the training over which the learning rate rises linearly to the schedule's.
        milestones: shares of the training at which the piecewise schedule divides by 10.
        eps_schedule: of the method's eps and step_size, likewise; a thousandth of them at least.
        ema_decay: of an exponential moving average of the weights and buffers, which is then what is
            evaluated and kept as best; none for no average.
        batchnorm_momentum: of BatchNorm's buffers; none for what the model has.
        keep_every: epochs between checkpoints of the weights that are kept, the first before training;
            none for best and last alone.
    """

    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "piecewise"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    eps_schedule: str = "constant"
    ema_decay: float | None = None
    batchnorm_momentum: float | None = None
    keep_every: float | None = None

    def __post_init__(self) -> None:
        _at_least("training.epochs", self.epochs, 1)
        _at_least("training.batch_size", self.batch_size, 2)
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"training.learning_rate={self.learning_rate} is out of range; above 0")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"training.momentum={self.momentum} is out of range [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"training.weight_decay={self.weight_decay} is out of range; at least 0")
        for name in ("schedule", "eps_schedule"):
            if getattr(self, name) not in SCHEDULES:
                raise ConfigError(unknown_choice(f"training.{name}", getattr(self, name), SCHEDULES))
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"training.warmup={self.warmup} is out of range [0, 1)")
        if not all(0 < share < 1 for share in self.milestones):
            raise ConfigError(f"training.milestones={list(self.milestones)} is out of range (0, 1)")
        if self.keep_every is not None and not 0 < self.keep_every < math.inf:
            raise ConfigError(f"training.keep_every={self.keep_every} is out of range; above 0")
        for name in ("ema_decay", "batchnorm_momentum"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"training.{name}={value} is out of range (0, 1)")


@dataclass(frozen=True)
class EvaluationConfig:
    """Clean, FGSM and PGD accuracy: on the validation split while training, on the test set at the end.

    Args:
        every: epochs between evaluations on the validation split; fractions are allowed.
        num_steps: PGD steps on the validation split.
        test_num_steps: PGD steps on the test set.
        test_num_restarts: PGD restarts on the test set.
        test_size: test examples, the first of the set; none for all.
    """

    every: float = 1.0
    num_steps: int = 10
    test_num_steps: int = 50
    test_num_restarts: int = 1
    test_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.every < math.inf:
            raise ConfigError(f"evaluation.every={self.every} is out of range; above 0")
        for name in ("num_steps", "test_num_steps", "test_num_restarts", "test_size"):
            _at_least(f"evaluation.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class ProbeConfig:
    """The kernel probe that watches the run.

    Args:
        size: class-balanced training examples whose kernel is followed; 0 for no probe.
        every: epochs between snapshots; fractions are allowed.
        early: snapshots at the steps 1, 2, 4, 8, ... before the first of those too.
        num_steps: PGD steps of the probe's own attack.
        memory: bound on the kernel engine's working memory.
        sketch: features of the probe's random projections; null for exact kernels.
    """

    size: int = 50
    every: float = 1.0
    early: bool = False
    num_steps: int = 10
    memory: str = "2GiB"
    sketch: int | None = None

    def __post_init__(self) -> None:
        _at_least("probe.size", self.size, 0)
        if self.sketch is not None:
            _at_least("probe.sketch", self.sketch, 1)
        _at_least("probe.num_steps", self.num_steps, 1)
        if not 0 < self.every < math.inf:
            raise ConfigError(f"probe.every={self.every} is out of range; above 0")


@dataclass(frozen=True)
class AlarmConfig:
    """The alarm of catastrophic overfitting: see tangentlab.OverfittingAlarm.

    Args:
        every: steps between looks, for a collapse takes steps and not epochs; none for no alarm. Of the
            switch's rule alarm 25.
        size: class-balanced training examples; each look takes a third of them.
        threshold: raised while the confidence share lies below it, in (0, 1). Of the rule alarm 0.9.
        restore: whenever it is raised, go back to the weights of the last look at which it was not; momentum
            begins at zero.
    """

    every: int | None = None
    size: int = 75
    threshold: float = THRESHOLD
    restore: bool = False

    def __post_init__(self) -> None:
        _at_least("alarm.every", self.every, 1)
        _at_least("alarm.size", self.size, 3)
        check_threshold(self.threshold, "alarm.threshold")


@dataclass(frozen=True)
class SwitchConfig:
    """When the method gives way to another, and comes back: see tangentlab.LazySwitch and the alarm.

    Args:
        rule: none; fixed, at an epoch; kernel, in its lazy stage; or alarm, while it is raised.
        to: {"name": ..., settings}, the other method. By default atta, one step from what the method kept; of
            the rule alarm pgd, in two steps.
        epoch: of the fixed rule.
        every: epochs between looks; fractions are allowed.
        size: class-balanced training examples whose kernel is watched.
        inputs: what it is watched on, clean or pgd.
        threshold: lazy below this share of the fastest velocity, scaled down by the root of the learning
            rate where that has fallen.
        resume: learning again above this share.
        patience: looks in a row.
        return_on_drop: come back where the learning rate falls to half or less from one step to the next.
        held_out: validation examples of the safety net; 0 for none.
        max_fall: come back where robust accuracy on them falls by this much.
        num_steps: PGD steps of the safety net, and of the pgd inputs.
        sketch: features of random projections; null for exact kernels.
    """

    rule: Literal["none", "fixed", "kernel", "alarm"] = "none"
    to: Mapping[str, Any] = field(default_factory=dict)
    epoch: float = 0.0
    every: float = 0.5
    size: int = 20
    inputs: Literal["clean", "pgd"] = "clean"
    threshold: float = 0.6
    resume: float = 0.9
    patience: int = 2
    return_on_drop: bool = False
    held_out: int = 0
    max_fall: float = 0.05
    num_steps: int = 5
    sketch: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.every < math.inf:
            raise ConfigError(f"switch.every={self.every} is out of range; above 0")
        for name, least in (("size", 2), ("num_steps", 1), ("held_out", 0), ("sketch", 1)):
            _at_least(f"switch.{name}", getattr(self, name), least)
        check_rule(
            threshold=self.threshold,
            resume=self.resume,
            patience=self.patience,
            max_fall=self.max_fall,
            section="switch.",
        )


@dataclass(frozen=True)
class RunConfig:
    """One run.

    Args:
        name: names the run and its default folder, runs/NAME.
        seed: every random draw derives from it.
        eps: radius of the linf ball that the network is evaluated in, inputs in [0, 1]; "8/255" is fine.
            A method's own eps is this one unless it says otherwise, its step_size a quarter of its eps.
        data: the data set.
        model: {"name": ..., settings}; the name is small_cnn, mlp, preactresnet18 or package.module:Class.
        method: {"name": ..., settings}; the name is one of tangentlab.training.METHODS. "lazy" is written
            for pgd with the switch's rule kernel, "spectral" for fgsm_rs with its rule alarm.
        training: the optimizer.
        evaluation: what is evaluated and how often.
        probe: the kernel probe.
        alarm: of catastrophic overfitting.
        switch: between the method and another.
        device: auto (cuda where there is one, else cpu), cpu or cuda.
        precision: fp32, or bf16 for training steps in mixed precision; evaluation and kernels are fp32.
        channels_last: lay images and convolutions out with the channels last; rounding depends on it.
        processes: data-parallel processes; each takes its share of the batch.
        threads: CPU threads of each process; none for PyTorch's own choice. Rounding depends on it.
    """

    name: str = "run"
    seed: int = 0
    eps: float = 8 / 255
    data: DataConfig = field(default_factory=DataConfig)
    model: Mapping[str, Any] = field(default_factory=lambda: {"name": "small_cnn"})
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "standard"})
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    switch: SwitchConfig = field(default_factory=SwitchConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "fp32"
    channels_last: bool = False
    processes: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        check_eps(self.eps)
        _at_least("processes", self.processes, 1)
        _at_least("threads", self.threads, 1)
        if (
            not isinstance(self.name, str)
            or not re.fullmatch(r"[\w.+=-]+", self.name)
            or self.name.startswith(".")
        ):
            raise ConfigError(f"name {self.name!r} is no folder name; use letters, digits and . _ + = -")
        if self.switch.rule == "fixed" and not 0 < self.switch.epoch < self.training.epochs:
            raise ConfigError(
                f"switch.epoch={self.switch.epoch} is out of range (0, {self.training.epochs}), the training "
                "that the fixed rule switches in"
            )
        if self.switch.rule == "alarm" and self.alarm.every is None:
            raise ConfigError("switch.rule is 'alarm', but alarm.every is null; give the steps between looks")
        if self.training.batch_size % self.processes:
            raise ConfigError(
                f"training.batch_size={self.training.batch_size} is no multiple of processes={self.processes}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as config.yaml holds them."""
        return {"schema": SCHEMA, **{key: _plain(value) for key, value in asdict(self).items()}}


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{name}={value} is out of range; at least {least}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
