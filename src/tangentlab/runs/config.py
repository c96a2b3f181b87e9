"""RunConfig: everything that determines a run, from YAML, dotted overrides or Python.

A configuration is parsed in two passes: the names of the model and the method are read first, then their
settings are checked against the signatures of just those. ``resolve`` fills in every default, so that the
resolved configuration reruns the run.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from tangentlab.attacks.threat import check_eps
from tangentlab.data import DATASETS, Augmentation
from tangentlab.errors import ConfigError, TangentlabError, unknown_choice
from tangentlab.models import model_class
from tangentlab.records import SCHEMA
from tangentlab.training import METHODS, SCHEDULES

# The parts of a RunConfig: fixed sections, and those whose settings depend on a name.
SECTIONS = ("data", "training", "evaluation", "probe")
CHOSEN = ("model", "method")
# What a model's constructor is given by the data set and not by the configuration.
FROM_DATA = {"input_shape", "num_classes"}


@dataclass(frozen=True)
class DataConfig:
    """The data set and what is done to its images.

    Args:
        name: digits, mnist, fashion-mnist, cifar10 or cifar100.
        root: folder that holds the data in their authors' layout; none for the cache folder.
        train_size: training examples, class-balanced; none for all that validation leaves.
        validation_size: examples of the training set kept for validation, class-balanced.
        crop: pixels of padding before a random crop; 0 for no crop.
        padding: zero or reflect.
        flip: flip horizontally with probability one half.
        normalize: subtract the training images' channel means and divide by their standard deviations,
            as the network's first layer.
    """

    name: str = "digits"
    root: str | None = None
    train_size: int | None = None
    validation_size: int = 300
    crop: int = 0
    padding: Literal["zero", "reflect"] = "zero"
    flip: bool = False
    normalize: bool = False

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
        schedule: constant, piecewise or cyclic.
    """

    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "piecewise"

    def __post_init__(self) -> None:
        _at_least("training.epochs", self.epochs, 1)
        _at_least("training.batch_size", self.batch_size, 2)
        if not self.learning_rate > 0:
            raise ConfigError(f"training.learning_rate={self.learning_rate} is out of range; above 0")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"training.momentum={self.momentum} is out of range [0, 1)")
        if not self.weight_decay >= 0:
            raise ConfigError(f"training.weight_decay={self.weight_decay} is out of range; at least 0")
        if self.schedule not in SCHEDULES:
            raise ConfigError(unknown_choice("training.schedule", self.schedule, SCHEDULES))


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
        if not self.every > 0:
            raise ConfigError(f"evaluation.every={self.every} is out of range; above 0")
        for name in ("num_steps", "test_num_steps", "test_num_restarts", "test_size"):
            _at_least(f"evaluation.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class ProbeConfig:
    """The kernel probe that watches the run.

    Args:
        size: class-balanced training examples whose kernel is followed; 0 for no probe.
        every: epochs between snapshots; fractions are allowed.
        num_steps: PGD steps of the probe's own attack.
        memory: bound on the kernel engine's working memory.
    """

    size: int = 50
    every: float = 1.0
    num_steps: int = 10
    memory: str = "2GiB"

    def __post_init__(self) -> None:
        _at_least("probe.size", self.size, 0)
        _at_least("probe.num_steps", self.num_steps, 1)
        if not self.every > 0:
            raise ConfigError(f"probe.every={self.every} is out of range; above 0")


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
        method: {"name": ..., settings}; the name is standard, fgsm or pgd.
        training: the optimizer.
        evaluation: what is evaluated and how often.
        probe: the kernel probe.
        device: auto (cuda where there is one, else cpu), cpu or cuda.
        precision: fp32, or bf16 for training steps in mixed precision; evaluation and kernels are fp32.
        processes: data-parallel processes; each takes its share of the batch.
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    processes: int = 1

    def __post_init__(self) -> None:
        check_eps(self.eps)
        _at_least("processes", self.processes, 1)
        if not re.fullmatch(r"[\w.+=-]+", self.name) or self.name.startswith("."):
            raise ConfigError(f"name {self.name!r} is no folder name; use letters, digits and . _ + = -")
        if self.training.batch_size % self.processes:
            raise ConfigError(
                f"training.batch_size={self.training.batch_size} does not divide by processes={self.processes}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as config.yaml holds them."""
        return _plain({"schema": SCHEMA, **asdict(self)})


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = resources.files("tangentlab") / "configs"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_config(
    source: str | Path, overrides: Sequence[str] = (), *, allow_import: Iterable[str] = ()
) -> RunConfig:
    """The configuration in a YAML file, a run folder, or one of :func:`shipped_configs`, with overrides.

    Args:
        source: path or shipped name.
        overrides: command-line words, ``["--training.epochs", "3", "--method=pgd"]``; a bare ``--method`` or
            ``--model`` sets the name and drops the other's settings.
        allow_import: packages that a model may be imported from.

    Raises:
        ConfigError: no such file, unknown key, wrong type, out of range.
    """
    return resolve(merge(read_yaml(source), parse_overrides(overrides)), allow_import=allow_import)


def resolve(values: Mapping[str, Any], *, allow_import: Iterable[str] = ()) -> RunConfig:
    """A RunConfig from nested plain values, checked, with every default filled in.

    >>> resolve({"eps": "8/255", "method": {"name": "pgd"}}).method["step_size"] == 2 / 255
    True
    """
    values = _ratios(dict(values))
    schema = values.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise ConfigError(f"schema {schema!r} is unknown; this version reads {SCHEMA}")
    parser = config_parser(values, allow_import=allow_import)
    _check_keys(values, _known_keys(parser))
    try:
        parsed = parser.parse_object(values).as_dict()
    except TangentlabError:
        raise
    except Exception as error:  # the parser wraps whatever a type or a constructor raised
        raise ConfigError(_parser_message(error, values)) from error
    defaults = RunConfig()
    for section in SECTIONS:
        parsed[section] = type(getattr(defaults, section))(**parsed[section])
    config = RunConfig(**parsed)
    build_method(config)
    return config


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip()


def build_method(config: RunConfig) -> Any:
    """The method's frozen settings object; raises ConfigError where one is out of range."""
    return METHODS[config.method["name"]](**{k: v for k, v in config.method.items() if k != "name"})


def config_parser(values: Mapping[str, Any], *, allow_import: Iterable[str] = ()) -> Any:
    """A jsonargparse parser for the sections of RunConfig and the settings of the model and method named."""
    from jsonargparse import ArgumentParser

    eps = values.get("eps", RunConfig.eps)
    defaults = RunConfig()
    model_name = _name(values, "model", defaults.model["name"])
    method_name = _name(values, "method", defaults.method["name"])
    if method_name not in METHODS:
        raise ConfigError(unknown_choice("method", method_name, METHODS))
    parser = ArgumentParser(exit_on_error=False, prog="tangentlab train CONFIG", usage="%(prog)s [options]")
    described = _described(RunConfig)
    for entry in fields(RunConfig):
        if entry.name in CHOSEN:
            chosen, name, skip = (
                (model_class(model_name, allow_import), model_name, FROM_DATA)
                if entry.name == "model"
                else (METHODS[method_name], method_name, set())
            )
            parser.add_argument(f"--{entry.name}.name", type=str, default=name, help=described[entry.name])
            add = parser.add_class_arguments if inspect.isclass(chosen) else parser.add_function_arguments
            add(chosen, entry.name, skip=skip & set(inspect.signature(chosen).parameters), as_group=True)
        elif entry.name in SECTIONS:
            parser.add_class_arguments(type(getattr(defaults, entry.name)), entry.name)
        else:
            kind = {"device": Literal["auto", "cpu", "cuda"], "precision": Literal["fp32", "bf16"]}.get(
                entry.name, type(getattr(defaults, entry.name))
            )
            parser.add_argument(
                f"--{entry.name}",
                type=kind,
                default=getattr(defaults, entry.name),
                help=described[entry.name],
            )
    settings = {entry.name for entry in fields(METHODS[method_name])}  # type: ignore[arg-type]
    if "eps" in settings:
        parser.set_defaults({"method.eps": eps})
    if "step_size" in settings:
        method_eps = (
            values.get("method", {}).get("eps", eps) if isinstance(values.get("method"), Mapping) else eps
        )
        parser.set_defaults(
            {"method.step_size": method_eps / 4 if isinstance(method_eps, (int, float)) else 0.0}
        )
    return parser


def read_yaml(source: str | Path) -> dict[str, Any]:
    """The nested values of a YAML file, a run folder's config.yaml, or a shipped configuration."""
    path = Path(source)
    try:
        if str(source) in shipped_configs() and not path.exists():
            text = (resources.files("tangentlab") / "configs" / f"{source}.yaml").read_text()
        else:
            text = (path / "config.yaml" if path.is_dir() else path).read_text()
    except FileNotFoundError as error:
        choices = ", ".join(map(repr, shipped_configs()))
        raise ConfigError(
            f"no configuration {str(source)!r}; give a YAML file, a run folder, or {choices}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds a {type(values).__name__}, not settings")
    return values


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """``["--a.b", "1", "--c=x"]`` -> ``{"a": {"b": 1}, "c": "x"}``; values are YAML."""
    result: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(
                f"{word!r} is not a setting; settings are written --name value or --group.name value"
            )
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or re.match(r"--[A-Za-z]", rest[0]):
                raise ConfigError(f"--{key} has no value")
            text = rest.pop(0)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if key in CHOSEN:
            key = f"{key}.name"
        target = result
        *groups, leaf = key.split(".")
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--{key}: {group} is given a value and settings")
        target[leaf] = value
    return result


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid upon ``base``, section by section; another model or method drops the first's settings."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if not isinstance(below, Mapping) or not isinstance(value, Mapping):
            merged[key] = value
        elif key in CHOSEN and value.get("name", below.get("name")) != below.get("name"):
            merged[key] = dict(value)
        else:
            merged[key] = merge(below, value)
    return merged


# --- helpers ---------------------------------------------------------------------------------------------


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{name}={value} is out of range; at least {least}")


def _name(values: Mapping[str, Any], group: str, default: str) -> str:
    settings = values.get(group, {})
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{group}={settings!r} is not settings; write {group}: {{name: {settings}}}")
    return str(settings.get("name", default))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _known_keys(parser: Any) -> list[str]:
    """Every setting that has a value; the sections are its prefixes."""
    sections = {entry.name for entry in fields(RunConfig) if entry.name in SECTIONS or entry.name in CHOSEN}
    return [key for key in parser.get_defaults().keys() if key not in sections]  # noqa: SIM118


def _check_keys(values: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ConfigError for a key that is no setting, or a section that is given a value."""
    for key in _flat(values):
        group = key.rpartition(".")[0]
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside:
            raise ConfigError(f"{key} is a section, not a setting; its settings are {', '.join(inside)}")
        if key in known or any(key.startswith(f"{name}.") for name in known):
            continue
        siblings = [name for name in known if name.rpartition(".")[0] == group]
        near = difflib.get_close_matches(key, known, n=1)
        choices = siblings if siblings and (not near or near[0] in siblings) else near
        raise ConfigError(unknown_choice("setting", key, choices or known))


def _ratios(value: Any) -> Any:
    """ "8/255" -> 0.0314, wherever it stands."""
    if isinstance(value, Mapping):
        return {str(key): _ratios(item) for key, item in value.items()}
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*", value)
        if match and float(match[2]):
            return float(match[1]) / float(match[2])
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _described(cls: type) -> dict[str, str]:
    """What the docstring's Args say of each field."""
    text = inspect.getdoc(cls) or ""
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text.partition("Args:")[2], re.MULTILINE)
    return {name: " ".join(line.split()) for name, line in entries}


def _parser_message(error: Exception, values: Mapping[str, Any]) -> str:
    """One line from the parser's several: the key, the value given, and what was expected."""
    text = " ".join(str(error).split())
    key = re.search(r'[Kk]ey "([\w.]+)"', text)
    if key is None:
        return text
    value: Any = values
    for part in key[1].split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    expected = re.search(r"Expected an? (.+?)\. Got value", text)
    if expected is None:
        return f"{key[1]}={value!r}: {text.split(': ', 1)[-1]}"
    kind = re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", expected[1])
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    if choices:
        return unknown_choice(key[1], value, [choice.strip().strip("'") for choice in choices[1].split(",")])
    return f"{key[1]}={value!r} is not of type {kind}"
