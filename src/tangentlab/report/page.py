"""The HTML page: one file that works offline, and the figures for a paper beside it.

Everything from a run folder is untrusted text. The template escapes it, data are JSON in which no "<"
survives, and a content security policy lets only the page's own scripts run and nothing be requested.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import yaml
from jinja2.utils import htmlsafe_json_dumps
from plotly.offline import get_plotlyjs

from tangentlab.errors import RunFolderError
from tangentlab.files import write_atomic
from tangentlab.records import RunRecord, StudyRecord, is_study, read_run, read_study
from tangentlab.report import palette
from tangentlab.report.claims import Ledger, forest, read_ledger, tally
from tangentlab.report.figure import Figure, MatrixPanel, Slider, legend, number, stages_in, value_limits
from tangentlab.report.figures import FIGURES
from tangentlab.report.interactive import dots_height, specifications
from tangentlab.report.paper import write_paper_figure
from tangentlab.report.subject import Subject, clean_text, subjects
from tangentlab.report.summary import states, summary
from tangentlab.report.table import attack_columns, attack_settings, data_name, flags, table
from tangentlab.report.values import read_derived, read_figures, value_figure

_FOLDER = "figures"

_Files = tuple[str, int | None, list[tuple[str, dict[str, Any]]]]


@dataclass(frozen=True)
class _Page:
    """What a page holds, in its order; ``appendix`` are names, a run's place, and files."""

    title: str
    summary: list[str]
    ledgers: Sequence[Ledger] = ()
    values: Sequence[Figure] = ()
    runs: Sequence[Subject] = ()
    figures: Sequence[Figure] = ()
    appendix: Sequence[_Files] = ()


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Write the page on runs, or on one study, to ``out``, and its figures to figures/ beside it."""
    if not folders:
        raise RunFolderError("a report needs at least one run folder; none was given")
    studies = [folder for folder in folders if is_study(folder)]
    if not studies:
        return _write(_runs_page(subjects([read_run(run) for run in folders])), out)
    if len(folders) > 1:
        raise RunFolderError(f"{studies[0]} is a study; a report is on one study alone, or on runs")
    return _write(_study_page(read_study(studies[0])), out)


def write_ledger(studies: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Write the page on the claims of several studies, each as its study.json, to ``out``."""
    ledgers = [read_ledger(study, f"study {study.get('study')}") for study in studies]
    said = [f"{ledger.study}: {tally(ledger)}" for ledger in ledgers]
    return _write(_Page("Ledger of claims", said, ledgers), out)


def _runs_page(runs: Sequence[Subject]) -> _Page:
    return _Page(
        _title(runs),
        summary(runs),
        runs=runs,
        figures=[figure for make in FIGURES if (figure := make(runs)).views or not figure.optional],
        appendix=_files(runs),
    )


def _study_page(study: StudyRecord) -> _Page:
    """Its claims, its figures, its runs. Figures on runs have a panel a run: those of one seed are enough."""
    path = study.folder / "study.json"
    ledger = read_ledger(study.verdicts, str(path))
    seeds = _by_seed(study)
    runs = subjects([run for of_seed in seeds.values() for run in of_seed])
    first = runs[: len(next(iter(seeds.values()), []))]
    figures = [figure for make in FIGURES if first and (figure := make(first)).views]
    lines = [*study.values, *read_derived(study.verdicts, path)]
    values = [value_figure(declared, lines) for declared in read_figures(study.verdicts, path)]
    said = [tally(ledger)]
    if runs:
        said.append(states(runs))
    if len(first) < len(runs) and figures:
        said.append(f"The figures after the table of runs are on those of seed {next(iter(seeds))}.")
    environment = {"environment": study.verdicts.get("environment")}
    return _Page(
        f"Study: {ledger.study}",
        said,
        [ledger],
        values,
        runs,
        figures,
        [(ledger.study, None, [("config.yaml", study.config), ("study.json", environment)]), *_files(runs)],
    )


def _by_seed(study: StudyRecord) -> dict[str, list[RunRecord]]:
    """The study's runs of each seed, in the order that they were measured in."""
    measured = {
        name: place for place, name in enumerate(dict.fromkeys(str(line.get("run")) for line in study.values))
    }
    seeds: dict[str, list[RunRecord]] = {}
    for run in sorted(study.runs, key=lambda run: measured.get(run.folder.name, len(measured))):
        seeds.setdefault(clean_text(str(run.config.get("seed"))), []).append(run)
    return seeds


def _files(runs: Sequence[Subject]) -> list[_Files]:
    return [
        (
            run.label,
            run.place,
            [("config.yaml", run.record.config), ("environment.json", run.record.environment)],
        )
        for run in runs
    ]


def _write(page: _Page, out: Path) -> Path:
    if out.is_dir() or not out.name:
        raise RunFolderError(f"{out} is a folder; name the HTML file to write, such as {out / 'report.html'}")
    for figure in (*page.values, *page.figures, *_forests(page)):
        if figure.views:
            write_paper_figure(figure, out.parent / _FOLDER)
    write_atomic(out, _render(page).encode(errors="replace"))  # a name may hold half a pair
    return out


def _forests(page: _Page) -> list[Figure]:
    return [forest(page.ledgers)] if page.ledgers else []


def _render(page: _Page) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tangentlab.report", "template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    figures = [*page.values, *page.figures]
    scripts = {
        "theme": _asset(environment, "theme.js"),
        **({"plotly": get_plotlyjs()} if figures else {}),  # four fifths of a page
        "page": _asset(environment, "page.js"),
    }
    runs = page.runs
    return environment.get_template("page.html.j2").render(
        page=page,
        runs=runs,
        rows=table(runs),
        columns=["Clean" if name == "none" else palette.inputs_name(name) for name in attack_columns(runs)],
        attacks=attack_settings(runs),
        flags=[f"{run.label}, {flag}" for run in runs for flag in flags(run.record)],
        forests=[_context(figure) for figure in _forests(page)],
        values=[_context(figure) for figure in page.values],
        figures=[_context(figure) for figure in page.figures],
        palette=palette,
        data=htmlsafe_json_dumps(_data(figures), separators=(",", ":"), allow_nan=False),
        appendix=[
            (name, place, [(file, _readable(value)) for file, value in files])
            for name, place, files in page.appendix
        ],
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
        "dots_height": dots_height(figure),
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
