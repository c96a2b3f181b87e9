"""The demo's runs over several seeds: when the alarm spoke, the kernels parted and robust accuracy collapsed.

    python benchmarks/demo_seeds.py results/demo/seeds.json --seeds 25 26 27 28 29 [--methods fgsm]

The runs themselves are written to a temporary folder; the JSON file keeps their curves.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tangentlab.metrics import catastrophic_overfitting
from tangentlab.records import RunRecord, environment
from tangentlab.report.subject import subjects
from tangentlab.runs import train
from tangentlab.studies.demo import METHODS, demo_config

CURVES = (
    "clean_accuracy",
    "fgsm_accuracy",
    "robust_accuracy",
    "kernel/fgsm~pgd/class/distance",
    "alarm/pooled",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(25, 35)))
    parser.add_argument("--methods", nargs="+", default=["fgsm"], choices=METHODS)
    options = parser.parse_args()
    # Once, before the file that it goes to is touched: the commit would look changed.
    machine, rows = environment(), []
    for seed in options.seeds:
        for method in options.methods:
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                record = train(demo_config(method, seed), Path(folder) / method)
                rows.append(row(record, method, seed, time.perf_counter() - started))
            shown = {key: value for key, value in rows[-1].items() if key != "curves"}
            print(json.dumps(shown), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"environment": machine, "runs": rows}, indent=1) + "\n")


def row(record: RunRecord, method: str, seed: int, seconds: float) -> dict[str, Any]:
    """What one run shows."""
    (run,), status = subjects([record]), record.status
    curves = {name: dict(zip(("epoch", "value"), record.series(name), strict=True)) for name in CURVES}
    looks = zip(*record.series("alarm/raised"), strict=True)
    return {
        "method": method,
        "seed": seed,
        "alarm_epoch": next((epoch for epoch, raised in looks if raised), None),
        "kernels_parted_epoch": run.parting,
        "collapse_epoch": run.collapse and run.collapse.epoch,
        "first_fall_epoch": first_fall(curves),
        "best_robust_accuracy": status["best"]["robust_accuracy"],
        "last_test_accuracy": {
            line["attack"]: line["accuracy"] for line in record.evaluations if line["checkpoint"] == "last"
        },
        "seconds": seconds,
        "probe_share": status["probe_seconds"] / status["train_seconds"],
        "curves": curves,
    }


def first_fall(curves: Mapping[str, Mapping[str, list[float]]]) -> float | None:
    """When robust accuracy was first below half of its best, whether it recovered or not."""
    robust, of_fgsm = curves["robust_accuracy"], curves["fgsm_accuracy"]
    fall = catastrophic_overfitting(robust["epoch"], of_fgsm["value"], robust["value"])
    return None if fall is None else fall.epoch


if __name__ == "__main__":
    main()
