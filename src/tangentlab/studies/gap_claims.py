"""The claims of the study of the gap, and what its raw values say of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log2
from statistics import fmean
from typing import Any

from tangentlab.studies.claims import PAPER, Claim, Verdict, judge, measured

METHODS = ("standard", "fgsm", "n_fgsm", "pgd", "trades")
CONTROL = "pgd-constant"
SCALED = ("standard", "pgd")
STEPS = (1, 20)  # 20 bring the momentum, which begins at zero, to 88 % of what it was
BATCH_SIZES = (64, 512)

ERROR = Claim(
    "gap/error",
    "After PGD training the empirical kernel on running statistics is more than 10 % off the kernel that "
    "training follows, on PGD inputs.",
    "‖Θ_batch − Θ_running‖/‖Θ_batch‖ at the last checkpoint",
    0.1,
    source=PAPER,
)
ADVERSARIAL = Claim(
    "gap/adversarial",
    "That error is larger after PGD training on PGD inputs than after standard training on clean ones, by "
    "more than 0.",
    "difference of the relative errors at the last checkpoint",
    0.0,
    source=PAPER,
)
DERIVATIVE = Claim(
    "gap/derivative",
    "The derivative through the statistics makes a larger part of the mixed kernel's gap than their values: "
    "more than 1 times, under each of the five methods.",
    "smallest over the methods of ‖derivative‖/‖values‖ on PGD inputs, either's mean over the checkpoints of "
    "training",
    1.0,
)
BATCH_SIZE = Claim(
    "gap/batch-size",
    "The derivative's part does not vanish in large batches: in batches of 512 it keeps more than 0.5 of "
    "what it is in batches of 64, under standard and PGD training.",
    "smaller of the two ratios, clean inputs, last checkpoint",
    0.5,
)
MIXED = Claim(
    "gap/mixed",
    "The mixed kernel predicts a step of PGD training better than the running kernel, by more than 0.1 in "
    "relative error on clean inputs.",
    "difference of the relative errors, mean over the checkpoints of training",
    0.1,
)
DRIFT = Claim(
    "gap/drift",
    "Left out, the drift of the running statistics makes the prediction of a step of PGD training more than "
    "2 times as wrong.",
    "log₂ of the ratio of the relative errors without and with it, clean inputs, mean over the checkpoints "
    "of training",
    1.0,
)
JUMP = Claim(
    "gap/jump",
    "On adversarial inputs the perturbation's own jump, which no kernel explains, is more than 0.3 of the "
    "network's change in a step of PGD training.",
    "‖f₊(x*₊) − f₊(x*)‖/‖f₊(x*) − f(x*)‖, mean over the checkpoints of training",
    0.3,
)
LAZY = Claim(
    "gap/lazy",
    "The kernel predicts late PGD training and not early, at a constant learning rate: the cosine between "
    "twenty steps and what the frozen kernel says of them rises by more than 0.1 from the first epoch's end "
    "to the last's.",
    "difference of the cosines, on PGD inputs and batch statistics",
    0.1,
    source=f"Fort et al. 2020; {PAPER}",
)
CLAIMS = (ERROR, ADVERSARIAL, DERIVATIVE, BATCH_SIZE, MIXED, DRIFT, JUMP, LAZY)


def judged(values: Sequence[Mapping[str, Any]], setting: str) -> list[Verdict]:
    """The verdicts; a seed counts where every run that its claim needs is there, and its network lives: the
    outputs of one that died are constant, and its kernels equal."""
    seeds = sorted({line["seed"] for line in values})
    by_run: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for line in values:
        by_run.setdefault((line["arm"], line["seed"]), []).append(line)
    by_run = {run: lines for run, lines in by_run.items() if lines[-1]["gap/clean/batch/relative_error"] > 0}

    def effects(of_seed: Callable[..., float], arms: Sequence[str]) -> dict[int, float]:
        return measured(seeds, lambda seed: of_seed(*(by_run[arm, seed] for arm in arms)))

    error, one = "gap/pgd/batch/relative_error", "change/1/evaluation"
    frozen = f"change/{STEPS[-1]}/batch/pgd/frozen/cosine"
    found: list[tuple[Claim, Callable[..., float], Sequence[str]]] = [
        (ERROR, lambda pgd: pgd[-1][error], ["pgd"]),
        (
            ADVERSARIAL,
            lambda pgd, standard: pgd[-1][error] - standard[-1]["gap/clean/batch/relative_error"],
            ["pgd", "standard"],
        ),
        (DERIVATIVE, lambda *each: min(map(_derivative_ratio, each)), METHODS),
        (BATCH_SIZE, lambda *each: min(map(_scaling_ratio, each)), SCALED),
        (
            MIXED,
            lambda pgd: (
                _mean(pgd, f"{one}/clean/running/relative_error")
                - _mean(pgd, f"{one}/clean/settled/relative_error")
            ),
            ["pgd"],
        ),
        (
            DRIFT,
            lambda pgd: fmean(
                log2(
                    line[f"{one}/clean/no_drift/relative_error"] / line[f"{one}/clean/settled/relative_error"]
                )
                for line in _trained(pgd)
            ),
            ["pgd"],
        ),
        (JUMP, lambda pgd: _mean(pgd, f"{one}/pgd/jump"), ["pgd"]),
        (LAZY, lambda pgd: pgd[-1][frozen] - _trained(pgd)[0][frozen], [CONTROL]),
    ]
    return [judge(claim, setting, effects(effect, arms)) for claim, effect, arms in found]


def _trained(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without the network that was not trained yet."""
    return [line for line in lines if line["step"] > 0]


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return fmean(line[name] for line in _trained(lines))


def _derivative_ratio(lines: Sequence[Mapping[str, Any]]) -> float:
    return _mean(lines, "gap/pgd/mixed/derivative") / _mean(lines, "gap/pgd/mixed/values")


def _scaling_ratio(lines: Sequence[Mapping[str, Any]]) -> float:
    small, large = (lines[-1][f"scale/{size}/derivative"] for size in BATCH_SIZES)
    return float(large / small)
