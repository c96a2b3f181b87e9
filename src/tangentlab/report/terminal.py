"""Tables for the terminal: what a run's checkpoints reach, and what several runs show."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from tangentlab.metrics import mean_interval
from tangentlab.records import RunRecord
from tangentlab.report.palette import inputs_name
from tangentlab.report.subject import subjects
from tangentlab.report.table import attack_columns, duration, flags, table


def evaluations_table(record: RunRecord) -> Table:
    """A row an evaluation: checkpoint, attack and settings, n, accuracy, 95 % Wilson interval, wall time."""
    drawn = Table(title=f"{record.name}: test accuracy, 95 % interval", title_justify="left")
    for title in ("checkpoint", "attack", "n", "accuracy", "interval", "time"):
        drawn.add_column(title, justify="right" if title in ("n", "accuracy", "time") else "left")
    for line in record.evaluations:
        if not {"checkpoint", "epoch", "attack", "settings", "n", "accuracy", "interval"} <= line.keys():
            continue  # a line that is not evaluate's
        low, high = line["interval"]
        when = "" if line["epoch"] is None else f", epoch {line['epoch']:.1f}"
        settings = "".join(
            f" {key}={format(value, '.3g') if isinstance(value, float) else value}"
            for key, value in line["settings"].items()
        )
        drawn.add_row(
            line["checkpoint"] + when,
            line["attack"] + settings,
            str(line["n"]),
            f"{line['accuracy']:.1%}",
            f"{low:.1%} – {high:.1%}",
            duration(line["seconds"]) if line.get("seconds") is not None else "",
        )
    return drawn


def flag_lines(record: RunRecord) -> list[str]:
    """What stands below that table: a line a flag."""
    return [f"Flag: {flag}" for flag in flags(record)]


def seeds_table(records: Sequence[RunRecord]) -> Table:
    """A row a seed, test accuracies of best and last; then their means and 95 % Student intervals."""
    drawn = Table(title=f"{records[0].name}: test accuracy over seeds", title_justify="left")
    drawn.add_column("seed")
    columns = [
        (checkpoint, attack)
        for checkpoint in ("best", "last")
        for attack in attack_columns(subjects(records))
    ]
    found = [
        {
            (line.get("checkpoint"), line.get("attack")): line["accuracy"]
            for line in record.evaluations
            if line.get("split") == "test"
        }
        for record in records
    ]
    values = [[accuracy[column] for accuracy in found if column in accuracy] for column in columns]
    for checkpoint, attack in columns:
        drawn.add_column(f"{checkpoint} {inputs_name(attack)}", justify="right")
    for record, accuracy in zip(records, found, strict=True):
        drawn.add_row(str(record.config["seed"]), *(_percent(accuracy.get(column)) for column in columns))
    drawn.add_section()
    drawn.add_row("mean", *(_percent(fmean(column) if column else None) for column in values))
    halves = []  # Student's interval is symmetric
    for column in values:
        interval = mean_interval(column) if len(column) > 1 else None
        halves.append(None if interval is None else (interval.high - interval.low) / 2)
    drawn.add_row("± (95 %)", *map(_percent, halves))
    return drawn


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def runs_table(records: Sequence[RunRecord]) -> Table:
    """A row a run: last checkpoint's test accuracies, collapse, parting of the kernels, cost, seconds."""
    drawn = Table(title="Test accuracy of the last checkpoint", title_justify="left")
    for title in ("training", "clean", "FGSM", "PGD", "collapse", "kernels part", "cost", "time", "probe"):
        first = title == "training"
        drawn.add_column(title, justify="left" if first else "right", min_width=8 if first else None)
    for run, row in zip(subjects(records), table(subjects(records)), strict=True):
        drawn.add_row(
            run.label,
            *(accuracy.value for accuracy in row.last[:3]),
            row.collapse,
            "no" if run.parting is None else f"{run.axis} {run.parting:.3g}",
            row.cost,
            row.train_time,
            row.probe_share,
        )
    drawn.caption = "cost: forward equivalents per example; time: training steps; probe: its share of that"
    drawn.caption_justify = "left"
    return drawn
