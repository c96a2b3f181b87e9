"""What the study of the lazy switch trains: its arms by tier, and what a figure colours each by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tangentlab.runs import RunConfig
from tangentlab.runs.parsing import build_method
from tangentlab.studies.study import configured


@dataclass(frozen=True)
class Tier:
    """What a tier trains and how it is judged.

    Args:
        config: a shipped configuration.
        words: overrides of it.
        points: first test points for APGD.
        all_points: likewise, of arms that claims finer than two points compare.
        autoattack: first test points for AutoAttack, of the finalists.
        narrow: widths of the narrower network.
        whole: whether all arms are part of it, or the finalists alone.
    """

    config: str
    words: str
    points: int
    all_points: int
    autoattack: int
    narrow: str = ""
    whole: bool = True


# Of the training. At a rate of 0.1 from the first step on PGD training stalls for half of it on some seeds.
WARMUP = 0.2
COMMON = (
    f"--training.schedule=piecewise --training.warmup={WARMUP} --threads=1 --channels_last=true "
    "--evaluation.num_steps=10 --evaluation.test_num_steps=10 --evaluation.test_size=200 --evaluation.every=1"
)
TIERS = {
    0: Tier(
        "digits",
        "--eps=0.2 --training.epochs=12 --training.batch_size=50 --data.validation_size=200",
        360,
        360,
        50,
        "[4,8,16,16]",
    ),
    1: Tier(
        "fashion-mnist",
        "--training.epochs=15 --data.validation_size=300",
        1000,
        10_000,
        200,
        "[8,16,32]",
    ),
    2: Tier("cifar10-narrow", "--training.epochs=15 --data.validation_size=300", 500, 2000, 200, whole=False),
}
UNWATCHED = "--probe.size=0"
WATCHED = "--probe.size=20 --probe.every=0.5"

# A switch at a fixed epoch: to what, and at which shares of the training.
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.8)
FIXED = {"stored": SHARES, "clean": (0.2, 0.5, 0.8), "one-step": (0.2, 0.5), "fewer": (0.2, 0.35)}
STORED = [f"stored-at-{share:g}" for share in SHARES]
HALF = 0.5  # of PGD training's cost
HALF_SHARE = 0.1  # of a longer training that costs half, at which PGD gives way to stored perturbations
FIRST_FALL = 0.5  # of the learning rate, a share of the training
# On 3 and 4, in trainings without a warm-up, how the rule goes on after its switch was chosen.
TUNING_SEEDS = (0, 1, 2, 3, 4)
EMA = "--training.ema_decay=0.995"
RETURNING = "kernel-stored"  # to the full attack where the learning rate falls
KERNEL = "kernel-stored-staying"
THROUGHOUT = "stored-throughout"
CHOSEN_SHARE = 0.2  # on the tuning seeds; under other conditions and for longer it alone is tried
CHOSEN = f"stored-at-{CHOSEN_SHARE:g}"
DOUBLE = "double"  # as many epochs
REFERENCE_TWICE, CHOSEN_TWICE = f"pgd-{DOUBLE}", f"{CHOSEN}-{DOUBLE}"
CAME_BACK = f"{CHOSEN}-returning"  # for good where the learning rate first falls
FINALISTS = ("pgd", KERNEL, CHOSEN, THROUGHOUT, "atta-half")
PGD, STANDARD = "--method=pgd", "--method=standard"
# BatchNorm is treated as in PGD training, from which the other arms with stored perturbations come.
STORED_THROUGHOUT = (
    "--method=atta --method.reset_epochs=null --method.crafting_statistics=batch "
    "--method.buffer_updates=[crafting,loss]"
)
USUAL = "usual"


def _replacements(eps: float) -> dict[str, str]:
    """What the examples are replaced by."""
    return {
        "clean": "--switch.to=standard",
        "one-step": "--switch.to=fgsm_rs",
        "stored": "--switch.to=atta",
        "fewer": f"--switch.to=pgd --switch.to.num_steps=2 --switch.to.step_size={0.625 * eps}",
    }


TO = tuple(_replacements(1.0))


def _rivals(eps: float) -> dict[str, str]:
    """Those at half of PGD training's cost, as published, with what the benchmark of methods found."""
    return {
        "n_fgsm-half": "--method=n_fgsm",
        # At a consistency of 10 the network dies.
        "fgsm_pgi-half": "--method=fgsm_pgi --method.consistency=1 --method.label_smoothing=4/9",
        "fgsm_rs-half": "--method=fgsm_rs",
        "free-half": "--method=free --training.learning_rate=0.04",
        "atta-half": "--method=atta --method.reset_epochs=null",
        "pgd-3-half": f"--method=pgd --method.num_steps=3 --method.step_size={eps / 2}",
        "pgd-half": PGD,
    }


