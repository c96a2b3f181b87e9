"""From YAML, dotted overrides and plain values to a RunConfig.

A configuration is parsed in two passes: the names of the model and the method are read first, then their
settings are checked against the signatures of just those. ``resolve`` fills in every default, so that the
resolved configuration reruns the run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from tangentlab.errors import ConfigError, ModelError, TangentlabError, first_line, nearest, unknown_choice
from tangentlab.models import model_class
from tangentlab.records import SCHEMA
from tangentlab.runs.config import AlarmConfig, RunConfig, SwitchConfig
from tangentlab.training import METHODS, Method

# The parts of a RunConfig: fixed sections, and those whose settings depend on a name.
SECTIONS = ("data", "training", "evaluation", "probe", "alarm", "switch")
CHOSEN = ("model", "method", "switch.to")
# A name that stands for a method and the switch's rule; and what the rules turn to.
NAMED_SWITCHES = {"lazy": ("pgd", "kernel"), "spectral": ("fgsm_rs", "alarm")}
SWITCHED_TO = {"fixed": "atta", "kernel": "atta", "alarm": "pgd"}
# Of the alarm, where the rule alarm leaves them open: to steer it is raised earlier than to warn. Of 0.85,
# 0.9 and 0.95 the last left training the most robust: benchmarks/cure_settings.py.
STEERING_ALARM = {"every": 25, "threshold": 0.95}
ALARM_STEPS = 2  # of PGD, while the alarm is raised
# What a model's constructor is given by the data set and not by the configuration.
FROM_DATA = {"input_shape", "num_classes"}
PLAIN = (int, float, str, list, tuple, type(None))
NUMBER = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"


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
    values, over = read_yaml(source), _expanded(parse_overrides(overrides))
    asked, before = _group(over, "switch.rule"), _rule(values)
    if isinstance(asked, str) and asked != before:
        values = _unruled(values, {asked, before})
    return resolve(merge(_underived(values, over), over), allow_import=allow_import)


def resolve(values: Mapping[str, Any], *, allow_import: Iterable[str] = ()) -> RunConfig:
    """A RunConfig from nested plain values, checked, with every default filled in.

    >>> resolve({"eps": "8/255", "method": {"name": "pgd"}}).method["step_size"] == 2 / 255
    True
    """
    values = _expanded({str(key): _numbers(str(key), value) for key, value in values.items()})
    if _group(values, "switch.to") and _rule(values) == "none":
        choices = ", ".join(map(repr, SWITCHED_TO))
        raise ConfigError(f"switch.to is given, but switch.rule is 'none'; choose from {choices}")
    if _rule(values) == "alarm" and isinstance(values.get("alarm", {}), Mapping):
        own = {key: value for key, value in values.get("alarm", {}).items() if value is not None}
        values["alarm"] = {**STEERING_ALARM, **own}
    schema = values.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise ConfigError(f"schema {schema!r} is unknown; this version reads {SCHEMA}")
    parser = config_parser(values, allow_import=allow_import)
    _check_keys(values, _known_keys(parser))
    _check_null(values, parser.get_defaults(), _nullable(values))
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
    method, other = build_method(config), build_other_method(config)
    if other is not None and other.replays != method.replays:
        raise ConfigError(
            f"switch.to {config.switch.to['name']!r} takes each batch {other.replays} times in a row and "
            f"method {config.method['name']!r} {method.replays}; they must agree"
        )
    return config


def settings_in_force(values: Mapping[str, Any], *, allow_import: Iterable[str] = ()) -> dict[str, Any]:
    """Dotted name -> value of the configuration, without what belongs to a switch or an alarm that is off."""
    values = dict(values)
    if _rule(values) == "none":
        values["switch"] = {"rule": "none"}
    if _rule(values) != "alarm" and _group(values, "alarm.every") in (None, {}):
        values["alarm"] = {"every": None}
    return _flat(resolve(values, allow_import=allow_import).to_dict())


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip()


def build_method(config: RunConfig) -> Method:
    """The method's frozen settings object; raises ConfigError where one is out of range."""
    return _method(config.method)


def build_other_method(config: RunConfig) -> Method | None:
    """The method that the switch turns to; None without a switch. Raises ConfigError likewise."""
    return _method(config.switch.to) if config.switch.rule != "none" else None


