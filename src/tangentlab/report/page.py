"""The HTML page: one file that works offline, and the figures for a paper beside it.

Everything from a run folder is untrusted text. The template escapes it, data are JSON in which no "<"
survives, and a content security policy lets only the page's own scripts run and nothing be requested.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import yaml
from jinja2.utils import htmlsafe_json_dumps
from plotly.offline import get_plotlyjs

from tangentlab.errors import RunFolderError
from tangentlab.files import write_atomic
from tangentlab.records import read_run
from tangentlab.report import palette
from tangentlab.report.figure import Figure, MatrixPanel, Slider, legend, number, stages_in, value_limits
from tangentlab.report.figures import FIGURES
from tangentlab.report.interactive import specifications
from tangentlab.report.paper import write_paper_figure
from tangentlab.report.subject import Subject, subjects
from tangentlab.report.summary import summary
from tangentlab.report.table import attack_columns, attack_settings, data_name, flags, table

_FOLDER = "figures"


def write_page(runs: Sequence[Path], out: Path) -> Path:
    """Write the page to ``out`` and its figures to the folder figures/ beside it."""
    if not runs:
        raise RunFolderError("a report needs at least one run folder; none was given")
    if out.is_dir() or not out.name:
        raise RunFolderError(f"{out} is a folder; name the HTML file to write, such as {out / 'report.html'}")
    subjects_ = subjects([read_run(run) for run in runs])
    figures = [make(subjects_) for make in FIGURES]
    for figure in figures:
        if figure.views:
            write_paper_figure(figure, out.parent / _FOLDER)
    write_atomic(out, _render(subjects_, figures).encode(errors="replace"))  # a name may hold half a pair
    return out


def _render(runs: Sequence[Subject], figures: Sequence[Figure]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tangentlab.report", "template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    scripts = {
        "theme": _asset(environment, "theme.js"),
        "plotly": get_plotlyjs(),
        "page": _asset(environment, "page.js"),
    }
    return environment.get_template("page.html.j2").render(
        runs=runs,
        title=_title(runs),
        summary=summary(runs),
        rows=table(runs),
        columns=["Clean" if name == "none" else palette.inputs_name(name) for name in attack_columns(runs)],
        attacks=attack_settings(runs),
        flags=[f"{run.label}, {flag}" for run in runs for flag in flags(run.record)],
        figures=[_context(figure) for figure in figures],
        palette=palette,
        data=htmlsafe_json_dumps(_data(figures), separators=(",", ":"), allow_nan=False),
        appendix=[(run, _readable(run.record.config), _readable(run.record.environment)) for run in runs],
        css=markupsafe.Markup(_asset(environment, "page.css")),
        scripts={name: markupsafe.Markup(script) for name, script in scripts.items()},
        hashes=markupsafe.Markup(" ".join(f"'sha256-{_digest(script)}'" for script in scripts.values())),
    )


def _title(runs: Sequence[Subject]) -> str:
    if len(runs) == 1:
        return runs[0].label
    data = {data_name(run) for run in runs}
    return f"{len(runs)} runs on {data.pop()}" if len(data) == 1 and "" not in data else f"{len(runs)} runs"


def _context(figure: Figure) -> dict[str, Any]:
    """What the template says of a figure beside its panels."""
    matrix = next((panel for panel in figure.panels if isinstance(panel, MatrixPanel)), None)
    low, high = value_limits(figure)
    return {
        "figure": figure,
        "legend": legend(figure),
        "stages": stages_in(figure),
        "bar": (matrix.value, number(low), number(high)) if matrix else None,
        "files": [(kind.upper(), f"{_FOLDER}/{figure.key}.{kind}") for kind in ("svg", "pdf")],
    }


def _data(figures: Sequence[Figure]) -> dict[str, Any]:
    return {
        "dark": palette.light_to_dark(),
        "figures": {
            figure.key: {
                "views": specifications(figure),
                "slider": _slider(figure.slider),
            }
            for figure in figures
        },
    }


def _slider(slider: Slider | None) -> dict[str, Any] | None:
    if slider is None:
        return None
    return {"axis": slider.axis.label if slider.axis else None, "positions": slider.positions}


def _readable(value: dict[str, Any]) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def _asset(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
