"""The claims of the study of evolution, and what its raw values say of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from math import isfinite
from statistics import fmean
from typing import Any

from tangentlab.studies.claims import PAPER, Claim, Verdict, judge
from tangentlab.studies.study import Values

METHODS = ("standard", "fgsm_rs", "n_fgsm", "pgd", "trades")
ADVERSARIAL = METHODS[1:]
DECAYING = ("piecewise", "cosine")
BETWEEN = "clean~pgd"
COUNTS = ("entropy_rank", "participation_ratio", "intrinsic_dimension", "top_mass")
FAST = 1.5  # times the lazy level, as stages are claimed
SPEEDS = ("angle_velocity", "angle_per_learning_rate")
METRICS = ("distance_from_first", *SPEEDS, *COUNTS, "target_alignment", "specialization")

LOO = "Loo et al. 2022"
TSILIVIS = "Tsilivis & Kempe 2022"
CLAIMS = (
    Claim(
        "evolution/settles-earlier",
        "With a constant learning rate the kernel takes 1.5 times as long to settle under standard training "
        "as under PGD training.",
        "steps until the angle to the last kernel stays below half of the first one's, standard over PGD",
        1.5,
        source=f"{LOO}, {TSILIVIS}",
    ),
    Claim(
        "evolution/elsewhere",
        "PGD training ends at a kernel twice as far from standard training's as from TRADES's.",
        "kernel distance to standard training's last kernel over that to TRADES's",
        2.0,
        source=LOO,
    ),
    Claim(
        "evolution/carries-robustness",
        "Clean training on the fixed kernel of a PGD-trained network is more robust than on a standard "
        "one's, by 10 points.",
        "PGD-10 accuracy of zero-offset linearised networks trained on clean images, PGD − standard",
        0.1,
        source=LOO,
    ),
    Claim(
        "evolution/top-mass",
        "PGD training ends with more of the kernel in its ten top eigenvalues than standard training, by 2 "
        "points.",
        "top mass of the class kernels on clean inputs, PGD − standard",
        0.02,
        source=TSILIVIS,
    ),
    Claim(
        "evolution/turns-first",
        "Under PGD training the kernel turns first and grows later: half of its radius takes 1.5 times as "
        "long as half of its angle.",
        "steps until ‖K − K₀‖ is half of its last value, over the same of the angle to K₀",
        1.5,
        source=f"{TSILIVIS}, as we read it",
    ),
    Claim(
        "evolution/three-stages",
        "With a decaying learning rate most adversarial runs have three stages in the angle per unit of "
        "summed learning rate.",
        "share of the runs that begin 1.5 times as fast as they are in their second quarter and have a third "
        "stage after a lazy one, which docs/stages.md establishes",
        0.5,
        source=PAPER,
    ),
    Claim(
        "evolution/third-is-adversarial",
        "The third stage is adversarial training's own: likelier than under standard training, by 0.5.",
        "probability of a third stage in the angle per unit of summed learning rate, which decays, mean over "
        "the adversarial methods − standard",
        0.5,
        source=f"{PAPER}, as we read it",
    ),
    Claim(
        "evolution/third-at-drop",
        "With a stepwise rate the third stage starts at the first drop, within 5 % of the training.",
        "|start − drop| as a share of the training, in the angle per unit of summed learning rate, mean over "
        "the adversarial runs with a third stage",
        0.05,
        above=False,
    ),
    Claim(
        "evolution/drop-triggers",
        "The learning rate's drop makes the kernel evolve again: PGD training's moves 1.5 times as far from "
        "the second to the last quarter with a stepwise rate as with a constant one.",
        "angle between the quarters' mean kernels on clean inputs, stepwise over constant",
        1.5,
    ),
    Claim(
        "evolution/few-overfit",
        "With few images PGD training overfits robustly: by 2 points more than with many, in as many steps.",
        "best − last PGD-10 accuracy on the validation split, few − many, stepwise rate",
        0.02,
    ),
    Claim(
        "evolution/overfitting-triggers",
        "Robust overfitting makes the kernel evolve again: with few images PGD training's moves 1.5 times as "
        "far from the second to the last quarter as with many, in as many steps.",
        "angle between the quarters' mean kernels on clean inputs, few over many, stepwise rate",
        1.5,
    ),
    Claim(
        "evolution/sub-kernels",
        "Under adversarial training each class kernel comes to align with its class: specialization ends "
        "above 1.5.",
        "specialization on clean inputs, mean over the adversarial methods; 1 is none",
        1.5,
        source=PAPER,
    ),
    Claim(
        "evolution/first-layer",
        "Clean and PGD kernels part in the first layer: after PGD training twice as far as in the last "
        "convolution.",
        "kernel distance between clean and PGD inputs, first over last convolution",
        2.0,
    ),
    Claim(
        "evolution/top-directions",
        "Clean and PGD kernels differ along the top: more than half of their squared difference lies in the "
        "clean kernel's ten top eigen-directions.",
        "‖VᵀDV‖²/‖D‖² of PGD training, mean over the snapshots",
        0.5,
    ),
    Claim(
        "evolution/counts-repeat",
        "Entropy rank, participation ratio, intrinsic dimension and top mass repeat one another: every two "
        "have a rank correlation above 0.9.",
        "least |Spearman correlation| of two of them, over all runs and snapshots",
        0.9,
    ),
)
TABLE_SETTING = "breast cancer, a table of 30 features, MLP"
# What needs neither convolutions nor ten classes nor many examples.
ON_THE_TABLE = (
    "settles-earlier",
    "turns-first",
    "three-stages",
    "third-is-adversarial",
    "third-at-drop",
    "drop-triggers",
)


def verdicts(values: Sequence[Values], setting: str) -> list[Verdict]:
    """Each claim on the images and, where it applies, on the table."""
    found = []
    for claim in CLAIMS:
        name = claim.id.partition("/")[2]
        for table, where in ((False, setting), (True, TABLE_SETTING)):
            lines = [line for line in values if (line["data"] == "table") == table]
            if table and (name not in ON_THE_TABLE or not lines):
                continue
            effects = {}
            for seed in {line["seed"] for line in lines}:
                effect = EFFECTS[name]([line for line in lines if line["seed"] == seed])
                if effect is not None and isfinite(effect):
                    effects[seed] = effect
            found.append(judge(claim, where, effects))
    return found


def correlations(values: Iterable[Values], names: Sequence[str] = METRICS) -> dict[tuple[str, str], float]:
    """Spearman correlation of every two metrics over the snapshots on clean inputs that have both."""
    from scipy.stats import spearmanr

    lines = _select(values, what="snapshot", inputs="clean")
    found = {}
    for a, b in combinations(names, 2):
        both = [(line[a], line[b]) for line in lines if a in line and b in line]
        # Without two values of each there is no order.
        if len(both) > 2 and all(len(set(column)) > 1 for column in zip(*both, strict=True)):
            found[a, b] = float(spearmanr(both).statistic)
    return found


def repetitions(values: Sequence[Values]) -> Iterator[dict[str, Any]]:
    """How far every two metrics repeat each other on the images, a seed: |Spearman correlation| over the
    snapshots of all runs, and over the runs' last ones."""
    for seed in sorted({line["seed"] for line in values}):
        lines = _select(values, what="snapshot", inputs="clean", data="images", seed=seed)
        last = {line["run"]: line for line in lines}  # snapshots are in order
        ended = correlations(last.values())
        for (a, b), along in sorted(correlations(lines).items(), key=lambda found: -abs(found[1])):
            pair = f"{a}, {b}".replace("_", " ")
            line = {"what": "repetition", "seed": seed, "pair": pair, "along": abs(along)}
            yield line | ({"ended": abs(ended[a, b])} if (a, b) in ended else {})