LONGER = "stored-half"
HALF_RIVALS = (*_rivals(1.0), "clean-first-half", LONGER, THROUGHOUT, f"{THROUGHOUT}-half")
# Compared by claims finer than two points.
ON_ALL_POINTS = (
    *FINALISTS,
    *(REFERENCE_TWICE, CHOSEN_TWICE, CAME_BACK, "pgd-ema", f"{KERNEL}-ema"),
    *("stored-at-0.1", "stored-at-0.35", "stored-at-0.5"),
    *("n_fgsm-half", "fgsm_pgi-half", LONGER, f"{THROUGHOUT}-half"),
)


def arms(tier: Tier) -> dict[str, str]:
    """Name -> overrides."""
    fixed, kernel = "--switch.rule=fixed", "--switch.rule=kernel"
    epochs, eps = _config(tier, "").training.epochs, _config(tier, "").eps
    to = _replacements(eps)

    def replaced(name: str, share: float) -> str:
        return f"{PGD} {fixed} --switch.epoch={share * epochs:g} {to[name]}"

    found = {"pgd": f"{PGD} {WATCHED}", "trades": f"--method=trades {WATCHED}"}
    for name, shares in FIXED.items():
        found |= {f"{name}-at-{share:g}": replaced(name, share) for share in shares}
    found[THROUGHOUT] = STORED_THROUGHOUT
    found["trades-fewer-at-0.35"] = (
        f"--method=trades {fixed} --switch.epoch={0.35 * epochs:g} --switch.to=trades "
        f"--switch.to.num_steps=1 --switch.to.step_size={eps}"
    )
    found[RETURNING] = f"{PGD} {kernel} --switch.return_on_drop=true {to['stored']}"
    found[KERNEL] = f"{PGD} {kernel} {to['stored']}"
    found["kernel-clean"] = f"{PGD} {kernel} {to['clean']}"
    found["kernel-clean-guarded"] = f"{found['kernel-clean']} --switch.held_out=300"
    for name, words in _rivals(eps).items():
        found[name] = f"{words} --training.epochs={_affordable(tier, words)}"
    full = f"--switch.to=pgd --switch.to.num_steps={_config(tier, PGD).method['num_steps']}"
    found["clean-first-half"] = f"{STANDARD} {fixed} {_clean_first(tier)} {full}"
    long = _stored_longer(tier)
    found[LONGER] = f"{PGD} {fixed} --switch.epoch={HALF_SHARE * long:g} {to['stored']}"
    found[LONGER] += f" --training.epochs={long}"
    found[f"{THROUGHOUT}-half"] = (
        f"{STORED_THROUGHOUT} --training.epochs={_affordable(tier, STORED_THROUGHOUT)}"
    )
    found[CAME_BACK] = f"{found[CHOSEN]} --switch.return_on_drop=true"
    found[REFERENCE_TWICE] = f"{PGD} --training.epochs={2 * epochs}"
    found[CHOSEN_TWICE] = f"{replaced('stored', 2 * CHOSEN_SHARE)} --training.epochs={2 * epochs}"
    for name in ("pgd", KERNEL, "n_fgsm-half"):
        found[f"{name}-ema"] = f"{found[name]} {UNWATCHED} {EMA}"
    for condition, words in _conditions(tier, eps).items():
        found[f"pgd+{condition}"] = f"{PGD} {words}"
        found[f"{KERNEL}+{condition}"] = f"{found[KERNEL]} {words}"
        for name in ("clean", "one-step", "stored"):
            found[f"{name}-at-{CHOSEN_SHARE}+{condition}"] = f"{replaced(name, CHOSEN_SHARE)} {words}"
    return found if tier.whole else {name: found[name] for name in FINALISTS}


