"""A study: runs, what is measured on each of them, and the verdicts on its claims; resumable at every run.

STUDY/config.yaml   name, tier, seeds, precision     STUDY/runs/KEY/   the runs
STUDY/values.jsonl  raw values, each with its run, method and seed; earlier ones in values.jsonl.gz, if there
STUDY/configs.jsonl what each measured run was trained with, and by which commit it was measured; likewise
STUDY/study.json    the claims with their verdicts, a function of values.jsonl alone, and the figures to draw
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from itertools import count, islice
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from joblib import Parallel, delayed

from tangentlab.errors import ConfigError, RunFolderError, unknown_choice
from tangentlab.files import finite, json_bytes, write_atomic
from tangentlab.records import SCHEMA, environment, read_configs, read_values
from tangentlab.report.values import ValueFigure
from tangentlab.runs import Outcome, Precision, RunConfig, check_outcomes, check_same, load_config, train_many
from tangentlab.runs.hooks import Display
from tangentlab.studies.claims import Claim, Verdict

STUDIES = ("evolution", "normalization", "gap", "lazy", "transfer", "overfitting", "cure")
TIERS = {
    0: "digits, small CNN",
    1: "Fashion-MNIST, 10,000 training images, CNN of three convolutions",
    2: "CIFAR-10, 10,000 training images, PreActResNet-18 of width 16",
    3: "CIFAR-10, PreActResNet-18",
}

# What tier 1 was studied with; the shipped configuration warms up since.
COLD = "--training.warmup=0"

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """What a study is; its module says it once, as STUDY.

    Args:
        name: of the study and its module.
        claims: with their thresholds.
        runs: (tier, seeds) -> run key -> configuration; keys are folder names.
        measure: a finished run's folder and its configuration -> raw values, JSON-able, a line each.
        judge: raw values and the setting -> a verdict for each claim.
        figures: of the raw and the derived values, for the report.
        derive: raw values -> values that rest on several runs, which study.json carries for the figures.
        tuning_seeds: settings were chosen on; their values are neither judged nor derived from.
        tiers: it can be run at.
    """

    name: str
    claims: tuple[Claim, ...]
    runs: Callable[[int, Sequence[int]], Mapping[str, RunConfig]]
    measure: Callable[[Path, RunConfig], Iterable[Values]]
    judge: Callable[[Sequence[Values], str], Sequence[Verdict]]
    figures: tuple[ValueFigure, ...] = ()
    derive: Callable[[Sequence[Values]], Iterable[Values]] = lambda _: ()
    tuning_seeds: tuple[int, ...] = ()
    tiers: tuple[int, ...] = (0, 1, 2)


def configured(source: str, words: str, *, seed: int = 0) -> RunConfig:
    """A shipped configuration with overrides, read once for all seeds: its parser is slow to build."""
    return replace(_configured(source, words), seed=seed)


@cache
def _configured(source: str, words: str) -> RunConfig:
    return load_config(source, words.split())


def load_study(name: str) -> Study:
    """The study of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in STUDIES:
        raise ConfigError(unknown_choice("study", name, STUDIES))
    study: Study = import_module(f"tangentlab.studies.{name}").STUDY
    return study