def _select(lines: Iterable[Values], **where: Any) -> list[Values]:
    """The lines with these values, of several any one; without those of few images, unless asked for."""
    wanted = {"data": ("images", "table"), **where}
    chosen = {key: value if isinstance(value, tuple) else (value,) for key, value in wanted.items()}
    return [line for line in lines if all(line.get(key) in allowed for key, allowed in chosen.items())]


def _mean(lines: Iterable[Values], key: str) -> float | None:
    found = [line[key] for line in lines if key in line]
    return fmean(found) if found else None


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _of_run(lines: Sequence[Values], key: str, method: str, schedule: str = "piecewise") -> float | None:
    return _mean(_select(lines, what="run", method=method, schedule=schedule), key)


def _few_and_many(lines: Sequence[Values], key: str) -> tuple[float | None, float | None]:
    """Of PGD training with few images, and with many."""
    few = _mean(_select(lines, what="run", data="few", schedule="piecewise"), key)
    return few, _of_run(lines, key, "pgd")


def _excess(lines: Sequence[Values], what: str, key: str, **where: Any) -> float | None:
    """PGD training's minus standard training's."""
    pgd, standard = (_mean(_select(lines, what=what, method=m, **where), key) for m in ("pgd", "standard"))
    return _difference(pgd, standard)


