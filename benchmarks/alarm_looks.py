"""What the alarm of catastrophic overfitting sees, look by look: to choose its threshold by.

    python benchmarks/alarm_looks.py results/overfitting/looks-tier1.json --tier 1 [--jobs 2]

The single-step runs of the study of overfitting on the seeds that no verdict rests on, N-FGSM's among them,
which is said not to collapse. The runs are written to a temporary folder; the JSON file keeps their looks,
what became of them, and by threshold before which share of the collapses the alarm would have spoken, and in
which share of the quiet runs for nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tangentlab.records import environment, read_run
from tangentlab.runs import RunConfig, check_outcomes, train_many
from tangentlab.runs.display import ProgressDisplay
from tangentlab.studies import overfitting
from tangentlab.studies.overfitting_watches import (
    ONE_STEP,
    THRESHOLDS,
    TUNING_SEEDS,
    alarm_worth,
    seen_runs,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tier", type=int, default=1, choices=(0, 1))
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Once, before the file that it goes to is touched: the commit would look changed.
    machine, rows = environment(), []
    for seed in TUNING_SEEDS:
        with tempfile.TemporaryDirectory() as folder, ProgressDisplay() as display:
            runs = {Path(folder) / key: config for key, config in watched(options.tier, seed).items()}
            check_outcomes(train_many(runs, jobs=options.jobs, display=display))
            rows += [row(path, config) for path, config in runs.items()]
        found = {"environment": machine, "thresholds": by_threshold(rows), "runs": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    for line in by_threshold(rows):
        print(json.dumps(line))


def watched(tier: int, seed: int) -> dict[str, RunConfig]:
    """The study's runs, whose checkpoints nobody reads."""
    return {
        key: replace(config, training=replace(config.training, keep_every=None))
        for key, config in overfitting.runs(tier, [seed]).items()
        if config.method["name"] in ONE_STEP
    }


def row(path: Path, config: RunConfig) -> dict[str, Any]:
    """The study's line of the run."""
    told = {"run": path.name, "seed": config.seed, "method": config.method["name"]}
    return {**told, **overfitting.run_line(read_run(path), config)}


def by_threshold(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the runs that collapsed, the share that it spoke before; of the quiet ones, that it spoke in."""
    runs = seen_runs(rows)
    counts = {"collapsed": sum(run.collapse is not None for run in runs), "runs": len(runs)}
    return [{"threshold": threshold, **counts, **alarm_worth(threshold, runs)} for threshold in THRESHOLDS]


if __name__ == "__main__":
    main()
