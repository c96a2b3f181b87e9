"""What an alarm of catastrophic overfitting may look at, look by look: to choose its signal and threshold by.

    python benchmarks/alarm_looks.py runs/looks-tier1 results/overfitting/looks-tier1.json --tier 1

The single-step runs of the study of overfitting on the seeds that no verdict rests on, N-FGSM's among them,
which is said not to collapse. At every step at which the shipped alarm would look, its signal and the others
that are pooled of three looks are taken, each for as many passes as tangentlab.studies.overfitting_signals
allows. Runs that the folder has finished are not run again. The JSON file keeps their looks and what became
of them; what each signal tells apart at best; and of the shipped one by threshold, before which share of the
collapses it would have spoken, and in which share of the quiet runs for nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tangentlab.records import environment, read_run
from tangentlab.runs import RunConfig, check_outcomes, train_many
from tangentlab.runs.again import total_steps
from tangentlab.runs.build import build_data
from tangentlab.runs.display import ProgressDisplay
from tangentlab.studies import overfitting
from tangentlab.studies.overfitting_claims import LOOK_EVERY
from tangentlab.studies.overfitting_signals import ALARM_SHARE, POOLED_SIGNALS, PooledSignals
from tangentlab.studies.overfitting_watches import (
    ONE_STEP,
    THRESHOLDS,
    TUNING_SEEDS,
    Seen,
    Watch,
    alarm_worth,
    detection,
    seen_runs,
)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tier", type=int, default=1, choices=overfitting.TIERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=TUNING_SEEDS, choices=TUNING_SEEDS)
    parser.add_argument("--methods", nargs="+", default=ONE_STEP, choices=ONE_STEP)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Once, before the file that it goes to is touched: the commit would look changed.
    machine, rows = environment(), []
    for seed in options.seeds:
        configs = watched(options.tier, seed, options.methods)
        runs = {options.runs / key: config for key, config in configs.items()}
        with ProgressDisplay() as display:
            check_outcomes(train_many(runs, jobs=options.jobs, display=display))
        rows += [row(path, config) for path, config in runs.items()]
        runs_seen = seen_runs([line for one in rows for line in lines(one)])
        found = {
            "environment": machine,
            "signals": list(by_signal(runs_seen)),
            "thresholds": list(by_threshold(runs_seen)),
            "runs": rows,
        }
        options.out.write_text(json.dumps(found) + "\n")
    for line in (*found["signals"], *found["thresholds"]):
        print(json.dumps(line))


def watched(tier: int, seed: int, methods: Sequence[str]) -> dict[str, RunConfig]:
    """The study's runs, with a checkpoint wherever the alarm would look."""
    configs = {
        key: config
        for key, config in overfitting.runs(tier, [seed]).items()
        if config.method["name"] in methods
    }
    one = next(iter(configs.values()))
    every = LOOK_EVERY * one.training.epochs / total_steps(one, build_data(one))  # epochs
    return {
        key: replace(
            config,
            training=replace(config.training, keep_every=every),
            alarm=replace(config.alarm, every=None),
        )
        for key, config in configs.items()
    }


def row(path: Path, config: RunConfig) -> Row:
    """The study's line of the run, and each signal's looks."""
    told = {"run": path.name, "seed": config.seed, "method": config.method["name"]}
    run = {**told, **overfitting.run_line(read_run(path), config)}
    examples = build_data(config)
    pooled = PooledSignals(*overfitting.probed(examples, config)[0])
    looks = [
        {**at, **overfitting.rounded(pooled.look(model, here))}
        for model, here, at in overfitting.looks(path, config, examples, run)
    ]
    return {**run, "looks": {name: [look.get(name) for look in looks] for name in looks[-1]}}


def lines(one: Row) -> Iterator[Row]:
    """As the study has them."""
    looks = [
        {name: value for name, value in zip(one["looks"], values, strict=True) if value is not None}
        for values in zip(*one["looks"].values(), strict=True)
    ]
    shares = ((look["epoch"], look.get(f"cheap/{ALARM_SHARE}")) for look in looks)
    alarm = [(epoch, share) for epoch, share in shares if share is not None]
    yield {
        **one,
        "alarm_epochs": [epoch for epoch, _ in alarm],
        "alarm_pooled": [share for _, share in alarm],
    }
    for look in looks:
        yield {"what": "signals", "run": one["run"], **look}


def by_signal(runs: Sequence[Seen]) -> Iterator[Row]:
    """The area under a signal's ROC, and where it detects most, less the false alarms."""
    for name in POOLED_SIGNALS:
        found = [detection(Watch(f"cheap/{name}", "level", sign), runs) for sign in (1, -1)]
        if seen := max(filter(None, found), default=None):
            false_alarms, detected = max(seen[1], key=lambda point: point[1] - point[0])
            yield {"signal": name, "area": seen[0], "detected": detected, "false_alarms": false_alarms}


def by_threshold(runs: Sequence[Seen]) -> Iterator[Row]:
    """Of the runs that collapsed, the share that it spoke before; of the quiet ones, that it spoke in."""
    counts = {"collapsed": sum(run.collapse is not None for run in runs), "runs": len(runs)}
    for threshold in THRESHOLDS:
        yield {"threshold": threshold, **counts, **alarm_worth(threshold, runs)}


if __name__ == "__main__":
    main()
