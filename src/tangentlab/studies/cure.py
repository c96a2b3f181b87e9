"""Catastrophic overfitting prevented: single-step training that the alarm turns to two steps, and its rivals.

Asked: arXiv 2312.02236 cures the collapse of single-step training by the kernel's spectrum. Here the alarm
(tangentlab.OverfittingAlarm) watches what of a PGD update an FGSM step still makes, and while it is raised
training takes something else: two steps, also from the weights before the alarm; more noise (N-FGSM); a
smaller step; GradAlign's penalty; a penalty on what the alarm watches (update_align). Against the
single-step methods that are said not to collapse; PGD in two steps throughout, which costs 1.4 times as much
as FGSM; two steps from a fixed epoch on; and two steps once PGD accuracy on held-out examples fell (Li et al.
2020, arXiv 2006.03089). The shipped method starts from FGSM-RS; FGSM with the same alarm says what the alarm
does by itself.

At an eps where FGSM training collapses on most seeds, and at 1.5 times that or less. A run is cured where it
learned something and stayed quiet, whatever FGSM accuracy did; FGSM's collapse is one that lasts
(tangentlab.studies.overfitting_watches). Robust accuracy is that of the last checkpoint: AutoAttack's for the
finalists, on the first test points, and APGD's on more of them, of the best checkpoint too. Cost is in
forward equivalents a training example, the alarm's looks counted. The single-step rivals are there too with
as many epochs as 1.4 times FGSM's cost buys.

The threshold that steers was set after single runs; the tuning seeds are there to choose it and the rivals'
settings on, and are not judged. The other variants of what the alarm steers to are for them alone.
Hardware and time: a CPU; for tier 3 a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

from tangentlab.records import RunRecord, read_run
from tangentlab.report.values import Quantity, ValueFigure
from tangentlab.runs import RunConfig, evaluate, load_config
from tangentlab.runs.evaluation import BEFORE_ALARM, checkpoint_path
from tangentlab.studies import overfitting
from tangentlab.studies.claims import PAPER, Claim, Verdict, judge, judge_share, measured
from tangentlab.studies.overfitting_claims import LOOK_EVERY
from tangentlab.studies.overfitting_watches import TUNING_SEEDS, fate
from tangentlab.studies.study import Study, Values


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
AFFORDABLE = 1.5  # times FGSM's cost
LONGER = 1.4  # likewise, what two steps throughout cost
GUARDED_EVERY = 0.25  # epochs between looks at PGD accuracy


def arms(tier: Tier, eps: float) -> dict[str, str]:
    """Name -> overrides."""
    single = {method: f"--method={method}" for method in SINGLE_STEP}
    epochs = _tier_config(tier).training.epochs
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
        "spectral-eager": "--method=spectral --alarm.threshold=0.9",
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
    own = f"--eps={eps} {words} --name={arm}-{eps:.3g} --seed={seed}"
    return load_config(tier.config, f"{COMMON} {tier.words} {own}".split())


def _tier_config(tier: Tier) -> RunConfig:
    return load_config(tier.config, tier.words.split())


# --- measurements ----------------------------------------------------------------------------------------


def measure(folder: Path, config: RunConfig) -> Iterator[Values]:
    """A line of the run and its checkpoints."""
    tier = next(tier for tier in TIERS.values() if _tier_config(tier).data == config.data)
    arm = config.name.rpartition("-")[0]
    record = read_run(folder)
    found = evaluate(folder, attacks=("none", "apgd"), checkpoints=("last",), test_size=tier.points)
    if arm in FINALISTS:
        found += evaluate(folder, attacks=("autoattack",), checkpoints=("last",), test_size=tier.autoattack)
    judged_by = {line["attack"]: line for line in found}
    others: dict[str, float] = {}
    for name, checkpoint in (("best", "best"), ("kept", BEFORE_ALARM)):
        if checkpoint_path(folder, checkpoint).exists():
            (line,) = evaluate(folder, attacks=("apgd",), checkpoints=(checkpoint,), test_size=tier.points)
            others |= {f"{name}_accuracy": line["accuracy"], f"{name}_epoch": line["epoch"]}
    epochs, robust = record.series("robust_accuracy")
    along = {"epochs": epochs, "robust_accuracy": robust, "fgsm_accuracy": record.series("fgsm_accuracy")[1]}
    became, collapse = fate(along)
    yield {
        "arm": arm,
        "kind": kind(arm),
        "eps": config.eps,
        "place": PLACES[tier.eps.index(config.eps)],
        "clean_accuracy": judged_by.pop("none")["accuracy"],
        **{f"{name}_accuracy": line["accuracy"] for name, line in judged_by.items()},
        **{f"{name}_n": line["n"] for name, line in judged_by.items()},
        **along,
        "best_validation_accuracy": max(robust[1:]),
        "fate": became,
        "collapse": collapse,
        **others,
        "cost": record.status["cost"],
        "steering_cost": record.status.get("steering_cost", 0.0),
        **{name: record.status[name] for name in ("train_seconds", "steering_seconds")},
        **_raised(record),
    }


def _raised(record: RunRecord) -> dict[str, float]:
    """The share of the looks at which the alarm was raised, where there is one."""
    looks = [float(raised) for raised in record.series("alarm/raised")[1]]
    return {"raised": fmean(looks)} if looks else {}


def kind(arm: str) -> str:
    """What a figure colours an arm by."""
    if arm.startswith(SPECTRAL):
        return STEERED
    if arm.endswith("-long"):
        return "single-step, longer"
    if arm in (FIXED, GUARDED):
        return "turned to two steps otherwise"
    return "several steps" if arm.startswith("pgd") else "single-step"


# --- claims ----------------------------------------------------------------------------------------------

COLLAPSES = Claim(
    "cure/collapses",
    "FGSM training collapses on more than half of the seeds at the lower eps: there is something to cure.",
    "share of the runs, a collapse that lasts",
    0.5,
)
CURED = Claim(
    "cure/cured",
    "Training that the alarm turns to two steps learns and keeps its robust accuracy, in more than 70 % of "
    "the runs, at that eps and at the larger one.",
    "share of the runs at whichever eps it is smaller",
    0.7,  # ten of ten runs say no more
    source=f"{PAPER}, with figures of ours",
)
BY_THE_ALARM = Claim(
    "cure/by-the-alarm",
    "It is the alarm's doing: more of FGSM-RS's runs are cured with it than without, by more than 0.",
    "difference of the shares of a seed's runs that are cured",
    0.0,
)
FGSM_TOO = Claim(
    "cure/fgsm-too",
    "FGSM from no random start is cured by the alarm too, in more than 70 % of the runs, at either eps.",
    "share of the runs at whichever eps it is smaller",
    0.7,
)
COST = Claim(
    "cure/cost",
    "It costs less than 1.25 times what FGSM training costs (two steps throughout cost 1.4 times).",
    "cost in forward equivalents, the looks counted, over FGSM's; the larger of the two eps",
    1.25,
    above=False,
)
N_FGSM = Claim(
    "cure/n-fgsm",
    "It loses less than 1 point of robust accuracy to N-FGSM.",
    "AutoAttack accuracy of N-FGSM minus its, points, at the lower eps",
    1.0,
    above=False,
)
GRAD_ALIGN = Claim(
    "cure/grad-align",
    "It loses less than 1 point of robust accuracy to GradAlign.",
    "AutoAttack accuracy of GradAlign minus its, points, at the lower eps",
    1.0,
    above=False,
)
BEST = Claim(
    "cure/best",
    "It is more robust than any other method of at most 1.5 times FGSM's cost, the best of them chosen on "
    "the other seeds.",
    "APGD accuracy minus that method's, points, at the lower eps",
    0.0,
)
STEERING = Claim(
    "cure/steering",
    f"Its looks, one every {LOOK_EVERY} steps, take less than 3 % of the training time.",
    "seconds of the looks over those of training; lower eps",
    0.03,
    above=False,
)
KEPT = Claim(
    "cure/kept",
    "Without a cure the alarm still keeps something: where FGSM training collapses, the weights of the look "
    "before the first alarm are more robust than the last ones by more than 10 points.",
    "robust accuracy before the alarm minus at the end, points, mean over the runs that collapse; 0 where it "
    "is silent",
    10.0,
)
CLAIMS = (COLLAPSES, CURED, BY_THE_ALARM, FGSM_TOO, COST, N_FGSM, GRAD_ALIGN, BEST, STEERING, KEPT)
RIVALS = (*SINGLE_STEP, "fgsm_rs-long", "n_fgsm-long", "zero_grad-long", "pgd-2", FIXED, GUARDED)
PLACES = ("lower", "larger")  # of the two eps


class Runs:
    """The runs, by seed, arm and which of the two eps."""

    def __init__(self, values: Sequence[Values]) -> None:
        self._lines = {(line["seed"], line["arm"], line["place"]): line for line in values}
        self.seeds = sorted({seed for seed, *_ in self._lines})
        self.rivals = sorted({arm for _, arm, _ in self._lines}.intersection(RIVALS))

    def lower(self, seed: int, arm: str) -> Values:
        """At the lower eps; raises KeyError where it was not measured."""
        return self._lines[seed, arm, PLACES[0]]

    def both(self, seed: int, arm: str) -> list[Values]:
        """At the lower eps and the larger; likewise."""
        return [self._lines[seed, arm, place] for place in PLACES]

    def cured(self, seed: int, arm: str) -> list[bool]:
        """Whether the arm's runs learned and stayed quiet, at either eps."""
        return [fate(line)[0] == "quiet" for line in self.both(seed, arm)]

    def least_cured(self, arm: str) -> dict[int, list[bool]]:
        """seed -> the outcome at the eps where fewer are."""
        found = measured(self.seeds, partial(self.cured, arm=arm))
        by_eps = [{seed: [own[place]] for seed, own in found.items()} for place in range(len(PLACES))]
        return min(by_eps, key=lambda one: sum(outcome for (outcome,) in one.values()))

    def cured_by_the_alarm(self, seed: int) -> float:
        """The share of the alarm's runs that are cured over that of those that it starts from."""
        return fmean(self.cured(seed, SPECTRAL)) - fmean(self.cured(seed, "fgsm_rs"))

    def cost(self, seed: int, arm: str) -> float:
        """Over FGSM's; the larger of the two eps."""
        pairs = zip(self.both(seed, arm), self.both(seed, "fgsm"), strict=True)
        return max(float(own["cost"] / fgsm["cost"]) for own, fgsm in pairs)

    def robust(self, seed: int, arm: str, attack: str = "apgd") -> float:
        """Robust accuracy in points at the lower eps."""
        return 100 * float(self.lower(seed, arm)[f"{attack}_accuracy"])

    def loses(self, rival: str, seed: int, attack: str = "apgd") -> float:
        """Robust accuracy of the rival minus spectral training's."""
        return self.robust(seed, rival, attack) - self.robust(seed, SPECTRAL, attack)

    def beats(self, seed: int) -> float:
        """Against the rival that the other seeds favour, of those where every rival of any was measured."""
        others: list[dict[str, float]] = []
        for other in self.seeds:
            with suppress(KeyError):
                robust = {rival: self.robust(other, rival) for rival in self.rivals}
                dear = {rival for rival in self.rivals if self.cost(other, rival) > AFFORDABLE}
                others += [{**robust, **dict.fromkeys(dear, -math.inf)}] if other != seed else []
        if not others:
            raise KeyError("other seeds")
        return -self.loses(max(self.rivals, key=lambda rival: fmean(one[rival] for one in others)), seed)

    def kept(self, seed: int) -> float:
        """Robust accuracy of FGSM training before the alarm, over its last."""
        lines, last = self.both(seed, "fgsm"), "apgd_accuracy"
        gains = [line.get("kept_accuracy", line[last]) - line[last] for line in lines if _collapsed(line)]
        if not gains:
            raise KeyError("no collapse")
        return 100 * fmean(gains)

    def steering(self, seed: int) -> float:
        """Seconds of the looks over those of training, at the lower eps."""
        line = self.lower(seed, SPECTRAL)
        return float(line["steering_seconds"] / line["train_seconds"])


