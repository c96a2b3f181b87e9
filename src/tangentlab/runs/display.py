"""The live display of a run: a bar on a terminal, a line an epoch in a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tangentlab.training import TrainingState

# title -> recorded name, format
COLUMNS = {
    "loss": ("train_loss", "{:.3f}"),
    "clean": ("clean_accuracy", "{:.1%}"),
    "robust": ("robust_accuracy", "{:.1%}"),
    "velocity": ("kernel/pgd/class/angle_velocity", "{:.1e}"),
}


class ProgressDisplay:
    """Shows epoch, loss, clean and robust accuracy, kernel velocity (radians a step) and time left.

    One display may show several runs, one after another. On something that is no terminal it prints a plain
    line at the end of each epoch, without carriage returns.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        wide = self.console.width >= 100
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            TextColumn("epoch {task.fields[epoch]}" if wide else "{task.fields[epoch]}"),
            *([BarColumn(bar_width=16)] if wide else []),
            *(TextColumn(f"[dim]{title}[/] {{task.fields[{title}]}}") for title in COLUMNS),
            TimeRemainingColumn(compact=True),
            console=self.console,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self._task = TaskID(0)
        self._name = ""
        self._epochs = self._per_epoch = 0

    def start(self, name: str, *, epochs: int, steps_per_epoch: int) -> None:
        """The run that the next steps belong to."""
        self._name, self._epochs, self._per_epoch = name, epochs, steps_per_epoch
        blank: dict[str, Any] = dict.fromkeys(COLUMNS, "–")
        self._task = self._bars.add_task(name, total=epochs * steps_per_epoch, epoch=f"0/{epochs}", **blank)

    def show(self, state: TrainingState, values: Mapping[str, Any]) -> None:
        """After each step; ``values`` are the newest of every recorded name."""
        shown: dict[str, Any] = {
            title: pattern.format(values[name]) if values.get(name) is not None else "–"
            for title, (name, pattern) in COLUMNS.items()
        }
        epoch = f"{state.step / self._per_epoch:.1f}/{self._epochs}"
        if self.console.is_terminal:
            self._bars.update(self._task, completed=state.step, epoch=epoch, **shown)
        elif state.step and state.step % self._per_epoch == 0:
            line = "  ".join(f"{title} {value}" for title, value in shown.items())
            self.console.print(f"{self._name}  epoch {epoch}  {line}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line above the bars, about the run that is shown."""
        self.note(f"{self._name}: {text}")

    def note(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


class EvaluationDisplay:
    """One line that changes, on a terminal; nothing elsewhere. Called with what is being done."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._line = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._line.add_task("evaluating", total=None)

    def __call__(self, text: str) -> None:
        self._line.update(self._task, description=text)

    def __enter__(self) -> Self:
        self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()