def _conditions(tier: Tier, eps: float) -> dict[str, str]:
    """What is other than usual -> overrides."""
    return {
        "cold": "--training.warmup=0",
        "slow": "--training.learning_rate=0.02",
        "weak": f"--eps={eps / 2}",
        "narrow": f"--model.widths={tier.narrow}",
        "constant": "--training.schedule=constant",
    }


def runs(tier: int, seeds: Sequence[int]) -> dict[str, RunConfig]:
    """ARM-SEED -> configuration."""
    chosen = TIERS[tier]
    return {
        f"{name}-{seed}": _config(chosen, f"{words} --name={name}", seed)
        for seed in seeds
        for name, words in arms(chosen).items()
    }


def _config(tier: Tier, words: str, seed: int = 0) -> RunConfig:
    return configured(tier.config, f"{COMMON} {UNWATCHED} {tier.words} {words}", seed=seed)


def _cost(tier: Tier, words: str) -> float:
    """Of an epoch, in forward equivalents an example; one of Free takes each batch several times."""
    method = build_method(_config(tier, words))
    return method.passes.cost * method.replays


def _budget(tier: Tier) -> float:
    return HALF * _config(tier, "").training.epochs * _cost(tier, PGD)


def _affordable(tier: Tier, words: str) -> int:
    """Epochs that half of PGD training's cost buys."""
    return max(1, math.floor(_budget(tier) / _cost(tier, words)))


def _clean_first(tier: Tier) -> str:
    """Delayed AT at half of the cost: two thirds of the epochs, the first of them on clean examples."""
    epochs, clean, pgd = _config(tier, "").training.epochs * 2 // 3, _cost(tier, STANDARD), _cost(tier, PGD)
    return f"--training.epochs={epochs} --switch.epoch={(epochs * pgd - _budget(tier)) / (pgd - clean):.3g}"


def _stored_longer(tier: Tier) -> int:
    """Epochs that half of the cost buys, PGD's for HALF_SHARE of them and then stored perturbations."""
    each = HALF_SHARE * _cost(tier, PGD) + (1 - HALF_SHARE) * _cost(tier, STORED_THROUGHOUT)
    return math.floor(_budget(tier) / each)


def fixed_kind(to: str) -> str:
    """Of an arm that is switched at a fixed epoch."""
    return f"{to} from a fixed epoch"


REFERENCE, KERNEL_DECIDES, AVERAGED_KIND = "reference", "the kernel decides", "with EMA"
RIVAL, OTHERWISE = "rival", "under other conditions"
KINDS = (REFERENCE, *map(fixed_kind, FIXED), RIVAL, KERNEL_DECIDES, AVERAGED_KIND)


def kind(arm: str) -> str:
    """What a figure colours an arm by: of KINDS, or that it was trained under other conditions."""
    if "+" in arm:
        return OTHERWISE
    if arm in ("pgd", "trades", REFERENCE_TWICE):
        return REFERENCE
    if arm.endswith("-ema"):
        return AVERAGED_KIND
    if arm.startswith("kernel"):
        return KERNEL_DECIDES
    if "-at-" in arm:
        return fixed_kind(arm.removeprefix("trades-").partition("-at-")[0])
    return RIVAL