def _settles_earlier(lines: Sequence[Values]) -> float | None:
    return _ratio(*(_of_run(lines, "settled", method, "constant") for method in ("standard", "pgd")))


def _elsewhere(lines: Sequence[Values]) -> float | None:
    return _ratio(*(_of_run(lines, f"to_{method}", "pgd") for method in ("standard", "trades")))


def _turns_first(lines: Sequence[Values]) -> float | None:
    return _ratio(*(_of_run(lines, key, "pgd") for key in ("grown", "turned")))


def _decaying(lines: Sequence[Values], methods: Sequence[str]) -> list[Values]:
    """The stages of the runs whose learning rate decays, in the angle per unit of its sum."""
    return _select(lines, what="stages", inputs="clean", speed=SPEEDS[1], method=methods, schedule=DECAYING)


def _three_stages(lines: Sequence[Values]) -> float | None:
    runs = _decaying(lines, ADVERSARIAL)
    return fmean(run["first_ratio"] >= FAST and "third_start" in run for run in runs) if runs else None


def _third_is_adversarial(lines: Sequence[Values]) -> float | None:
    return _difference(
        *(_mean(_decaying(lines, methods), "third_probability") for methods in (ADVERSARIAL, METHODS[:1]))
    )


def _third_at_drop(lines: Sequence[Values]) -> float | None:
    found = [line["third_after_drop"] for line in _decaying(lines, ADVERSARIAL) if "third_after_drop" in line]
    return fmean(map(abs, found)) if found else None


def _drop_triggers(lines: Sequence[Values]) -> float | None:
    return _ratio(*(_of_run(lines, "moved", "pgd", schedule) for schedule in ("piecewise", "constant")))


def _first_layer(lines: Sequence[Values]) -> float | None:
    found = _select(lines, what="layer", method="pgd", convolution=True)
    ended = _select(found, step=found[-1]["step"]) if found else []
    return ended[0]["distance"] / ended[-1]["distance"] if ended else None


def _counts_repeat(lines: Sequence[Values]) -> float | None:
    return min(map(abs, correlations(lines, COUNTS).values()), default=None)


# claim -> its effect in the lines of one seed and data set; None where the runs are missing
EFFECTS: Mapping[str, Callable[[Sequence[Values]], float | None]] = {
    "settles-earlier": _settles_earlier,
    "elsewhere": _elsewhere,
    "carries-robustness": lambda lines: _excess(lines, "carried", "robust"),
    "top-mass": lambda lines: _excess(lines, "run", "top_mass", schedule="piecewise"),
    "turns-first": _turns_first,
    "three-stages": _three_stages,
    "third-is-adversarial": _third_is_adversarial,
    "third-at-drop": _third_at_drop,
    "drop-triggers": _drop_triggers,
    "few-overfit": lambda lines: _difference(*_few_and_many(lines, "robust_overfitting")),
    "overfitting-triggers": lambda lines: _ratio(*_few_and_many(lines, "moved")),
    "sub-kernels": lambda lines: _mean(_select(lines, what="run", method=ADVERSARIAL), "specialization"),
    "first-layer": _first_layer,
    "top-directions": lambda lines: _mean(_select(lines, inputs=BETWEEN, method="pgd"), "in_top"),
    "counts-repeat": _counts_repeat,
}
