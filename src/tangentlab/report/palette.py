"""Colours, line styles and names, the same in every figure.

The runs' hues follow Okabe & Ito (2008), which people with a colour vision deficiency can tell apart, moved
in lightness until each has a contrast of 3:1 or more to its background, the light page and the dark one.
"""

from __future__ import annotations

from tangentlab.report.figure import Style

RUNS_LIGHT = ("#0072b2", "#d55e00", "#00855f", "#b0568c", "#8a6d00", "#2b8fc9", "#6b4fa3", "#555f6b")
RUNS_DARK = ("#5cb8f0", "#ff9248", "#35cfa2", "#eb9fcb", "#e6c84f", "#a6dbf7", "#b7a2f0", "#b4bdc8")

LIGHT = {
    "ink": "#1b2230",
    "muted": "#596273",
    "line": "#dfe3ea",
    "learning": "#f6b26b",
    "lazy": "#9fc5e8",
    "again": "#b4a7d6",
    "cheap": "#a8d5a2",
    "raised": "#f4a3a3",
}
DARK = {
    "ink": "#e8ebf1",
    "muted": "#a2abbb",
    "line": "#333b4a",
    "learning": "#c9792c",
    "lazy": "#3f7fb8",
    "again": "#7d6bb5",
    "cheap": "#3f8f5a",
    "raised": "#a94a4a",
}

# Viridis: perceptually uniform, and readable with any colour vision.
SEQUENTIAL = (
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e",
    "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725",
)  # fmt: skip

_STYLES: dict[str, Style] = {
    "clean": "solid",
    "fgsm": "dash",
    "pgd": "dot",
    "clean~fgsm": "dash",
    "clean~pgd": "dot",
    "fgsm~pgd": "solid",
}
_NAMES = {
    "none": "clean",
    "clean": "clean",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "apgd": "APGD",
    "autoattack": "AutoAttack",
}


def run_colour(place: int | None) -> str:
    """Colour of the run at ``place``; they repeat after the eighth. None is no run's."""
    return LIGHT["muted"] if place is None else RUNS_LIGHT[place % len(RUNS_LIGHT)]


def style_of(inputs: str) -> Style:
    """Line style of one kind of inputs, or of a pair "a~b"."""
    return _STYLES.get(inputs, "dashdot")


def inputs_name(inputs: str) -> str:
    """How a kind of inputs, or a pair "a~b", is written."""
    return " to ".join(_NAMES.get(name, name) for name in inputs.split("~"))


def light_to_dark() -> dict[str, str]:
    """Each colour of the light page with its counterpart on the dark one."""
    runs = dict(zip(RUNS_LIGHT, RUNS_DARK, strict=True))
    return runs | {LIGHT[name]: DARK[name] for name in LIGHT}
