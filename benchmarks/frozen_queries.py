"""How far Square gets against linearised networks, and against the networks themselves: is it far enough?

    python benchmarks/frozen_queries.py results/transfer/queries-tier1.json --tier 1

Networks of the study of transfer on a seed that no verdict rests on, after the study's PGD-10: robust
accuracy by the queries that Square has. The runs are written to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from tangentlab.attacks import Square
from tangentlab.records import environment
from tangentlab.runs import RunConfig, check_outcomes, train_many
from tangentlab.runs.build import build_attack, build_data, build_model, resolve_device
from tangentlab.runs.display import ProgressDisplay
from tangentlab.runs.evaluation import count_correct
from tangentlab.studies import transfer

QUERIES = (1, 200, 500, 1000, 2000, 4000)
# Method, moment, offset, examples, whether for as long as the network went on.
FROZEN = (
    ("pgd", "middle", "kept", "one-step", True),
    ("pgd", "middle", "kept", "clean", True),
    ("pgd", "end", "zero", "clean", False),
    ("standard", "end", "zero", "one-step", False),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tier", type=int, default=1, choices=(0, 1))
    parser.add_argument("--seed", type=int, default=transfer.TUNING_SEEDS[-1])
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Once, before the file that it goes to is touched: the commit would look changed.
    machine, rows = environment(), []
    with tempfile.TemporaryDirectory() as folder, ProgressDisplay() as display:
        methods = {method for method, *_ in FROZEN}
        configs = transfer.runs(options.tier, [options.seed])
        runs = {Path(folder) / key: config for key, config in configs.items() if config.name in methods}
        check_outcomes(train_many(runs, display=display))
        for path, config in runs.items():
            rows += measured(path, config)
            options.out.write_text(json.dumps({"environment": machine, "networks": rows}, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


def measured(folder: Path, config: RunConfig) -> list[dict[str, Any]]:
    """A row of the network that training ended with, and one of each of FROZEN with its kernel."""
    examples = build_data(config)
    device = resolve_device(config.device)
    ended, model = (build_model(config, examples, device) for _ in range(2))
    paths = transfer.moment_paths(folder, config)
    for network in (ended, model):
        transfer.load_moment(paths["end"], network, examples, "end")
    points = transfer.judged_points(examples)
    pgd = build_attack(config, num_steps=10)

    def row(network: nn.Module, **place: Any) -> dict[str, Any]:
        counts = {}
        for queries in QUERIES:
            attack = transfer.Unhidden(pgd, Square(config.eps, queries), (model, ended))
            counts[queries] = count_correct(network, points, attack, seed=config.seed, device=device)
        accuracies = {queries: count / len(points) for queries, count in counts.items()}
        return {"method": config.name, "seed": config.seed, **place, "robust_accuracy": accuracies}

    rows = [row(ended, moment="end", examples="the network itself")]
    for method, moment, offset, kind, whole in FROZEN:
        if method != config.name:
            continue
        epoch = transfer.load_moment(paths[moment], model, examples, moment)
        steps = transfer.steps_for(config, examples, epoch, whole=whole)
        kernel = transfer.class_kernels(model, examples, config)
        frozen, loss = transfer.freeze(model, kernel, examples, config, offset=offset, kind=kind, steps=steps)
        rows.append(row(frozen, moment=moment, offset=offset, examples=kind, steps=steps, loss=loss))
    return rows


if __name__ == "__main__":
    main()
