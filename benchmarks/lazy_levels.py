"""Where the kernel's velocity levels off under PGD training, over the fastest: what the levels of
the switch's rule were chosen by.

    python benchmarks/lazy_levels.py results/lazy/levels.json --seeds 0 1 2 --precision bf16

Fashion-MNIST at tier 1, the first half of the training, before the learning rate falls; the switch looks and
never changes. The runs are written to a temporary folder; the JSON file keeps their velocities.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, get_args

from tangentlab.records import environment
from tangentlab.runs import Precision, load_config, train
from tangentlab.studies.lazy_arms import WARMUP

INPUTS = ("clean", "pgd")
EPOCHS, WHOLE = 8, 15
THRESHOLD = 1e-9  # never reached
WATCHING = (
    f"--method=pgd --training.epochs={EPOCHS} --training.schedule=constant "
    f"--training.warmup={WARMUP * WHOLE / EPOCHS} --probe.size=0 --threads=1 "
    "--channels_last=true --evaluation.test_num_steps=1 --evaluation.test_size=100 --evaluation.every=8 "
    f"--switch.rule=kernel --switch.threshold={THRESHOLD} --switch.resume=1"
)
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SETTLED = 4.0  # epochs: from here on the velocity is called level; the rate rises for three


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="of training steps")
    options = parser.parse_args()
    # Once, before the file that it goes to is touched: the commit would look changed.
    machine, rows = environment(), []
    for seed in options.seeds:
        for inputs in INPUTS:
            rows.append(row(seed, inputs, options.precision))
            print(
                json.dumps({key: rows[-1][key] for key in ("seed", "inputs", "level", "lazy_at")}), flush=True
            )
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"environment": machine, "runs": rows}, indent=1) + "\n")


def row(seed: int, inputs: str, precision: Precision) -> dict[str, Any]:
    """One run's velocities, and the median of the level ones over the fastest."""
    words = [*WATCHING.split(), f"--switch.inputs={inputs}", f"--precision={precision}", f"--seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        record = train(load_config("fashion-mnist", words), Path(folder) / "run")
    epochs, velocity = record.series("switch/velocity")
    fastest = [below / THRESHOLD for below in record.series("switch/lazy_below")[1]]  # at that learning rate
    shares = [seen / most for seen, most in zip(velocity, fastest, strict=True)]
    return {
        "seed": seed,
        "inputs": inputs,
        "precision": precision,
        "level": median(share for epoch, share in zip(epochs, shares, strict=True) if epoch > SETTLED),
        "lazy_at": {level: lazy_at(epochs, shares, level) for level in LEVELS},
        "epochs": epochs,
        "velocity": velocity,
        "fastest": fastest,
        "steering_seconds": record.status["steering_seconds"],
        "train_seconds": record.status["train_seconds"],
    }


def lazy_at(epochs: list[float], shares: list[float], level: float) -> float | None:
    """When the rule would have switched at that threshold; None where it would not have."""
    rows = zip(pairwise(epochs), pairwise(shares), strict=True)  # patience is two looks
    return next((there[1] for there, pair in rows if there[0] >= SETTLED and max(pair) < level), None)


if __name__ == "__main__":
    main()