def run_study(
    name: str,
    out: str | Path,
    *,
    tier: int = 1,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
    precision: Precision = "fp32",
    jobs: int = 1,
    display: Display | None = None,
) -> dict[str, Any]:
    """Seed by seed, train what is not trained, measure what is not measured, and judge; returns study.json.

    The same call again goes on; more seeds may be added. A seed whose values are all there needs its runs no
    more, so that a folder with config.yaml and values.jsonl alone goes on, on another machine too. Without
    ``seeds``, the first three that are judged. ``only`` the runs of these names, where more seeds of a few
    are wanted; claims that need others go without. ``precision`` is that of the runs' training steps; bf16 is
    for processors with instructions for it.

    Raises:
        ConfigError: an unknown study, tier, run or precision, or ``out`` holds another study, or values of
            runs that were trained otherwise or do not say how.
        InterruptedRunError: Ctrl-C; the same call goes on.
        TangentlabError: runs failed; the others are measured.
    """
    study, folder = load_study(name), Path(out)
    if tier not in study.tiers:
        raise ConfigError(unknown_choice("tier", tier, map(str, study.tiers)))
    if precision not in get_args(Precision):
        raise ConfigError(unknown_choice("precision", precision, get_args(Precision)))
    if seeds is None:
        seeds = list(islice((seed for seed in count() if seed not in study.tuning_seeds), 3))
    unjudged = [str(seed) for seed in study.tuning_seeds if seed in seeds]
    if unjudged and display is not None:
        display.note(f"seed {', '.join(unjudged)}: for choosing settings on, and not judged")
    there = [config.name for config in study.runs(tier, seeds[:1]).values()]
    for wanted in only:
        if wanted not in there:
            raise ConfigError(unknown_choice("run", wanted, there))
    asked = _config(folder, study, tier, seeds, precision)
    known = {line["run"] for line in read_values(folder)}
    of_seed = {
        seed: {
            folder / "runs" / key: replace(config, precision=precision)
            for key, config in study.runs(tier, [seed]).items()
            if not only or config.name in only
        }
        for seed in dict.fromkeys(seeds)
    }
    for runs in of_seed.values():
        _check_trained_alike(folder, {run: config for run, config in runs.items() if run.name in known})
    write_atomic(folder / "config.yaml", yaml.safe_dump(asked, sort_keys=False).encode())
    outcomes: list[Outcome] = []
    commit = environment()["commit"]
    for runs in of_seed.values():
        left = [run for run in runs if run.name not in known]
        if not left:
            continue
        # All of the seed: a measurement may read the runs beside its own.
        trained = train_many(runs, jobs=jobs, display=display)
        outcomes += trained
        if any(outcome.state == "interrupted" for outcome in trained):
            break
        failed = {outcome.folder for outcome in trained if outcome.state == "failed"}
        left = [run for run in left if run not in failed]
        measured = Parallel(n_jobs=jobs, return_as="generator")(
            delayed(_measured)(name, run, runs[run]) for run in left
        )
        for run, lines in zip(left, measured, strict=True):
            # First: a configuration without values is written again, and the later one holds.
            told = {"run": run.name, "config": runs[run].to_dict(), "commit": commit}
            _append(folder / "configs.jsonl", [told])
            _append(folder / "values.jsonl", lines)
            if display is not None:
                display.note(f"{run.name}: measured")
        _judge(folder, environment())
    check_outcomes(outcomes)
    return _judge(folder)


def _check_trained_alike(folder: Path, runs: Mapping[Path, RunConfig]) -> None:
    """Raise ConfigError where values are of a run that was trained otherwise, or do not say how."""
    trained_with = read_configs(folder)
    for run, config in runs.items():
        if run.name not in trained_with:
            raise ConfigError(f"{folder} does not say what {run.name} was trained with; give another --out")
        check_same(trained_with[run.name]["config"], config, run)


def _judge(folder: Path, measured: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write study.json, with where values were last measured: now, or else as it says there."""
    path, found = folder / "study.json", judge_study(folder)
    if measured is None:
        measured = json.loads(path.read_bytes())["environment"] if path.exists() else environment()
    write_atomic(path, json_bytes({**found, "environment": measured}))
    return found


def judge_study(folder: str | Path) -> dict[str, Any]:
    """What study.json says, but for the environment: the claims judged from the folder's raw values.

    Raises:
        RunFolderError: the folder holds no study.
    """
    folder = Path(folder)
    config = _read_config(folder)
    study = load_study(config["study"])
    values = [line for line in read_values(folder) if line["seed"] not in study.tuning_seeds]
    setting = TIERS[config["tier"]]
    if config["precision"] != "fp32":
        setting += f", trained in {config['precision']}"
    verdicts = study.judge(values, setting)
    derived = [finite(dict(line)) for line in study.derive(values)]
    return {
        "schema": SCHEMA,
        "study": study.name,
        "tier": config["tier"],
        "claims": [verdict.as_dict() for verdict in verdicts],
        "figures": [finite(asdict(figure)) for figure in study.figures],  # finite: lists, as JSON gives back
        **({"derived": derived} if derived else {}),
    }


def _measured(name: str, run: Path, config: RunConfig) -> list[dict[str, Any]]:
    """The run's lines, measured with the threads that it was trained with."""
    place = {"run": run.name, "method": config.method["name"], "seed": config.seed}
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        return [{**place, **values} for values in load_study(name).measure(run, config)]
    finally:
        torch.set_num_threads(before)


def _append(path: Path, lines: Iterable[Values]) -> None:
    """All lines or none."""
    before = path.read_bytes() if path.exists() else b""
    write_atomic(path, before + b"".join(json.dumps(finite(line)).encode() + b"\n" for line in lines))


def _config(
    folder: Path, study: Study, tier: int, seeds: Sequence[int], precision: Precision
) -> dict[str, Any]:
    """What config.yaml is to say; raises ConfigError where the folder holds another study."""
    asked = {"study": study.name, "tier": tier, "precision": precision}
    if (folder / "config.yaml").exists():
        there = _read_config(folder)
        for name, value in asked.items():
            if there[name] != value:
                raise ConfigError(f"{folder} holds {name} {there[name]!r}, not {value!r}; give another --out")
        seeds = sorted({*seeds, *there["seeds"]})
    return {"schema": SCHEMA, **asked, "seeds": list(seeds)}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_bytes())
        precision = config.get("precision", "fp32")  # older folders do not name it
        return {**{name: config[name] for name in ("study", "tier", "seeds")}, "precision": precision}
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{folder} holds no study") from error
