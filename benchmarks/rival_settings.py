"""Single-step methods under other settings: what the study of the cure takes for its rivals.

    python benchmarks/rival_settings.py results/cure/settings-tier0.json --tier 0 [--jobs 2]

On the seeds that no verdict rests on, at either eps of a tier. Settings are chosen by the last PGD accuracy
on the validation split (validation_accuracy); what test points say stands beside it. The runs are written to
a temporary folder; the JSON file keeps what the study measures of each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from tangentlab.records import environment
from tangentlab.runs import RunConfig, check_outcomes, train_many
from tangentlab.runs.display import ProgressDisplay
from tangentlab.studies import cure, cure_arms
from tangentlab.studies.overfitting_watches import TUNING_SEEDS

SETTINGS = {
    "grad_align": ("alignment", (0.05, 0.2, 0.5, 2.0, 10.0)),
    "n_fgsm": ("noise", (0.5, 1.0, 2.0)),
    "fgsm_pgi": ("consistency", (0.3, 1.0, 3.0, 10.0)),
    "zero_grad": ("quantile", (0.35, 0.7)),
}
KEPT = (
    "eps",
    "clean_accuracy",
    "apgd_accuracy",
    "apgd_n",
    "fate",
    "collapse",
    "cost",
    "best_validation_accuracy",
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
    machine, rows, tier = environment(), [], options.tier
    for seed, (method, (setting, values)) in product(TUNING_SEEDS, SETTINGS.items()):
        with tempfile.TemporaryDirectory() as folder, ProgressDisplay() as display:
            runs = {
                Path(folder) / f"{value}-{eps:.3g}": run(tier, eps, method, setting, value, seed)
                for value, eps in product(values, cure_arms.TIERS[tier].eps)
            }
            check_outcomes(train_many(runs, jobs=options.jobs, display=display))
            for path, config in runs.items():
                told = {"tier": tier, "seed": seed, "method": method, setting: config.method[setting]}
                rows.append({**told, **measured(path, config)})
        options.out.write_text(json.dumps({"environment": machine, "runs": rows}, indent=1) + "\n")


def run(tier: int, eps: float, method: str, setting: str, value: float, seed: int) -> RunConfig:
    """The study's run, but for the setting."""
    words = f"--method={method} --method.buffer_updates=[loss] --method.{setting}={value}"
    return cure_arms.run_config(cure_arms.TIERS[tier], eps, f"{method}+{value}", words, seed)


def measured(path: Path, config: RunConfig) -> dict[str, Any]:
    """Of what the study measures, what settings are compared by."""
    (line,) = cure.measure(path, config)
    return {**{name: line[name] for name in KEPT}, "validation_accuracy": line["robust_accuracy"][-1]}


if __name__ == "__main__":
    main()
