"""From a RunConfig to its objects: data on the device, model, optimizer, method, probe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tangentlab import data, modes, randomness
from tangentlab.attacks import FGSM, PGD, Attack
from tangentlab.errors import ConfigError, ModelError, TangentlabError, first_line
from tangentlab.models import Normalize, NormalizeEach, check_output, model_class
from tangentlab.probes import KernelProbe, LazySwitch, OverfittingAlarm
from tangentlab.runs.config import RunConfig
from tangentlab.runs.parsing import FROM_DATA, build_method, build_other_method
from tangentlab.training import SCHEDULES, Batch, Method, Share, TrainingState
from tangentlab.training.schedules import piecewise


@dataclass(frozen=True)
class Examples:
    """The data of a run: what it trains on, is selected by, and is judged on."""

    dataset: data.Dataset
    train: data.Split
    validation: data.Split

    @property
    def test(self) -> data.Split:
        return self.dataset.test


def build_data(config: RunConfig) -> Examples:
    """Read the data set and split the training set; raises DataError or ConfigError."""
    dataset = data.load(config.data.name, config.data.root)
    train, validation = data.train_validation(
        dataset.train.labels,
        train_size=config.data.train_size,
        validation_size=config.data.validation_size,
        seed=config.seed,
    )
    return Examples(dataset, dataset.train.select(train), dataset.train.select(validation))


def build_batches(
    config: RunConfig, examples: Examples, device: torch.device, part: Share | None = None
) -> data.Batches:
    """The run's training batches, or this process's share of them; raises ConfigError."""
    part = part or Share()
    return data.Batches(
        examples.train,
        batch_size=config.training.batch_size,
        seed=config.seed,
        augmentation=config.data.augmentation,
        device=device,
        rank=part.rank,
        world_size=part.world_size,
    )


def steps_per_epoch(config: RunConfig, batches: data.Batches) -> int:
    """Optimizer updates of an epoch; a method may take each batch several times."""
    return batches.steps_per_epoch * int(build_method(config).replays)


def training_batch(batches: data.Batches, number: int, total: int, part: Share | None = None) -> Batch:
    """The batch of that number, of ``total`` training examples, as a method takes it."""
    x, y, index = batches.batch(number)
    epoch = number // batches.steps_per_epoch
    view = partial(batches.placement, number, x)
    return Batch(x, y, index, total, epoch, view=view, share=part or Share())


def build_model(
    config: RunConfig,
    examples: Examples,
    device: torch.device,
    *,
    allow_import: Iterable[str] = (),
) -> nn.Module:
    """The network on ``device``, its initial weights a function of the seed.

    Raises:
        ModelError: it cannot be built, or does not map the data to [n, C].
    """
    chosen: Callable[..., nn.Module] = model_class(config.model["name"], allow_import)
    settings = {key: value for key, value in config.model.items() if key != "name"}
    given = {"input_shape": examples.dataset.input_shape, "num_classes": examples.dataset.num_classes}
    accepted = set(inspect.signature(chosen).parameters) & FROM_DATA
    # Initialisation draws from PyTorch's global generator; fork_rng gives it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.derive_seed(config.seed, "initialization"))
        try:
            model = chosen(**settings, **{name: given[name] for name in accepted})
        except TangentlabError:
            raise
        except Exception as error:  # somebody else's constructor may raise anything
            raise ModelError(
                f"model {config.model['name']!r} cannot be built: {first_line(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {config.model['name']!r} makes a {type(model).__name__}, not an nn.Module")
    if config.data.normalize == "per-image":
        model = nn.Sequential(NormalizeEach(), model)
    elif config.data.normalize:
        pixels = examples.train.x().transpose(0, 1).flatten(1)
        model = nn.Sequential(Normalize(pixels.mean(dim=1), pixels.std(dim=1)), model)
    if config.training.batchnorm_momentum is not None:
        for module in modes.batchnorm_modules(model):
            module.momentum = config.training.batchnorm_momentum
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    check_output(model, examples.train.x(slice(0, 2), device), examples.dataset.num_classes)
    return model


def build_state(config: RunConfig, model: nn.Module) -> TrainingState:
    """A training state at step 0: SGD over the model's parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError(f"model {config.model['name']!r} has no parameter that requires a gradient")
    optimizer = torch.optim.SGD(
        trainable,
        lr=config.training.learning_rate,
        momentum=config.training.momentum,
        weight_decay=config.training.weight_decay,
        # On the CPU it rounds otherwise than what the published results were made with.
        fused=(trainable[0].is_cuda and all(map(_dense, trainable))) or None,
    )
    averaged = None
    if config.training.ema_decay is not None:
        average = get_ema_multi_avg_fn(config.training.ema_decay)
        averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    loss_sum = torch.zeros((), dtype=torch.float64, device=trainable[0].device)
    return TrainingState(model=model, optimizer=optimizer, loss_sum=loss_sum, averaged=averaged)


def _dense(parameter: nn.Parameter) -> bool:
    """Whether it fills its memory; a fused optimizer takes the memory for granted."""
    return torch.empty_like(parameter).stride() == parameter.stride()


