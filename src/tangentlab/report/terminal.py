"""Tables for the terminal: what a run's checkpoints reach, and what several runs show."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from tangentlab.records import RunRecord
from tangentlab.report.subject import subjects
from tangentlab.report.table import duration, flags, table


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
