"""The claims of the study of overfitting, and what its raw values say of each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from tangentlab.probes.overfitting_alarm import THRESHOLD
from tangentlab.runs.parsing import STEERING_ALARM
from tangentlab.studies.claims import PAPER, Claim, Verdict, judge, judge_share
from tangentlab.studies.overfitting_signals import ALARM_SIGNAL, BUDGET
from tangentlab.studies.overfitting_watches import CONTROLS, ONE_STEP, Chosen, Seen, folds
from tangentlab.studies.study import Values

LOOK_EVERY = STEERING_ALARM["every"]  # steps: an alarm that only watches looks as one that steers

IN_TIME = Claim(
    "overfitting/in-time",
    "The kernel's best signal, of its spectra and distances, chosen on other seeds, speaks before PGD "
    "accuracy has lost half of its best in more than 90 % of the runs that collapse.",
    "share of the collapsing runs",
    0.9,
    source=f"{PAPER}, with a figure of ours",
)
QUIET = Claim(
    "overfitting/false-alarms",
    "That signal speaks in less than 10 % of the runs that never collapse.",
    "share of the quiet runs",
    0.1,
    above=False,
)
EARLIER = Claim(
    "overfitting/earlier",
    "It speaks earlier than the best rival, chosen likewise.",
    "difference of the mean leads, steps; silence is a lead of 0",
    0.0,
)
CHEAP_IN_TIME = Claim(
    "overfitting/cheap-in-time",
    f"At {BUDGET} passes a look the best signal of the kernel's and of what a step does on PGD inputs speaks "
    "in time in more than 90 % of the runs that collapse.",
    "share of the collapsing runs",
    0.9,
)
CHEAP_QUIET = Claim(
    "overfitting/cheap-false-alarms",
    "That signal speaks in less than 10 % of the runs that never collapse.",
    "share of the quiet runs",
    0.1,
    above=False,
)
CHEAP_EARLIER = Claim(
    "overfitting/cheap-earlier",
    f"At {BUDGET} passes a look that signal speaks earlier than the best rival.",
    "difference of the mean leads, steps; silence is a lead of 0",
    0.0,
)
DEPLOYED = Claim(
    "overfitting/deployed",
    "The alarm as it is shipped speaks before PGD accuracy has lost half of its best in more than 90 % of "
    "the runs that collapse.",
    "share of the collapsing runs",
    0.9,
)
DEPLOYED_QUIET = Claim(
    "overfitting/deployed-false-alarms",
    "The alarm as it is shipped speaks in less than 5 % of the runs that never collapse.",
    "share of the quiet runs",
    0.05,
    above=False,
)
DEPLOYED_CONTROLS = Claim(
    "overfitting/deployed-controls",
    "Of the quiet runs of the methods that are said not to collapse (PGD, N-FGSM, GradAlign) it speaks in "
    "less than 5 %.",
    "share of those runs",
    0.05,
    above=False,
)
DEPLOYED_ONE_STEP = Claim(
    "overfitting/deployed-one-step",
    "Of the quiet runs of one step (FGSM, FGSM-RS, N-FGSM) it speaks in less than 5 %.",
    "share of those runs",
    0.05,
    above=False,
)
SIGNAL_EARLIER = Claim(
    "overfitting/alarm-signal",
    f"At {BUDGET} passes a look the share of confidence that the shipped alarm watches speaks earlier than "
    "the best other signal, the kernel's or a rival's, each watched in the way and with the threshold that "
    "other seeds choose.",
    "difference of the mean leads, steps; silence is a lead of 0",
    0.0,
)
SPECTRUM_ALONE = Claim(
    "overfitting/spectrum",
    "The spectrum of the kernel on clean inputs is enough: its best signal speaks in time in more than half "
    "of the runs that collapse.",
    "share of the collapsing runs",
    0.5,
    source=f"{PAPER}, as we read it",
)
KERNEL_PART = Claim(
    "overfitting/kernel-part",
    "What a step on FGSM inputs does on PGD inputs falls at a collapse by the kernel more than by the "
    "losses' derivatives.",
    "the kernel's part of the update share's fall, in logarithms, mean of both orders; mean over the runs "
    "that collapse",
    0.5,
    source=f"{PAPER}, as we read it",
)
TIME = Claim(
    "overfitting/time",
    f"At a look every {LOOK_EVERY} steps the shipped alarm takes less than 3 % of the training time.",
    "seconds of its looks over those of training; of a seed's FGSM runs",
    0.03,
    above=False,
)
CLAIMS = (
    IN_TIME,
    QUIET,
    EARLIER,
    CHEAP_IN_TIME,
    CHEAP_QUIET,
    CHEAP_EARLIER,
    DEPLOYED,
    DEPLOYED_QUIET,
    DEPLOYED_CONTROLS,
    DEPLOYED_ONE_STEP,
    SIGNAL_EARLIER,
    TIME,
    SPECTRUM_ALONE,
    KERNEL_PART,
)
SHARES = set(CLAIMS) - {EARLIER, CHEAP_EARLIER, SIGNAL_EARLIER, TIME, KERNEL_PART}


def judged(values: Sequence[Values], setting: str) -> list[Verdict]:
    """The verdicts: shares over all judged runs, each by its seed's fold."""
    outcomes: dict[Claim, dict[int, list[bool]]] = {claim: {} for claim in SHARES}
    effects: dict[Claim, dict[int, float]] = {claim: {} for claim in CLAIMS}
    for seed, runs, order in folds(values):
        collapsing = [run for run in runs if run.collapse is not None]
        quiet = [run for run in runs if run.collapse is None]
        for cheap, families, (in_time, silent, earlier) in (
            (False, ("kernel",), (IN_TIME, QUIET, EARLIER)),
            (True, ("kernel", "update"), (CHEAP_IN_TIME, CHEAP_QUIET, CHEAP_EARLIER)),
        ):
            kernel, rival = (_best(order, of, cheap=cheap) for of in (families, ("rival",)))
            if kernel is not None:
                outcomes[in_time][seed] = [run.lead(kernel) > 0 for run in collapsing]
                outcomes[silent][seed] = [run.exceeds(kernel) for run in quiet]
            if collapsing and order:
                effects[earlier][seed] = _lead(kernel, collapsing) - _lead(rival, collapsing)
        clean = next((one for one in order if one.watch.signal.startswith("clean/")), None)
        if clean is not None:
            outcomes[SPECTRUM_ALONE][seed] = [run.lead(clean) > 0 for run in collapsing]
        outcomes[DEPLOYED][seed] = [
            run.steps_until(run.collapse, run.warned(THRESHOLD)) > 0 for run in collapsing
        ]
        for claim, methods in (
            (DEPLOYED_QUIET, (*ONE_STEP, *CONTROLS)),
            (DEPLOYED_CONTROLS, CONTROLS),
            (DEPLOYED_ONE_STEP, ONE_STEP),
        ):
            outcomes[claim][seed] = [run.raised(THRESHOLD) for run in quiet if run.method in methods]
        if collapsing and order:
            as_dear = [one for one in order if one.watch.cheap]
            own, other = (
                next((one for one in as_dear if one.watch.signal.endswith(ALARM_SIGNAL) == is_own), None)
                for is_own in (True, False)
            )
            effects[SIGNAL_EARLIER][seed] = _lead(own, collapsing) - _lead(other, collapsing)
        if parts := [part for run in collapsing if (part := run.kernel_part()) is not None]:
            effects[KERNEL_PART][seed] = fmean(parts)
    effects[TIME] = _alarm_time(values)
    return [
        judge_share(claim, setting, outcomes[claim])
        if claim in SHARES
        else judge(claim, setting, effects[claim])
        for claim in CLAIMS
    ]


def _best(order: Sequence[Chosen], families: Sequence[str], *, cheap: bool) -> Chosen | None:
    found = (one for one in order if one.watch.family in families)
    return next((one for one in found if one.watch.cheap or not cheap), None)


def _lead(one: Chosen | None, collapsing: Sequence[Seen]) -> float:
    """Its mean lead; of a family of which no signal is chosen 0, for it says nothing."""
    return fmean(run.lead(one) for run in collapsing) if one else 0.0


def _alarm_time(values: Sequence[Values]) -> dict[int, float]:
    """seed -> the share of the looks in the training time."""
    found: dict[int, list[float]] = {}
    for line in values:
        if line["what"] == "run" and line["method"] == "fgsm":
            found.setdefault(line["seed"], []).append(line["probe_seconds"] / line["train_seconds"])
    return {seed: fmean(shares) for seed, shares in found.items()}
