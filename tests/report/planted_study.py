"""A study's folder whose truth is planted: seeds, raw values, and the claims that they decide.

Written as a study writes it, but for the verdicts: those are given, since the report only shows them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import planted
import yaml

from tangentlab.files import finite, json_bytes
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.studies.claims import Claim, judge

SEEDS = (0, 1, 2)
METHODS = {"standard": 1.0, "fgsm": 2.0, "pgd": 4.0}
STATISTICS = ("as trained", "population of clean inputs", "population of crafted inputs", "current batch")

FIGURES = (
    ValueFigure(
        key="gap",
        title="The gap between kernels",
        caption="Relative error of the kernel with running statistics.",
        y=(Quantity("gap", "relative error", log=True),),
        panels="inputs",
        where={"part": "gap"},
    ),
    ValueFigure(
        key="curves",
        title="Agreement along training",
        caption="Cosine and error of the predicted change.",
        y=(Quantity("cosine", "cosine"), Quantity("share", "share of the change", percent=True)),
        panels="inputs",
        views="y",
        where={"part": "gap"},
    ),
    ValueFigure(
        key="statistics",
        title="Statistics of BatchNorm",
        caption="Accuracy on 1,000 test images.",
        y=(
            Quantity("clean_accuracy", "clean accuracy", percent=True),
            Quantity("robust_accuracy", "robust accuracy", percent=True),
        ),
        x="statistics",
        panels="y",
        views="variance",
        where={"part": "statistics"},
    ),
)

CLAIMS = (
    (
        Claim("gap/batch", "The kernels differ by more than 0.2 in the lazy stage.", "relative error", 0.2),
        {0: 0.52, 1: 0.55, 2: 0.49},
    ),
    (
        Claim(
            "gap/null",
            "Biased and unbiased variance change robust accuracy by less than 0.2 points at usual batches.",
            "difference in points",
            0.2,
            above=False,
            source="Li et al. 2023, as we read it",
        ),
        {0: 0.61, 1: 0.72, 2: 0.68},
    ),
    (
        Claim("gap/cosine", "The predicted change has a cosine above 0.9.", "cosine", 0.9),
        {0: 0.95, 1: 0.86, 2: 0.99},
    ),
    (Claim("gap/open", "Nobody measured this yet.", "nothing", 1.0), {}),
)

VERDICTS = ("supported", "refuted", "inconclusive", "inconclusive")


def lines() -> list[dict[str, Any]]:
    """values.jsonl: curves over epochs for every method, dots for every choice of statistics."""
    found: list[dict[str, Any]] = []
    for method, level in METHODS.items():
        for seed in SEEDS:
            place = {"run": f"{method}-{seed}", "method": method, "seed": seed}
            for epoch in range(9):
                for inputs, more in (("clean", 1.0), ("crafted", 1.5)):
                    gap = 0.01 * level * more * 1.6 ** min(epoch, 5) * (1 + 0.1 * seed)
                    cosine = 1 - 0.02 * level * more - 0.01 * seed
                    values = {"gap": gap, "cosine": cosine, "share": min(gap, 1.0)}
                    found.append(place | {"part": "gap", "epoch": epoch, "inputs": inputs} | values)
            for rank, statistics in enumerate(STATISTICS):
                for variance in ("biased", "unbiased"):
                    accuracies = {
                        "clean_accuracy": 0.9 - 0.03 * level - 0.02 * rank + 0.004 * seed,
                        # One choice was not attacked.
                        "robust_accuracy": None if rank == 3 else 0.1 * level + 0.03 * rank - 0.01 * seed,
                    }
                    choice = {"statistics": statistics, "variance": variance}
                    found.append(place | {"part": "statistics"} | choice | accuracies)
    return found


def write(folder: Path, *, seeds: tuple[int, ...] = ()) -> Path:
    """The folder, with the runs of some seeds; without any, as results are kept."""
    folder.mkdir(parents=True)
    config = {"schema": 1, "study": "gap", "tier": 0, "seeds": list(SEEDS)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "values.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    verdicts = [judge(claim, "digits, small CNN", effects).as_dict() for claim, effects in CLAIMS]
    study = {"schema": 1, "study": "gap", "tier": 0, "claims": verdicts}
    study |= {"figures": [finite(asdict(figure)) for figure in FIGURES], "environment": {"python": "3.11"}}
    (folder / "study.json").write_bytes(json_bytes(study))
    for seed in seeds:
        for plan in (planted.STANDARD, planted.FGSM):
            short = replace(plan, epochs=2, seed=seed, kernels=False)
            planted.write(folder / "runs" / f"{plan.name}-{seed}", short)
    return folder