def _collapsed(line: Values) -> bool:
    return fate(line)[0] == "collapsed"


def judged(values: Sequence[Values], setting: str) -> list[Verdict]:
    """A verdict for each claim; a seed counts where the arms that its claim needs are there."""
    seen = Runs(values)
    effects: Mapping[Claim, Callable[[int], float]] = {
        BY_THE_ALARM: seen.cured_by_the_alarm,
        COST: lambda seed: seen.cost(seed, SPECTRAL),
        N_FGSM: partial(seen.loses, "n_fgsm", attack="autoattack"),
        GRAD_ALIGN: partial(seen.loses, "grad_align", attack="autoattack"),
        BEST: seen.beats,
        STEERING: seen.steering,
        KEPT: seen.kept,
    }
    shares: Mapping[Claim, Mapping[int, list[bool]]] = {
        COLLAPSES: measured(seen.seeds, lambda seed: [_collapsed(seen.lower(seed, "fgsm"))]),
        CURED: seen.least_cured(SPECTRAL),
        FGSM_TOO: seen.least_cured(FROM_FGSM),
    }
    return [
        judge_share(claim, setting, shares[claim])
        if claim in shares
        else judge(claim, setting, measured(seen.seeds, effects[claim]))
        for claim in CLAIMS
    ]


