"""Claims as testable statements, the verdicts that seeds give them, and the ledger of all of them.

A claim's threshold is part of the source, so that it stands before the run. An effect is measured once a
seed; its mean over seeds has Student's interval, and the verdict follows from where that lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, TypeVar

from tangentlab.errors import ConfigError
from tangentlab.metrics import clustered_wilson_interval, mean_interval

LEAST_SEEDS = 3
PAPER = "arXiv 2312.02236"

T = TypeVar("T")
Word = Literal["supported", "refuted", "inconclusive"]


@dataclass(frozen=True)
class Claim:
    """A statement that numbers can support or refute.

    Args:
        id: STUDY/NAME.
        statement: one sentence, the threshold in it.
        effect: what is measured once a seed, with its unit.
        threshold: of the effect.
        above: whether the claim is that the effect lies above the threshold, or below.
        source: whose claim it is.
    """

    id: str
    statement: str
    effect: str
    threshold: float
    above: bool = True
    source: str = "this project"


@dataclass(frozen=True)
class Verdict:
    """What seeds say of a claim in one setting.

    Args:
        claim: judged.
        setting: data, network and training that it was judged in.
        values: seed -> effect.
        effect: their mean, or the share of all runs; None without any.
        interval: 95 %, Student's of the mean, or Wilson's of the share with a seed's runs as one cluster;
            None for fewer than two seeds.
        verdict: supported or refuted where the whole interval lies on that side of the threshold; else, and
            with fewer than three seeds, inconclusive.
    """

    claim: Claim
    setting: str
    values: Mapping[int, float]
    effect: float | None
    interval: tuple[float, float] | None
    verdict: Word

    def as_dict(self) -> dict[str, Any]:
        """The claim's entry in study.json."""
        claim = self.claim
        return {
            "id": claim.id,
            "statement": claim.statement,
            "source": claim.source,
            "measured": claim.effect,
            "threshold": claim.threshold,
            "above": claim.above,
            "setting": self.setting,
            "values": {str(seed): value for seed, value in self.values.items()},
            "effect": self.effect,
            "interval": None if self.interval is None else list(self.interval),
            "verdict": self.verdict,
        }


def judge(claim: Claim, setting: str, values: Mapping[int, float]) -> Verdict:
    """The verdict that the seeds' effects give.

    >>> claim = Claim("demo/large", "The effect exceeds 1.", "effect", threshold=1.0)
    >>> judge(claim, "nowhere", {0: 2.0, 1: 2.1, 2: 1.9}).verdict
    'supported'
    >>> judge(claim, "nowhere", {0: 2.0, 1: 0.1, 2: 1.9}).verdict
    'inconclusive'
    """
    known = dict(sorted(values.items()))
    effect = fmean(known.values()) if known else None
    return _judged(claim, setting, known, effect, lambda: mean_interval(list(known.values())))


def judge_share(claim: Claim, setting: str, outcomes: Mapping[int, Sequence[bool]]) -> Verdict:
    """The verdict on a share of runs, of which seeds have several: near 0 and 1 a few seeds that agree have
    no spread, and Student's interval would be a point.

    >>> claim = Claim("demo/most", "More than 0.9 of the runs.", "share of a seed's runs", threshold=0.9)
    >>> judge_share(claim, "nowhere", {seed: [True] * 4 for seed in range(5)}).verdict
    'inconclusive'
    >>> judge_share(claim, "nowhere", {seed: [True] * 4 for seed in range(10)}).verdict
    'supported'
    """
    known = {seed: list(own) for seed, own in sorted(outcomes.items()) if own}
    runs = [outcome for own in known.values() for outcome in own]
    shares = {seed: fmean(own) for seed, own in known.items()}
    effect = fmean(runs) if runs else None
    return _judged(claim, setting, shares, effect, lambda: clustered_wilson_interval([*known.values()]))


def _judged(
    claim: Claim,
    setting: str,
    values: Mapping[int, float],
    effect: float | None,
    interval: Callable[[], tuple[float, float]],
) -> Verdict:
    if len(values) < 2:
        return Verdict(claim, setting, values, effect, None, "inconclusive")
    low, high = interval()
    word: Word = "inconclusive"
    if len(values) >= LEAST_SEEDS and (low > claim.threshold or high < claim.threshold):
        word = "supported" if (low > claim.threshold) == claim.above else "refuted"
    return Verdict(claim, setting, values, effect, (low, high), word)


def measured(seeds: Iterable[int], effect: Callable[[int], T]) -> dict[int, T]:
    """seed -> effect, of the seeds where all that it needs was measured: it raises KeyError elsewhere."""
    found = {}
    for seed in seeds:
        with suppress(KeyError):
            found[seed] = effect(seed)
    return found


def judge_seeds(
    values: Iterable[Mapping[str, Any]],
    setting: str,
    effects: Mapping[Claim, Callable[[T], float]],
    read: Callable[[list[Mapping[str, Any]]], T],
) -> list[Verdict]:
    """A verdict for each claim, from its effect in what ``read`` makes of one seed's lines."""
    lines: dict[int, list[Mapping[str, Any]]] = {}
    for line in values:
        lines.setdefault(line["seed"], []).append(line)
    seeds = {seed: read(own) for seed, own in lines.items()}
    return [
        judge(claim, setting, measured(seeds, lambda seed, of=effect: of(seeds[seed])))  # type: ignore[misc]
        for claim, effect in effects.items()
    ]


def of_source(study: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A study.json with those claims alone whose source holds the text."""
    return {**study, "claims": [entry for entry in study["claims"] if text in entry["source"]]}


def ledger(studies: Iterable[Mapping[str, Any]]) -> str:
    """The claims of several study.json as Markdown: a table a study and setting, a row a claim.

    Raises:
        ConfigError: there are none.
    """
    tables: dict[tuple[str, str], list[str]] = {}
    for study in studies:
        for entry in study["claims"]:
            sign = ">" if entry["above"] else "<"
            tables.setdefault((study["study"], entry["setting"]), []).append(
                f"| {entry['statement']} | {_effect(entry)} | {sign} {entry['threshold']:g} "
                f"| {len(entry['values'])} | {entry['verdict']} |"
            )
    if not tables:
        raise ConfigError("there is no claim to list; run a study with tangentlab study NAME")
    head = ["| claim | effect [95 % interval] | threshold | seeds | verdict |", "|---|---|---|---|---|"]
    return "\n\n".join(
        "\n".join([f"**{study}** on {setting}", "", *head, *rows])
        for (study, setting), rows in tables.items()
    )


def _effect(entry: Mapping[str, Any]) -> str:
    if entry["effect"] is None:
        return "–"
    if entry["interval"] is None:
        return f"{entry['effect']:.3g}"
    low, high = entry["interval"]
    return f"{entry['effect']:.3g} [{low:.3g}, {high:.3g}]"