def _method(settings: Mapping[str, Any]) -> Method:
    return METHODS[settings["name"]](**{key: value for key, value in settings.items() if key != "name"})


def config_parser(values: Mapping[str, Any], *, allow_import: Iterable[str] = ()) -> Any:
    """A jsonargparse parser for the sections of RunConfig and the settings of the model and method named."""
    from jsonargparse import ArgumentParser

    values = _expanded(values)
    defaults = RunConfig()
    parser = ArgumentParser(exit_on_error=False, prog="tangentlab train CONFIG", usage="%(prog)s [options]")
    described, kinds = _described(RunConfig), get_type_hints(RunConfig)
    for entry in fields(RunConfig):
        if entry.name == "model":
            name = _name(values, "model", defaults.model["name"])
            _add_chosen(parser, "model", name, model_class(name, allow_import), described["model"])
        elif entry.name == "method":
            _add_method(parser, values, "method", defaults.method["name"], described["method"])
        elif entry.name in SECTIONS:
            section = type(getattr(defaults, entry.name))
            parser.add_class_arguments(section, entry.name, skip={"to"} & {f.name for f in fields(section)})
        else:
            parser.add_argument(
                f"--{entry.name}",
                type=kinds[entry.name],
                default=getattr(defaults, entry.name),
                help=described[entry.name],
            )
    rule = _rule(values)
    if rule in SWITCHED_TO:
        _add_method(parser, values, "switch.to", SWITCHED_TO[rule], _described(SwitchConfig)["to"])
        derived = parser.get_defaults()
        if derived["switch.to.name"] == "pgd" and rule == "alarm":
            parser.set_defaults({"switch.to.num_steps": ALARM_STEPS})
        if derived["switch.to.name"] == "atta":  # it goes on from what the method kept, and in its way
            own = {"switch.to.reset_epochs": None, "method.keep_perturbations": True}
            for name in ("crafting_statistics", "buffer_updates"):
                if f"method.{name}" in derived:
                    way = _group(values, "method").get(name, derived[f"method.{name}"])
                    own[f"switch.to.{name}"] = way
            parser.set_defaults({name: value for name, value in own.items() if name in derived})
    return parser


def _add_method(parser: Any, values: Mapping[str, Any], group: str, default: str, described: str) -> None:
    """A method's settings under ``group``; what it leaves open follows from the threat model."""
    name = _name(values, group, default)
    if name not in METHODS:
        raise ConfigError(
            unknown_choice(group, name, [*METHODS, *(NAMED_SWITCHES if group == "method" else ())])
        )
    _add_chosen(parser, group, name, METHODS[name], described)
    eps = values.get("eps", RunConfig.eps)
    open_settings = {entry.name for entry in fields(METHODS[name]) if entry.default is MISSING}  # type: ignore[arg-type]
    if "eps" in open_settings:
        parser.set_defaults({f"{group}.eps": eps})
    if "step_size" in open_settings:
        own = _group(values, group).get("eps", eps)
        # What is no number is refused when the values are parsed.
        share = _step_share(values, group)
        parser.set_defaults({f"{group}.step_size": share * own if isinstance(own, int | float) else 0.0})


def _rule(values: Mapping[str, Any]) -> str:
    """The switch's rule."""
    rule = _group(values, "switch.rule")
    return rule if isinstance(rule, str) else "none"


def _step_share(values: Mapping[str, Any], group: str) -> float:
    """A method's step_size over its eps, where it is left open; two steps have to get across the ball."""
    to = {"name": SWITCHED_TO["alarm"], "num_steps": ALARM_STEPS, **_group(values, group)}
    steered = group == "switch.to" and _rule(values) == "alarm"
    return 0.625 if steered and (to["name"], to["num_steps"]) == ("pgd", ALARM_STEPS) else 0.25


def _add_chosen(parser: Any, group: str, name: str, chosen: Any, described: str) -> None:
    skip = _not_settable(chosen, name)
    parser.add_argument(f"--{group}.name", type=str, default=name, help=described)
    add = parser.add_class_arguments if inspect.isclass(chosen) else parser.add_function_arguments
    add(chosen, group, skip=skip, as_group=True, fail_untyped=False)


