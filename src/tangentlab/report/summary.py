"""The few sentences at the top: what these runs show."""

from __future__ import annotations

from collections.abc import Sequence

from tangentlab.report.figure import listed, number
from tangentlab.report.subject import Subject
from tangentlab.report.table import progress


def summary(runs: Sequence[Subject]) -> list[str]:
    """Two to five sentences: the runs and their state, collapse, alarm, parting of the kernels, stages."""
    sentences = [states(runs), _collapses(runs), _alarms(runs), _partings(runs), _stages(runs)]
    return [sentence for sentence in sentences if sentence]


def states(runs: Sequence[Subject]) -> str:
    """How many runs are finished, and which are not."""
    unfinished = [run for run in runs if run.record.state != "finished"]
    named = (
        listed(f"{run.label} ({run.record.state}, {progress(run)})" for run in unfinished)
        if unfinished
        else ""
    )
    if not unfinished:
        return {1: "The run is finished.", 2: "Both runs are finished."}.get(
            len(runs), f"All {len(runs)} runs are finished."
        )
    if len(unfinished) == len(runs):
        return f"Not finished: {named}."
    return f"{len(runs) - len(unfinished)} of {len(runs)} runs are finished; not finished: {named}."


def _collapses(runs: Sequence[Subject]) -> str:
    recorded = [run for run in runs if run.records_collapse]
    collapsed = [run for run in recorded if run.collapse]
    if not recorded:
        return "Catastrophic overfitting cannot be told: FGSM and PGD accuracy were not both recorded."
    if not collapsed:
        return "No run overfitted catastrophically." if len(recorded) > 1 else "No catastrophic overfitting."
    parts = [
        f"{run.label} at {run.axis} {run.collapse.epoch:.3g}" for run in collapsed if run.collapse is not None
    ]
    rest = len(recorded) - len(collapsed)
    others = {0: "", 1: "; the other run did not"}.get(rest, f"; the other {rest} runs did not")
    return f"Catastrophic overfitting: {listed(parts)}{others}."


def _alarms(runs: Sequence[Subject]) -> str:
    watched = [run for run in runs if run.series("alarm/raised")]
    if not watched:
        return ""
    spoke = [f"in {run.label} at {run.axis} {run.alarm:.3g}" for run in watched if run.alarm is not None]
    return f"The alarm spoke {listed(spoke)}." if spoke else "The alarm stayed silent."


def _partings(runs: Sequence[Subject]) -> str:
    recorded = [run for run in runs if run.kernel_curve("fgsm~pgd", "distance")]
    parted = [run for run in recorded if run.parting is not None]
    if not recorded:
        return ""
    if not parted:
        return "The kernels on FGSM and PGD inputs stayed together."
    return f"The kernels on FGSM and PGD inputs parted in {listed(_parting(run) for run in parted)}."


def _parting(run: Subject) -> str:
    if run.parting is None or run.collapse is None:
        return f"{run.label} at {run.axis} {number(run.parting or 0.0)}"
    lead = run.collapse.epoch - run.parting
    order = f"{abs(lead):.2g} {run.axis}s {'before' if lead > 0 else 'after'} the fall"
    return f"{run.label} at {run.axis} {number(run.parting)} ({order if lead else 'as robust accuracy fell'})"


def _stages(runs: Sequence[Subject]) -> str:
    found = [run for run in runs if run.stages]
    lazy = [run for run in found if run.stages and run.stages.lazy]
    if not found:
        return ""
    if not lazy:
        return "No lazy stage of the kernel was found."
    again = [run.label for run in lazy if run.stages and run.stages.third_start is not None]
    moved = f"moved again in {listed(again)}" if again else "did not move again"
    if len(again) == len(lazy):
        moved = "moved again"
    return f"The kernel became lazy in {listed(run.label for run in lazy)}; it {moved}."