# --- figures ---------------------------------------------------------------------------------------------

_CLEAN = Quantity("clean_accuracy", "clean accuracy", percent=True)
_ROBUST = Quantity("apgd_accuracy", "robust accuracy (APGD)", percent=True)
FIGURES = (
    ValueFigure(
        key="arms",
        title="Robust at the end",
        caption="Last checkpoints; a collapsed network has hardly any robust accuracy. The best one is "
        "chosen by PGD-10 on the validation split.",
        y=(
            _ROBUST,
            Quantity("best_accuracy", "robust accuracy of the best checkpoint (APGD)", percent=True),
            Quantity("autoattack_accuracy", "robust accuracy (AutoAttack)", percent=True),
            _CLEAN,
        ),
        x="arm",
        colour="kind",
        panels="eps",
        views="y",
    ),
    ValueFigure(
        key="frontier",
        title="Robust accuracy against cost",
        caption="Last checkpoints. Cost is in forward equivalents a training example, the looks counted.",
        y=(_ROBUST,),
        x=Quantity("cost", "cost (forward equivalents an example)"),
        point="arm",
        colour="kind",
        panels="eps",
    ),
    ValueFigure(
        key="raised",
        title="How often the alarm was raised",
        caption="Share of the looks; while it is raised training takes something else than its one step.",
        y=(Quantity("raised", "raised", percent=True),),
        x="arm",
        colour="kind",
        panels="eps",
    ),
)

STUDY = Study("cure", CLAIMS, runs, measure, judged, FIGURES, tuning_seeds=TUNING_SEEDS, tiers=tuple(TIERS))
