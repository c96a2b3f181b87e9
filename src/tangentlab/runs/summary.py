"""Tables for the terminal: what a run's checkpoints reach, and what several runs show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from tangentlab import metrics
from tangentlab.records import RunRecord


def evaluations_table(record: RunRecord) -> Table:
    """Best and last checkpoint: accuracy, n and 95 % interval under each attack, on the test set."""
    newest = _newest(record)
    table = Table(title=f"{record.name}: test accuracy, 95 % interval", title_justify="left")
    for title in ("checkpoint", "epoch", "attack", "settings", "n", "accuracy", "interval"):
        table.add_column(title, justify="right" if title in ("epoch", "n", "accuracy") else "left")
    for (checkpoint, attack), line in newest.items():
        low, high = line["interval"]
        settings = " ".join(f"{key}={value:.4g}" for key, value in line["settings"].items())
        table.add_row(
            checkpoint,
            "–" if line["epoch"] is None else f"{line['epoch']:.1f}",
            attack,
            settings,
            str(line["n"]),
            f"{line['accuracy']:.1%}",
            f"{low:.1%} – {high:.1%}",
        )
    return table


def runs_table(records: Sequence[RunRecord]) -> Table:
    """A row a run: last checkpoint's test accuracies, collapse, parting of the kernels, cost, seconds."""
    table = Table(title="Test accuracy of the last checkpoint", title_justify="left")
    for title in ("training", "clean", "FGSM", "PGD", "collapse", "kernels part", "cost", "seconds", "probe"):
        table.add_column(title, justify="left" if title == "training" else "right")
    for record in records:
        newest, status = _newest(record), record.status
        accuracies = [newest.get(("last", attack)) for attack in ("none", "fgsm", "pgd")]
        collapse, parted = collapse_of(record), parting_of(record)
        spent = status.get("train_seconds", 0.0)
        table.add_row(
            record.name,
            *(f"{line['accuracy']:.1%}" if line else "–" for line in accuracies),
            f"epoch {collapse.epoch:.1f}" if collapse else "none",
            f"epoch {parted:.1f}" if parted is not None else "no",
            f"{status.get('cost', 0.0):.0f}",
            f"{spent:.1f}",
            f"{status.get('probe_seconds', 0.0) / spent:.0%}" if spent else "–",
        )
    table.caption = (
        "cost: forward equivalents per training example · seconds: training steps alone · "
        "probe: its time as a share of theirs"
    )
    return table


def parting_of(record: RunRecord) -> float | None:
    """The epoch at which the class kernels on FGSM and on PGD inputs parted; None if they did not."""
    epochs, distances = record.series("kernel/fgsm~pgd/class/distance")
    return metrics.parting_epoch(epochs, distances) if epochs else None


def collapse_of(record: RunRecord) -> metrics.Collapse | None:
    """Catastrophic overfitting on the validation split, if it happened."""
    epochs, robust = record.series("robust_accuracy")
    _, fgsm = record.series("fgsm_accuracy")
    return metrics.catastrophic_overfitting(epochs, fgsm, robust) if epochs else None


def _newest(record: RunRecord) -> dict[tuple[str, str], dict[str, Any]]:
    """(checkpoint, attack) -> its newest evaluation."""
    return {(line["checkpoint"], line["attack"]): line for line in record.evaluations}