def read_yaml(source: str | Path) -> dict[str, Any]:
    """The nested values of a YAML file, a run folder's config.yaml, or a shipped configuration."""
    path = Path(source)
    try:
        own = path.is_file() or (path / "config.yaml").is_file()
        if str(source) in shipped_configs() and not own:
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
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{source} holds a {type(values).__name__}, not settings")
    return values or {}


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
        if key in CHOSEN and not isinstance(value, dict):
            key = f"{key}.name"
        target = result
        *groups, leaf = key.split(".")
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--{key}: {group} is given a value and settings")
        target[leaf] = value
    return result


def merge(base: Mapping[str, Any], over: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """``over`` laid upon ``base``, section by section; another model or method drops the first's settings."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if not isinstance(below, Mapping) or not isinstance(value, Mapping):
            merged[key] = value
        elif f"{within}{key}" in CHOSEN and value.get("name", below.get("name")) != below.get("name"):
            merged[key] = dict(value)
        else:
            merged[key] = merge(below, value, f"{within}{key}.")
    return merged


# --- helpers ---------------------------------------------------------------------------------------------


def _underived(values: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without the methods' eps and step_size where they repeat an eps that ``over`` replaces."""
    eps = _numbers("eps", values.get("eps", RunConfig.eps))
    found = dict(values)
    if isinstance(values.get("method"), Mapping):
        share = _step_share(values, "method")
        found["method"] = _underived_method(values["method"], share, eps, over, over.get("method", {}))
    switch = values.get("switch")
    if isinstance(switch, Mapping) and isinstance(switch.get("to"), Mapping):
        share = _step_share(values, "switch.to")
        to = _underived_method(switch["to"], share, eps, over, _group(over, "switch.to"))
        found["switch"] = {**switch, "to": to}
    return found


def _underived_method(
    method: Mapping[str, Any], share: float, old: Any, over: Mapping[str, Any], own_over: Mapping[str, Any]
) -> dict[str, Any]:
    changed = "eps" in over or "eps" in own_over
    kept = {key: _numbers(key, value) for key, value in method.items()}
    own = kept.get("eps", old)
    if "eps" in over and own == old:
        kept.pop("eps", None)
    if changed and isinstance(own, int | float) and kept.get("step_size") == share * own:
        del kept["step_size"]
    return kept


def _expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with a method that names a switch written out, and without settings of none switched to."""
    found = dict(values)
    method, switch = values.get("method"), values.get("switch", {})
    if not isinstance(switch, Mapping):
        return found
    name = _group(values, "method.name")
    if isinstance(method, Mapping) and isinstance(name, str) and name in NAMED_SWITCHES:
        base, rule = NAMED_SWITCHES[name]
        if switch.get("rule", rule) != rule:
            raise ConfigError(f"method {name!r} is {base} with switch.rule {rule!r}, not {switch['rule']!r}")
        switch = {**switch, "rule": rule}
        found["method"] = {**method, "name": base}
    to = switch.get("to")
    if to == {}:  # as the resolved configuration of a run without a switch has it
        switch = {key: value for key, value in switch.items() if key != "to"}
    return {**found, "switch": switch} if switch else found


def _unruled(values: Mapping[str, Any], rules: set[str]) -> dict[str, Any]:
    """``values`` without what follows from the switch's rule, before it changes from one to another."""
    found = dict(values)
    dropped: dict[str, Mapping[str, Any]] = {}
    if "none" in rules:  # whatever they are
        for section, name in (("switch", "to"), ("method", "keep_perturbations")):
            dropped[section] = {name: _group(values, f"{section}.{name}")}
    if "alarm" in rules:  # where they are what the rule before left open
        own = STEERING_ALARM if _rule(values) == "alarm" else vars(AlarmConfig())
        dropped["alarm"] = {name: own[name] for name in STEERING_ALARM}
    for section, derived in dropped.items():
        if isinstance(values.get(section), Mapping):
            found[section] = {
                key: value for key, value in values[section].items() if (key, value) not in derived.items()
            }
    return found


def _group(values: Mapping[str, Any], group: str) -> Any:
    """The settings under "a.b"; {} where there are none."""
    found: Any = values
    for part in group.split("."):
        found = found.get(part, {}) if isinstance(found, Mapping) else {}
    return found


def _name(values: Mapping[str, Any], group: str, default: str) -> str:
    settings = _group(values, group)
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{group}={settings!r} is not settings; write {group}: {{name: {settings}}}")
    return str(settings.get("name", default))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted name."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        found |= inner or {f"{prefix}{key}": value}
    return found


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
        namesakes = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        if namesakes:
            raise ConfigError(f"setting {key!r} is unknown; did you mean {namesakes[0]!r}?")
        siblings = [name for name in known if name.rpartition(".")[0] == group]
        near = nearest(key, siblings) or nearest(key, known)
        if siblings or near is None:
            raise ConfigError(unknown_choice("setting", key, siblings or known))
        raise ConfigError(f"setting {key!r} is unknown; did you mean {near!r}?")


def _not_settable(chosen: Any, name: str) -> set[str | int]:
    """Parameters that a configuration leaves alone: the data set's, and those whose values are no plain data.

    For a parameter that takes a class or a callable, the parser would import whatever path it is given.
    """
    try:
        parameters = inspect.signature(chosen).parameters
        hints = get_type_hints(chosen.__init__ if inspect.isclass(chosen) else chosen)
    except Exception as error:
        raise ModelError(f"the settings of {name!r} cannot be read: {first_line(error)}") from error
    return {
        key
        for key, parameter in parameters.items()
        if key in FROM_DATA
        or not _is_plain(hints.get(key, Any))
        or not (parameter.default is inspect.Parameter.empty or isinstance(parameter.default, PLAIN))
    }


def _is_plain(hint: Any) -> bool:
    """Numbers, text, truth values, None, and lists, tuples, unions and literals of them; anything untyped."""
    if hint in (int, float, str, bool, type(None), Any, ..., list, tuple):
        return True
    origin = get_origin(hint)
    if origin is Literal:
        return True
    return origin in (list, tuple, Union, UnionType, Sequence) and all(map(_is_plain, get_args(hint)))


def _nullable(values: Mapping[str, Any]) -> set[str]:
    """Settings of the methods that say that null is one of their values."""
    groups = {"method": _name(values, "method", RunConfig().method["name"])}
    rule = _rule(values)
    if rule in SWITCHED_TO:
        groups["switch.to"] = _name(values, "switch.to", SWITCHED_TO[rule])
    return {
        f"{group}.{key}"
        for group, name in groups.items()
        for key, hint in get_type_hints(METHODS[name]).items()
        if type(None) in get_args(hint)
    }


def _check_null(values: Mapping[str, Any], defaults: Any, nullable: set[str], prefix: str = "") -> None:
    """Raise ConfigError for a null where the default is not null: the parser would let it pass."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _check_null(value, defaults, nullable, f"{prefix}{key}.")
        elif f"{prefix}{key}" in nullable:
            continue
        elif value is None and defaults.get(f"{prefix}{key}") is not None:
            raise ConfigError(f"{prefix}{key} is null; leave it out for its default")


def _numbers(key: str, value: Any) -> Any:
    """ "8/255" -> 0.0314 and "1e-2" -> 0.01 (text in YAML), but for names, folders and sizes."""
    if isinstance(value, Mapping):
        return {str(inner): _numbers(str(inner), item) for inner, item in value.items()}
    if isinstance(value, str) and key not in ("name", "root", "memory"):
        ratio = re.fullmatch(rf"\s*({NUMBER})\s*/\s*({NUMBER})\s*", value)
        if ratio and float(ratio[2]):
            return float(ratio[1]) / float(ratio[2])
        if re.fullmatch(rf"\s*[-+]?{NUMBER}\s*", value):
            return float(value)
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
    words = re.search(r"Union subtypes.*<class 'bool'>, typing\.Literal\[(.*?)\]", text)
    if words:  # switched off, on, or in a way that has a name
        names = [name.strip().strip("'") for name in words[1].split(",")]
        return unknown_choice(key[1], value, ["false", "true", *names])
    either = re.search(r"Union subtypes Subtypes: \[<class '(\w+)'>, <class 'NoneType'>\]", text)
    if either:
        return f"{key[1]}={value!r} is not of type {either[1]}, nor null"
    expected = re.search(r"Expected an? (.+?)\. Got value", text)
    if expected is None:
        return f"{key[1]}={value!r}: {text.split(': ', 1)[-1]}"
    kind = re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", expected[1])
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    if choices:
        return unknown_choice(key[1], value, [choice.strip().strip("'") for choice in choices[1].split(",")])
    return f"{key[1]}={value!r} is not of type {kind}"
