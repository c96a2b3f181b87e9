"""The table of runs: what each is, how far it came, how accurate it is, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tangentlab.records import RunRecord
from tangentlab.report.figure import number
from tangentlab.report.palette import inputs_name
from tangentlab.report.subject import Subject, clean_text

_ATTACKS = {"none": "clean_accuracy", "fgsm": "fgsm_accuracy", "pgd": "robust_accuracy"}
_STRONGER = ("apgd", "autoattack")  # have a column where a run was evaluated under them


@dataclass(frozen=True)
class Accuracy:
    """An accuracy as text, with what stands below it (interval, n, or "validation") and its settings."""

    value: str
    notes: tuple[str, ...] = ()
    settings: str = ""


@dataclass(frozen=True)
class Row:
    """One run's row; accuracies are those of :func:`attack_columns`."""

    run: Subject
    what: str
    state: str
    progress: str
    message: str
    best: tuple[Accuracy, ...]
    last: tuple[Accuracy, ...]
    cost: str
    train_time: str
    probe_share: str
    collapse: str


def table(runs: Sequence[Subject]) -> list[Row]:
    """A row a run. Test accuracies where the run was evaluated, else its own validation accuracies."""
    attacks = attack_columns(runs)
    return [_row(run, attacks) for run in runs]


def attack_columns(runs: Sequence[Subject]) -> list[str]:
    """Attacks with a column: none, FGSM, PGD, and of the stronger ones those that some run was put to."""
    evaluated = {line.get("attack") for run in runs for line in run.record.evaluations}
    return [*_ATTACKS, *(attack for attack in _STRONGER if attack in evaluated)]


def _row(run: Subject, attacks: Sequence[str]) -> Row:
    train, probe = _last(run, "train_seconds"), _last(run, "probe_seconds")
    cost = _last(run, "cost")
    return Row(
        run=run,
        what=what(run),
        state=run.record.state,
        progress=progress(run),
        message=clean_message(run),
        best=_accuracies(run, "best", attacks),
        last=_accuracies(run, "last", attacks),
        cost="–" if cost is None else f"{cost:,.0f}" if cost >= 100 else number(cost),
        train_time="–" if train is None else duration(train),
        probe_share=f"{probe / train:.0%}" if probe is not None and train else "–",
        collapse=_collapse(run),
    )


def attack_settings(runs: Sequence[Subject]) -> list[str]:
    """The attacks that test accuracies were taken under, each once."""
    evaluated = [_tested(line).settings for run in runs for line in run.record.evaluations]
    return list(dict.fromkeys(settings for settings in evaluated if settings))


def flags(record: RunRecord) -> list[str]:
    """Why an evaluation may overestimate the robustness: "last, autoattack: reason [name]", each once."""
    said = [
        f"{line.get('checkpoint')}, {line.get('attack')}: {text} [{name}]"
        for line in record.evaluations
        for name, text in _flags(line)
    ]
    return list(dict.fromkeys(said))


def _flags(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each flag."""
    return [(str(flag.get("name")), str(flag.get("text"))) for flag in line.get("flags") or ()]


def what(run: Subject) -> str:
    """Method and what a switch turns it to, data, model and seed, as far as the configuration names them."""
    config = run.record.config
    parts = [_named(config.get(section)) for section in ("method", "data", "model")]
    switch = config.get("switch")
    if parts[0] and isinstance(switch, Mapping) and (cheaper := _named(switch.get("to"))):
        parts[0] += f" → {cheaper}"
    if config.get("seed") is not None:
        parts.append(f"seed {config['seed']}")
    return " · ".join(clean_text(part) for part in parts if part)


def data_name(run: Subject) -> str:
    """The data set, where the configuration names it."""
    name = _named(run.record.config.get("data"))
    return clean_text(name) if name else ""


def progress(run: Subject) -> str:
    """How far the run came: "7.5 of 24 epochs"; steps where it counts no epochs."""
    status = run.record.status
    for unit, total in (("epoch", status.get("epochs")), ("step", status.get("steps"))):
        done = _reached(run, unit)
        if done is not None and (unit == run.axis or total is not None):
            of = f" of {_plain(total)}" if total is not None else ""
            return f"{_plain(done)}{of} {unit}s"
    return "no progress recorded"


def clean_message(run: Subject) -> str:
    """What status.json says beside the state, on one line."""
    message = run.record.status.get("message")
    return " ".join(str(message).split()) if message else ""


def _reached(run: Subject, unit: str) -> float | None:
    """The last epoch or step in the log; the status of a killed run may be older."""
    logged = [line[unit] for line in run.record.metrics if isinstance(line.get(unit), (int, float))]
    said = run.record.status.get(unit)
    logged += [said] if isinstance(said, (int, float)) else []
    return max(logged, default=None)


def _accuracies(run: Subject, checkpoint: str, attacks: Sequence[str]) -> tuple[Accuracy, ...]:
    lines = [
        line
        for line in run.record.evaluations
        if line.get("checkpoint") == checkpoint and line.get("split") == "test"
    ]
    evaluated = {line.get("attack"): line for line in lines}  # the latest of each attack
    if any(attack in evaluated for attack in attacks):
        return tuple(_tested(evaluated.get(attack)) for attack in attacks)
    return _validated(run, checkpoint, attacks)


def _tested(line: Mapping[str, Any] | None) -> Accuracy:
    if line is None or not isinstance(line.get("accuracy"), (int, float)):
        return Accuracy("–")
    low, high = line.get("interval") or (None, None)
    interval = [f"{100 * low:.1f}–{100 * high:.1f}"] if low is not None and high is not None else []
    settings = ", ".join(f"{name} {_plain(value)}" for name, value in (line.get("settings") or {}).items())
    named = inputs_name(str(line.get("attack"))) if line.get("attack") != "none" else "no attack"
    return Accuracy(
        f"{line['accuracy']:.1%}",
        (*interval, f"n {line.get('n', '?')}", *(f"flag: {name}" for name, _ in _flags(line))),
        f"{named}: {settings}" if settings else "",
    )


def _validated(run: Subject, checkpoint: str, attacks: Sequence[str]) -> tuple[Accuracy, ...]:
    robust = run.curve("robust_accuracy")
    chosen = robust or run.curve("clean_accuracy")
    if not chosen:
        return (Accuracy("–"),) * len(attacks)
    when = chosen.x[chosen.y.index(max(chosen.y))] if checkpoint == "best" else chosen.x[-1]
    curves = [run.curve(_ATTACKS.get(attack, "")) for attack in attacks]
    return tuple(
        Accuracy(f"{curve.at_or_before(when):.1%}", ("validation",)) if curve else Accuracy("–")
        for curve in curves
    )


def _collapse(run: Subject) -> str:
    if run.collapse:
        return f"{run.axis} {run.collapse.epoch:.3g}"
    return "none" if run.records_collapse else "not recorded"


def _last(run: Subject, name: str) -> float | None:
    curve = run.curve(name)
    return curve.y[-1] if curve else None


def _named(section: object) -> str:
    if isinstance(section, Mapping):
        return str(section.get("name") or "")
    return str(section) if section else ""


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
