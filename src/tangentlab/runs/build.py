"""From a RunConfig to its objects: data on the device, model, optimizer, method, probe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tangentlab import data, randomness
from tangentlab.attacks import FGSM, PGD, Attack
from tangentlab.errors import ConfigError, ModelError, TangentlabError, first_line
from tangentlab.models import Normalize, check_output, model_class
from tangentlab.probes import KernelProbe
from tangentlab.runs.config import RunConfig
from tangentlab.runs.parsing import FROM_DATA
from tangentlab.training import SCHEDULES, TrainingState


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
    if config.data.normalize:
        pixels = examples.train.x().transpose(0, 1).flatten(1)
        model = nn.Sequential(Normalize(pixels.mean(dim=1), pixels.std(dim=1)), model)
    model.to(device)
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
    )
    loss_sum = torch.zeros((), dtype=torch.float64, device=trainable[0].device)
    return TrainingState(model=model, optimizer=optimizer, loss_sum=loss_sum)


def learning_rate(config: RunConfig, steps: int) -> Callable[[int], float]:
    """step -> learning rate of that update."""
    schedule = SCHEDULES[config.training.schedule]
    return lambda step: config.training.learning_rate * schedule(step / steps)


def build_attack(config: RunConfig, *, num_steps: int, num_restarts: int = 1) -> PGD:
    """PGD in the run's threat model, in steps of eps/4 from a random start."""
    return PGD(config.eps, config.eps / 4, num_steps, num_restarts)


def build_probe(config: RunConfig, examples: Examples) -> KernelProbe | None:
    """The probe on class-balanced training examples: clean, FGSM and PGD inputs; None for size 0."""
    if not config.probe.size:
        return None
    index = data.class_balanced(examples.train.labels, config.probe.size, seed=config.seed)
    attacks: Mapping[str, Attack | None] = {
        "clean": None,
        "fgsm": FGSM(config.eps),
        "pgd": build_attack(config, num_steps=config.probe.num_steps),
    }
    return KernelProbe(
        examples.train.x(index),
        examples.train.labels[index],
        inputs=attacks,
        seed=config.seed,
        memory=config.probe.memory,
    )


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
