"""What the study of the cure trains: its arms by tier, and what a figure colours each by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tangentlab.runs import RunConfig
from tangentlab.studies import overfitting
from tangentlab.studies.overfitting_claims import LOOK_EVERY
from tangentlab.studies.overfitting_watches import TUNING_SEEDS
from tangentlab.studies.study import configured


@dataclass(frozen=True)
class Tier:
    """What a tier trains and how it is judged.

    Args:
        config: a shipped configuration.
        words: overrides of it, those of the study of overfitting.
        eps: where FGSM collapses on most seeds, and 1.5 times as much, or less where hardly anything is
            learned at that (digits, a narrow network on CIFAR-10).
        points: first test points for APGD.
        autoattack: first test points for AutoAttack, of the finalists.
        alignment: the weight of GradAlign's penalty at either eps; its authors take 0.2 at 8/255, 2 at
            16/255.
        whole: whether all arms are part of it, or the finalists alone.
    """

    config: str
    words: str
    eps: tuple[float, float]
    points: int
    autoattack: int
    alignment: tuple[float, float] = (0.2, 0.2)
    whole: bool = True


COMMON = (
    "--probe.size=0 --threads=1 --evaluation.num_steps=10 --evaluation.test_num_steps=10 "
    "--evaluation.test_size=200"
)
# As in the study of overfitting, evaluations too: fates depend on them.
_SHARED = {tier: f"{one.words} --evaluation.every={one.every}" for tier, one in overfitting.TIERS.items()}
TIERS = {
    0: Tier("digits", _SHARED[0], (0.28, 0.34), 360, 360),
    1: Tier("fashion-mnist", _SHARED[1], (0.2, 0.3), 1000, 200),
    2: Tier("cifar10-narrow", _SHARED[2], (20 / 255, 24 / 255), 500, 100, (2.0, 2.0), False),
    3: Tier(
        "cifar10-n-fgsm",
        "--channels_last=true --data.validation_size=500 --evaluation.every=1",
        (8 / 255, 16 / 255),
        1000,
        200,
        (0.2, 2.0),
        False,
    ),
}
SPECTRAL, STEERED = "spectral", "steered by the alarm"
FROM_FGSM = f"{SPECTRAL}-from-fgsm"
FIXED, GUARDED = "fgsm-then-two-steps", "fgsm-guarded"
SINGLE_STEP = ("fgsm", "fgsm_rs", "n_fgsm", "zero_grad", "grad_align", "fgsm_pgi", "atta")
FINALISTS = (SPECTRAL, FROM_FGSM, "fgsm", "fgsm_rs", "n_fgsm", "grad_align", "fgsm_pgi", "pgd-2")
LONGER = 1.4  # times FGSM's cost: what two steps throughout cost
GUARDED_EVERY = 0.25  # epochs between looks at PGD accuracy
PLACES = ("lower", "larger")  # of the two eps


def arms(tier: Tier, eps: float) -> dict[str, str]:
    """Name -> overrides."""
    single = {method: f"--method={method}" for method in SINGLE_STEP}
    epochs = tier_config(tier).training.epochs
    longer = f"--training.epochs={round(LONGER * epochs)}"
    two_steps = f"--method=pgd --method.num_steps=2 --method.step_size={0.625 * eps}"
    raised = "--method=fgsm_rs --switch.rule=alarm"
    guard = f"--switch.epoch={GUARDED_EVERY} --switch.every={GUARDED_EVERY} --switch.held_out=100"
    guard += " --switch.max_fall=0.1"
    found = {
        **single,
        # As published but for these: of those that learn none was better on the tuning seeds of tier 0.
        "fgsm_pgi": f"{single['fgsm_pgi']} --method.consistency=1",
        "grad_align": f"{single['grad_align']} --method.alignment={tier.alignment[tier.eps.index(eps)]}",
        "atta": f"{single['atta']} --method.reset_epochs=null",
        "fgsm": f"--method=fgsm --alarm.every={LOOK_EVERY}",  # that only watches
        **{f"{method}-long": f"--method={method} {longer}" for method in ("fgsm_rs", "n_fgsm", "zero_grad")},
        "pgd-2": two_steps,
        SPECTRAL: "--method=spectral",
        FROM_FGSM: "--method=fgsm --switch.rule=alarm",
        FIXED: f"--method=fgsm --switch.rule=fixed --switch.epoch={epochs / 2:g} {_to(two_steps)}",
        # Two steps at first, and again, for good, where the guard comes back.
        GUARDED: f"{two_steps} --switch.rule=fixed {guard} --switch.to=fgsm",
        "spectral-restore": "--method=spectral --alarm.restore=true",
        "spectral-noise": f"{raised} --switch.to=n_fgsm",
        "spectral-smaller": f"{raised} --switch.to=fgsm_rs --switch.to.step_size={0.5 * eps}",
        "spectral-penalty": f"{raised} --switch.to=grad_align",
        "spectral-update": f"{raised} --switch.to=update_align --switch.to.alignment=3",
    }
    own = "buffer_updates=[loss]"  # crafting leaves BatchNorm's buffers alone, as in the demo
    return {
        arm: f"{words} --method.{own}"
        + (f" --switch.to.{own}" if kind(arm) == STEERED or "switch" in words else "")
        for arm, words in found.items()
    }


def _to(method: str) -> str:
    """The words of a method as those of what a switch turns to."""
    return method.replace("--method", "--switch.to")


def runs(tier: int, seeds: Sequence[int]) -> dict[str, RunConfig]:
    """ARM-EPS-SEED -> configuration."""
    chosen = TIERS[tier]
    found = {}
    for seed, eps in product(seeds, chosen.eps):
        for arm, words in arms(chosen, eps).items():
            variant = kind(arm) == STEERED and arm not in (SPECTRAL, FROM_FGSM)
            if arm not in FINALISTS and (not chosen.whole or (variant and seed not in TUNING_SEEDS)):
                continue
            found[f"{arm}-{eps:.3g}-{seed}"] = run_config(chosen, eps, arm, words, seed)
    return found


def run_config(tier: Tier, eps: float, arm: str, words: str, seed: int) -> RunConfig:
    """A run of the tier."""
    own = f"--eps={eps} {words} --name={arm}-{eps:.3g}"
    return configured(tier.config, f"{COMMON} {tier.words} {own}", seed=seed)


def tier_config(tier: Tier) -> RunConfig:
    """What its runs have in common."""
    return configured(tier.config, tier.words)


def kind(arm: str) -> str:
    """What a figure colours an arm by."""
    if arm.startswith(SPECTRAL):
        return STEERED
    if arm.endswith("-long"):
        return "single-step, longer"
    if arm in (FIXED, GUARDED):
        return "turned to two steps otherwise"
    return "several steps" if arm.startswith("pgd") else "single-step"