def learning_rate(config: RunConfig, steps: int) -> Callable[[int], float]:
    """step -> learning rate of that update."""
    schedule = _schedule(config, config.training.schedule)
    warming = max(config.training.warmup * steps, 1.0)
    return lambda step: (
        config.training.learning_rate * min(1.0, (step + 1) / warming) * schedule(step / steps)
    )


def _schedule(config: RunConfig, name: str) -> Callable[[float], float]:
    if name == "piecewise":
        return partial(piecewise, milestones=config.training.milestones)
    return SCHEDULES[name]


def method_schedule(config: RunConfig, steps: int, *, other: bool = False) -> Callable[[int], Method]:
    """step -> the method, or the one that the switch turns to, with that step's eps and step_size.

    Raises:
        ConfigError: eps has a schedule and the method no eps.
    """
    method: Any = build_other_method(config) if other else build_method(config)
    if config.training.eps_schedule == "constant":
        return lambda _: method
    if not hasattr(method, "eps"):
        name = (config.switch.to if other else config.method)["name"]
        raise ConfigError(
            f"training.eps_schedule={config.training.eps_schedule!r}, but method {name!r} has no eps"
        )
    factor = eps_factor(config, steps)

    def at(step: int) -> Method:
        sizes = {name: getattr(method, name, None) for name in ("eps", "step_size")}
        changed: Method = replace(
            method, **{name: factor(step) * size for name, size in sizes.items() if size is not None}
        )
        return changed

    return at


def eps_factor(config: RunConfig, steps: int) -> Callable[[int], float]:
    """step -> what eps and the step size are multiplied by."""
    schedule = _schedule(config, config.training.eps_schedule)
    return lambda step: max(schedule(step / steps), 1e-3)


def build_attack(config: RunConfig, *, num_steps: int, num_restarts: int = 1) -> PGD:
    """PGD in the run's threat model, in steps of eps/4 from a random start."""
    return PGD(config.eps, config.eps / 4, num_steps, num_restarts)


def build_probe(config: RunConfig, examples: Examples) -> KernelProbe | None:
    """The probe on class-balanced training examples: clean, FGSM and PGD inputs; None for size 0."""
    if not config.probe.size:
        return None
    attacks: Mapping[str, Attack | None] = {
        "clean": None,
        "fgsm": FGSM(config.eps),
        "pgd": build_attack(config, num_steps=config.probe.num_steps),
    }
    return KernelProbe(
        *_watched(config, examples, config.probe.size),
        inputs=attacks,
        seed=config.seed,
        memory=config.probe.memory,
        sketch=config.probe.sketch,
    )


def trained_eps(config: RunConfig) -> float:
    """The radius that the method trains in, before any schedule; of one without, the run's."""
    return float(config.method.get("eps", config.eps))


def build_alarm(config: RunConfig, examples: Examples) -> OverfittingAlarm:
    """The alarm on class-balanced training examples."""
    return OverfittingAlarm(
        *_watched(config, examples, config.alarm.size),
        eps=trained_eps(config),
        threshold=config.alarm.threshold,
    )


def build_switch(config: RunConfig, examples: Examples, *, steps: int, steps_per_epoch: int) -> LazySwitch:
    """The switch on class-balanced training examples, its safety net on validation examples.

    Raises:
        ConfigError: the fixed rule's epoch is no step within the training, or the safety net wants more
            examples than there are.
    """
    setting = config.switch
    at = round(setting.epoch * steps_per_epoch) if setting.rule == "fixed" else None
    if at is not None and not 0 < at < steps:
        raise ConfigError(f"switch.epoch={setting.epoch} is step {at}; the training's are 1 to {steps - 1}")
    if setting.held_out > len(examples.validation):
        raise ConfigError(
            f"switch.held_out={setting.held_out} is out of range; the validation split has "
            f"{len(examples.validation)} examples"
        )
    attack = build_attack(config, num_steps=setting.num_steps)
    held_out = examples.validation.select(torch.arange(setting.held_out))
    return LazySwitch(
        *_watched(config, examples, setting.size),
        every=every_steps(setting.every, steps_per_epoch),
        attack=attack if setting.inputs == "pgd" else None,
        at=at,
        threshold=setting.threshold,
        resume=setting.resume,
        patience=setting.patience,
        return_on_drop=setting.return_on_drop,
        held_out=(held_out.x(), held_out.labels) if setting.held_out else None,
        guard=attack if setting.held_out else None,
        max_fall=setting.max_fall,
        seed=config.seed,
        sketch=setting.sketch,
        memory=config.probe.memory,
    )


def _watched(config: RunConfig, examples: Examples, size: int) -> tuple[Tensor, Tensor]:
    """Class-balanced training examples and their labels."""
    index = data.class_balanced(examples.train.labels, size, seed=config.seed)
    return examples.train.x(index), examples.train.labels[index]


def resolve_device(name: str) -> torch.device:
    """ "auto" -> cuda where there is one, else cpu."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not available on this machine; choose from 'auto', 'cpu'")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def every_steps(epochs: float, steps_per_epoch: int) -> int:
    """Epochs between events, as whole steps, at least one."""
    return max(1, round(epochs * steps_per_epoch))
