"""Single-step methods under other settings: what the study of the cure takes for its own and for its rivals.

    python benchmarks/cure_settings.py runs/settings-tier1 results/cure/settings-tier1.json --tier 1

On the seeds that no verdict rests on, at either eps of a tier. Settings are chosen by PGD accuracy on the
validation split, the mean of the last quarter of a run (late_accuracy): at a constant rate a single look
swings by ten points. Runs that the folder has finished are not run again.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from tangentlab.records import environment, read_run
from tangentlab.runs import RunConfig, check_outcomes, train_many
from tangentlab.runs.display import ProgressDisplay
from tangentlab.studies import cure, cure_arms
from tangentlab.studies.overfitting_watches import TUNING_SEEDS

SETTINGS = {
    "spectral": ("alarm.threshold", (0.85, 0.9, 0.95)),
    "grad_align": ("method.alignment", (0.2, 0.5, 2.0)),
    "n_fgsm": ("method.noise", (0.5, 1.0, 2.0)),
    "fgsm_pgi": ("method.consistency", (0.3, 1.0, 3.0, 10.0)),
    "zero_grad": ("method.quantile", (0.35, 0.7)),
}
LATE = 0.75  # of a run, from which on its accuracy is averaged


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tier", type=int, default=1, choices=(0, 1))
    parser.add_argument("--seeds", type=int, nargs="+", default=TUNING_SEEDS, choices=TUNING_SEEDS)
    parser.add_argument("--methods", nargs="+", default=[*SETTINGS], choices=SETTINGS)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Once, before the file that it goes to is touched: the commit would look changed.
    machine, rows, tier = environment(), [], options.tier
    for seed, method in product(options.seeds, options.methods):
        setting, values = SETTINGS[method]
        told = {"tier": tier, "seed": seed, "method": method}
        with ProgressDisplay() as display:
            runs = {
                options.runs / f"{method}-{value}-{eps:.3g}-{seed}": (
                    value,
                    run(tier, eps, method, value, seed),
                )
                for value, eps in product(values, cure_arms.TIERS[tier].eps)
            }
            configs = {path: config for path, (_, config) in runs.items()}
            check_outcomes(train_many(configs, jobs=options.jobs, display=display))
        for path, (value, config) in runs.items():
            rows.append({**told, setting: value, "eps": config.eps, **measured(path)})
        options.out.write_text(json.dumps({"environment": machine, "runs": rows}, indent=1) + "\n")


def run(tier: int, eps: float, method: str, value: float, seed: int) -> RunConfig:
    """The study's run, but for the setting."""
    chosen = cure_arms.TIERS[tier]
    words = f"{cure_arms.arms(chosen, eps)[method]} --{SETTINGS[method][0]}={value}"
    return cure_arms.run_config(chosen, eps, f"{method}+{value}", words, seed)


def measured(path: Path) -> dict[str, Any]:
    """What settings are compared by."""
    record = read_run(path)
    found = cure.course(record)
    late = [
        accuracy
        for epoch, accuracy in zip(found["epochs"], found["robust_accuracy"], strict=True)
        if epoch >= LATE * found["epochs"][-1]
    ]
    kept = {name: found[name] for name in ("best_validation_accuracy", "fate", "collapse")}
    return {"late_accuracy": fmean(late), **kept, "cost": record.status["cost"]}


if __name__ == "__main__":
    main()
