"""The ledger of a study's claims: what is claimed, what seeds gave, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tangentlab.errors import RunFolderError
from tangentlab.report.figure import Figure, ForestPanel, ForestRow, View, listed, number
from tangentlab.report.subject import clean_text, is_number

# A sign beside the word, so that no verdict is told by its colour alone.
SIGNS = {"supported": "✓", "refuted": "✗", "inconclusive": "?"}


@dataclass(frozen=True)
class Entry:
    """A claim in one setting; ``forest`` is None where nothing was measured."""

    statement: str
    source: str
    setting: str
    measured: str
    effect: str
    threshold: str
    seeds: int
    verdict: str
    forest: ForestRow | None

    @property
    def sign(self) -> str:
        return SIGNS.get(self.verdict, "")


@dataclass(frozen=True)
class Ledger:
    """One study's claims."""

    study: str
    entries: tuple[Entry, ...]


def read_ledger(verdicts: Mapping[str, Any], where: str) -> Ledger:
    """The ledger that a study.json holds; ``where`` names it in errors.

    Raises:
        RunFolderError: it holds no claims, or one of them cannot be read.
    """
    try:
        return Ledger(clean_text(str(verdicts["study"])), tuple(map(_entry, verdicts["claims"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{where}: its claims cannot be read: {type(error).__name__} {error}") from error


def _entry(claim: Mapping[str, Any]) -> Entry:
    values = {str(seed): float(value) for seed, value in claim["values"].items() if is_number(value)}
    sign, threshold = (">" if claim["above"] else "<"), _finite(claim["threshold"])
    verdict, effect, said, forest = str(claim["verdict"]), claim["effect"], "–", None
    if is_number(effect) and values:
        interval = None
        said = number(effect)
        if claim["interval"] is not None:
            low, high = map(_finite, claim["interval"])
            interval = low, high
            said += f" [{number(low)}, {number(high)}]"
        label = clean_text(str(claim["id"]).rpartition("/")[2])
        text = f"{said} {sign} {number(threshold)}  {SIGNS.get(verdict, '')} {clean_text(verdict)}"
        forest = ForestRow(label, text, values, effect, interval, threshold, bool(claim["above"]))
    return Entry(
        statement=str(claim["statement"]),
        source=str(claim["source"]),
        setting=str(claim["setting"]),
        measured=str(claim["measured"]),
        effect=said,
        threshold=f"{sign} {number(threshold)}",
        seeds=len(values),
        verdict=verdict,
        forest=forest,
    )


def _finite(value: object) -> float:
    if not is_number(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def forest(ledgers: Sequence[Ledger]) -> Figure:
    """The figure for a paper: a panel a study."""
    panels = [
        ForestPanel(ledger.study, rows)
        for ledger in ledgers
        if (rows := tuple(entry.forest for entry in ledger.entries if entry.forest is not None))
    ]
    return Figure(
        key="claims",
        title="Claims",
        caption="Each row has its own scale: the upright line is the threshold, the shaded side what is "
        "claimed. Circles are seeds, the diamond is their mean, the bar its 95 % Student interval. A claim "
        "is supported where the whole interval lies on that side, refuted where it lies on the other; "
        "with fewer than three seeds it is inconclusive.",
        views=tuple(View(panel.title, (panel,)) for panel in panels),
    )


def tally(ledger: Ledger) -> str:
    """One sentence: how many claims, and how they fared."""
    counted = Counter(entry.verdict for entry in ledger.entries)
    claims = "1 claim" if len(ledger.entries) == 1 else f"{len(ledger.entries)} claims"
    words = [*SIGNS, *(word for word in counted if word not in SIGNS)]
    said = listed(f"{counted[word]} {word}" for word in words if counted[word])
    settings = listed(dict.fromkeys(entry.setting for entry in ledger.entries))
    return f"{claims} on {settings}: {said}." if ledger.entries else "No claim."
