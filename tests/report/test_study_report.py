"""The report of a study: its claims, figures of its raw values, its runs."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import planted
import planted_study
import plotly.graph_objects as go
import pytest
from planted_study import FIGURES, METHODS, STATISTICS

from tangentlab.cli import main
from tangentlab.errors import ConfigError, RunFolderError
from tangentlab.files import finite
from tangentlab.metrics import mean_interval
from tangentlab.records import read_study
from tangentlab.report import write_ledger, write_report
from tangentlab.report.claims import forest, read_ledger
from tangentlab.report.figure import DotPanel, ForestPanel, LinePanel, dot_rows, legend, note_rows
from tangentlab.report.interactive import specifications
from tangentlab.report.paper import write_paper_figure
from tangentlab.report.values import Quantity, ValueFigure, read_figures, value_figure

GAP, CURVES, DOTS = FIGURES
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>${7*7}{{7*7}}%{x}$_$|"


# --- figures of raw values -------------------------------------------------------------------------------


def test_a_curve_is_the_mean_over_seeds_with_its_interval() -> None:
    (view,) = value_figure(replace(GAP, y=(Quantity("gap", "relative error"),)), planted_study.lines()).views
    assert [panel.title for panel in view.panels] == ["clean", "crafted"]
    panel = view.panels[1]
    assert isinstance(panel, LinePanel)
    assert (panel.x_axis.label, panel.y_axis.label) == ("epoch", "relative error")
    thin = [line for line in panel.lines if line.thin]
    pgd = next(line for line in panel.lines if line.name == "pgd" and not line.thin)
    assert len(thin) == 9
    assert pgd.colour == 2
    assert pgd.x == tuple(range(9))
    at = [0.06 * 1.6**3 * (1 + 0.1 * seed) for seed in planted_study.SEEDS]
    assert pgd.y[3] == pytest.approx(sum(at) / 3)
    assert (pgd.low[3], pgd.high[3]) == pytest.approx(mean_interval(at))
    assert sorted(line.y[3] for line in thin if line.name == "pgd") == pytest.approx(at)


def test_on_a_logarithmic_scale_the_mean_is_geometric_and_nothing_below_zero_is_drawn() -> None:
    lines = [
        {"method": "pgd", "seed": seed, "epoch": epoch, "gap": gap}
        for epoch, gaps in enumerate(([1.0, 100.0], [-1.0, 0.0]))
        for seed, gap in enumerate(gaps)
    ]
    figure = value_figure(replace(GAP, panels="", where={}), lines)
    (panel,) = figure.panels
    assert isinstance(panel, LinePanel)
    mean = next(line for line in panel.lines if not line.thin)
    assert (mean.x, mean.y) == ((0.0,), pytest.approx((10.0,)))
    assert math.log(mean.high[0]) + math.log(mean.low[0]) == pytest.approx(2 * math.log(10))
    assert "geometric" in figure.caption


def test_a_mean_is_drawn_where_all_seeds_were_measured() -> None:
    figure = ValueFigure("late", "Late", "", (Quantity("y", "y"),))

    def lines(*points: tuple[int, float, float]) -> list[Any]:
        drawn = value_figure(
            figure, [{"method": "pgd", "seed": seed, "epoch": x, "y": y} for seed, x, y in points]
        )
        (panel,) = drawn.panels
        assert isinstance(panel, LinePanel)
        return [(line.x, line.y, line.thin, line.in_legend) for line in panel.lines]

    *_, mean = lines((0, 1, 1.0), (0, 2, 1.0), (1, 2, 3.0), (1, 2.0000000001, 5.0), (1, 3, 1.0))
    assert mean == ((2.0,), (2.5,), False, True)  # seed 1 weighs no more for its two lines
    assert [kept[2:] for kept in lines((0, 1, 1.0), (1, 2, 1.0))] == [(True, True)] * 2
    assert lines((0, 1, 1.0), (0, 2, 3.0)) == [((1.0, 2.0), (1.0, 3.0), False, True)]


def test_quantities_and_keys_make_views_and_panels() -> None:
    lines = planted_study.lines()
    curves = value_figure(CURVES, lines)
    assert curves.selector == "quantity"
    assert [view.label for view in curves.views] == ["cosine", "share of the change"]
    assert [panel.title for panel in curves.views[1].panels] == ["clean", "crafted"]
    dots = value_figure(DOTS, lines)
    assert dots.selector == "variance"
    assert [view.label for view in dots.views] == ["biased", "unbiased"]
    assert [panel.title for panel in dots.views[0].panels] == ["clean accuracy", "robust accuracy"]


def test_quantities_of_one_axis_share_a_panel() -> None:
    parts = tuple(Quantity(key, "size", name) for key, name in (("cosine", "cos"), ("share", "part")))
    declared = replace(CURVES, y=parts, colour="y", panels="method", views="inputs")
    figure = value_figure(declared, planted_study.lines())
    assert [view.label for view in figure.views] == ["clean", "crafted"]
    panel = figure.views[1].panels[2]
    assert isinstance(panel, LinePanel)
    assert (panel.title, panel.y_axis.label) == ("pgd", "size")
    assert [(key.name, key.colour) for key in legend(figure)] == [("cos", 0), ("part", 1)]


def test_where_takes_one_value_or_several() -> None:
    def methods(asked: Any) -> set[str]:
        figure = value_figure(replace(GAP, where={"method": asked, "part": "gap"}), planted_study.lines())
        return {line.name for panel in figure.panels if isinstance(panel, LinePanel) for line in panel.lines}

    assert methods("pgd") == {"pgd"}
    assert methods(("pgd", "fgsm")) == methods(["pgd", "fgsm"]) == {"pgd", "fgsm"}
    assert methods(None) == set()
    declared = replace(GAP, where={"part": "gap"}, unless={"method": ("pgd", "fgsm")})
    left = {line.name for p in value_figure(declared, planted_study.lines()).panels for line in p.lines}
    assert left == set(METHODS) - {"pgd", "fgsm"}


def test_dots_have_a_row_a_category_and_what_was_not_measured_is_left_out() -> None:
    figure = value_figure(DOTS, planted_study.lines())
    clean, robust = figure.views[0].panels
    assert isinstance(clean, DotPanel)
    assert isinstance(robust, DotPanel)
    assert clean.categories == robust.categories == STATISTICS
    assert len(clean.dots) == 12
    assert {dots.category for dots in robust.dots} == {0, 1, 2}
    pgd = next(dots for dots in robust.dots if dots.name == "pgd" and dots.category == 2)
    assert pgd.values == pytest.approx({"0": 0.46, "1": 0.45, "2": 0.44})
    assert pgd.mean == pytest.approx(0.45)
    assert pgd.interval == pytest.approx(tuple(mean_interval([0.46, 0.45, 0.44])))
    assert [(key.name, key.colour, key.style) for key in legend(figure)] == [
        (method, place, "dots") for place, method in enumerate(METHODS)
    ]


def test_names_of_a_category_lie_beside_each_other() -> None:
    figure = value_figure(DOTS, planted_study.lines())
    panel = figure.views[0].panels[0]
    assert isinstance(panel, DotPanel)
    rows = sorted(row for dots, *both in dot_rows(figure, panel) if dots.category == 1 for row in both)
    assert len(set(rows)) == 6
    assert 0.5 < rows[0] < 1 < rows[-1] < 1.5
    alone = [line | {"statistics": line["method"]} for line in planted_study.lines()]
    figure = value_figure(DOTS, alone)
    panel = figure.views[0].panels[0]
    assert isinstance(panel, DotPanel)
    assert [round(row) for _, row, _ in dot_rows(figure, panel)] == [0, 1, 2]


def test_categories_that_are_numbers_ascend() -> None:
    lines = [{"method": "pgd", "seed": 0, "batch": b, "y": 1.0} for b in (512, 64, 8)]
    (panel,) = value_figure(ValueFigure("b", "B", "", (Quantity("y", "y"),), x="batch"), lines).panels
    assert isinstance(panel, DotPanel)
    assert panel.categories == ("8", "64", "512")
    assert panel.dots[0].interval is None


def test_an_axis_of_dots_has_room_for_its_name_and_its_powers() -> None:
    name = "kernel distance between clean and PGD inputs"
    lines = [{"method": "pgd", "seed": seed, "layer": "stem", "y": 10.0**-seed} for seed in range(5)]
    declared = ValueFigure("layers", "Layers", "", (Quantity("y", name, log=True),), x="layer")

    def axis(*, seeds: int) -> dict[str, Any]:
        found: dict[str, Any] = specifications(value_figure(declared, lines[:seeds]))[0][0]["layout"]["xaxis"]
        return found

    text = axis(seeds=5)["title"]["text"].split("<br>")
    assert " ".join(text) == name
    assert all(len(part) <= 32 for part in text)
    for seeds in (3, 5):
        low, high = axis(seeds=seeds)["range"]
        assert 2 < (high - low) / axis(seeds=seeds)["dtick"] <= 7
        assert isinstance(axis(seeds=seeds)["dtick"], int)
    assert axis(seeds=1)["ticktext"] == ["0.5", "1", "2"]


def test_a_declaration_says_what_it_leaves_open() -> None:
    with pytest.raises(ConfigError, match=r"figure key '\.\./x' cannot name a file"):
        replace(GAP, key="../x")
    with pytest.raises(
        ConfigError, match="figure 'curves' has 2 quantities; one of colour, panels and views"
    ):
        replace(CURVES, views="")
    with pytest.raises(ConfigError, match="one axis with several labels or scales"):
        replace(CURVES, views="", colour="y")


def test_nothing_measured_is_said() -> None:
    assert value_figure(GAP, []).views == ()


# --- claims ----------------------------------------------------------------------------------------------


def test_the_forest_has_the_threshold_in_its_middle(study: Path) -> None:
    ledger = read_ledger(read_study(study).verdicts, "study.json")
    assert [entry.verdict for entry in ledger.entries] == list(planted_study.VERDICTS)
    assert [entry.seeds for entry in ledger.entries] == [3, 3, 3, 0]
    assert ledger.entries[0].effect == "0.52 [0.445, 0.595]"
    assert ledger.entries[3].forest is None
    (panel,) = forest([ledger]).panels
    assert isinstance(panel, ForestPanel)
    for row, entry in zip(panel.rows, ledger.entries, strict=False):
        assert row.interval is not None
        low, high = (row.place(end) for end in row.interval)
        assert max(map(abs, (low, high, *map(row.place, row.values.values())))) == pytest.approx(0.94)
        assert row.place(row.threshold) == 0
        claimed = low > 0 if row.above else high < 0
        other = high < 0 if row.above else low > 0
        assert entry.verdict == ("supported" if claimed else "refuted" if other else "inconclusive")


# --- the page --------------------------------------------------------------------------------------------


def test_the_page_has_claims_then_figures(study: Path) -> None:
    html = (study / "report.html").read_text()
    assert re.findall(r'<section id="([^"]*)"', html) == [
        "claims", "values-gap", "values-curves", "values-statistics", "files", "appendix"
    ]  # fmt: skip
    assert "4 claims on digits, small CNN: 1 supported, 1 refuted and 2 inconclusive." in html
    assert "Li et al. 2023, as we read it" in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    names = {path.name for path in (study / "figures").iterdir()}
    keys = ("claims", "values-gap", "values-curves", "values-statistics")
    assert names == {f"{key}.{kind}" for key in keys for kind in ("svg", "pdf")}
    for name in names:
        assert f'href="figures/{name}"' in html
        if name.endswith(".svg"):
            ElementTree.parse(study / "figures" / name)


def test_plotly_accepts_every_specification() -> None:
    for declared in FIGURES:
        for view in specifications(value_figure(declared, planted_study.lines())):
            for spec in view:
                go.Figure(data=spec["data"], layout=spec["layout"])


def test_the_command_draws_the_runs_of_one_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = planted_study.write(tmp_path / "gap", seeds=(0, 1))
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"Report: {folder / 'report.html'}\n"
    html = (folder / "report.html").read_text()
    sections = re.findall(r'<section id="([^"]*)"', html)
    assert sections.index("values-statistics") < sections.index("runs") < sections.index("accuracies")
    assert "All 4 runs are finished." in html
    assert "on those of seed 0." in html
    # In the order of the values, not of the folders' names.
    labels = ["standard (seed 0)", "fgsm (seed 0)", "standard (seed 1)", "fgsm (seed 1)"]
    assert re.findall(r"<summary><span [^>]*></span>([^<]*)", html) == labels
    figure = html.partition('<section id="accuracies"')[2].partition("</section>")[0]
    assert "fgsm (seed 0)" in figure
    assert "fgsm (seed 1)" not in figure
    assert "ranks" not in sections  # no run has kernels


def test_a_ledger_of_several_studies(study: Path, tmp_path: Path) -> None:
    html = write_ledger([read_study(study).verdicts] * 2, tmp_path / "ledger.html").read_text()
    assert re.findall(r'<section id="([^"]*)"', html) == ["claims1", "claims2", "files"]
    assert html.count('<span class="word" data-verdict="refuted">') == 2
    assert len(html) < 100_000  # no plots, no plotly
    assert (tmp_path / "figures" / "claims.pdf").exists()


def test_what_a_study_says_stays_text(tmp_path: Path) -> None:
    folder = planted_study.write(tmp_path / "gap")

    def evil(value: Any) -> Any:
        return EVIL if isinstance(value, str) else value

    path = folder / "study.json"
    study = json.loads(path.read_text())
    study["study"] = EVIL
    for claim in study["claims"]:
        claim |= {key: evil(value) for key, value in claim.items()}
        claim["values"] = {EVIL + seed: value for seed, value in claim["values"].items()}
    for figure in study["figures"]:
        figure |= {"title": EVIL, "caption": EVIL}
        for quantity in figure["y"]:
            quantity["label"] = EVIL
    path.write_text(json.dumps(study))
    lines = [line | {"method": EVIL, "statistics": EVIL, "inputs": EVIL} for line in planted_study.lines()]
    (folder / "values.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report([folder], folder / "report.html").read_text()
    assert "<script>alert" not in html
    assert "<img" not in html.split("* plotly.js v")[0]
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    assert "<" not in data[1]
    for svg in (folder / "figures").glob("*.svg"):
        ElementTree.parse(svg)


def test_plots_take_names_as_text() -> None:
    lines = [line | {"method": "<b>", "statistics": "<a>"} for line in planted_study.lines()]
    for declared in (CURVES, DOTS):
        spec = specifications(value_figure(declared, lines))[0][0]
        assert {trace["name"] for trace in spec["data"]} == {"&lt;b&gt;"}
    assert spec["layout"]["yaxis"]["ticktext"] == ["&lt;a&gt;"]
    assert {text for trace in spec["data"] for text in trace["text"]} >= {"&lt;b&gt;, &lt;a&gt;, mean"}


def _cut(study: dict[str, Any]) -> None:
    study["figures"][0].pop("y")


def _climb(study: dict[str, Any]) -> None:
    study["figures"][0]["key"] = "../../x"


def _twice(study: dict[str, Any]) -> None:
    study["figures"][1]["key"] = study["figures"][0]["key"]


def _number(study: dict[str, Any]) -> None:
    study["figures"][0]["title"] = 3


def _unclaimed(study: dict[str, Any]) -> None:
    study.pop("claims")


def _unbounded(study: dict[str, Any]) -> None:
    study["claims"][0]["interval"] = [1.0, math.inf]


def _halved(study: dict[str, Any]) -> None:
    study["claims"][0]["interval"] = [1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut, "its figures cannot be read: 'y'"),
        (_climb, "'../../x' cannot name a file"),
        (_twice, "two of its figures have one key"),
        (_number, "its figures cannot be read: a name is no text"),
        (_unclaimed, "its claims cannot be read"),
        (_halved, "its claims cannot be read"),
        (_unbounded, "inf is no number"),
    ],
)
def test_a_study_that_cannot_be_read_is_named(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    path = planted_study.write(tmp_path / "gap") / "study.json"
    study = json.loads(path.read_text())
    change(study)
    path.write_text(json.dumps(study))
    with pytest.raises(RunFolderError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        write_report([path.parent], tmp_path / "report.html")


def test_a_study_stands_alone_and_judged(tmp_path: Path) -> None:
    folder = planted_study.write(tmp_path / "gap")
    run = planted.write_empty(tmp_path / "run")
    with pytest.raises(RunFolderError, match="gap is a study; a report is on one study alone, or on runs"):
        write_report([run, folder], tmp_path / "report.html")
    (folder / "study.json").unlink()
    with pytest.raises(RunFolderError, match=r"no study.json yet; tangentlab study gap --out .*gap goes on"):
        write_report([folder], tmp_path / "report.html")


def test_points_lie_at_their_means_with_their_names(tmp_path: Path) -> None:
    cost, accuracy = Quantity("cost", "cost"), Quantity("accuracy", "accuracy", percent=True)
    declared = ValueFigure("frontier", "F", "", (accuracy,), x=cost, point="arm", colour="kind")
    lines = [
        {"arm": arm, "kind": kind, "seed": seed, "cost": x + seed, "accuracy": y + 0.01 * seed}
        for arm, kind, x, y in (("a", "one", 10, 0.5), ("b", "one", 20, 0.6), ("c", "two", 5, 0.2))
        for seed in range(3)
    ]
    figure = value_figure(declared, lines)
    (panel,) = figure.panels
    assert isinstance(panel, LinePanel)
    one = panel.lines[0]
    assert (one.name, tuple(one.labels), tuple(one.x)) == ("one", ("a", "b"), (11.0, 21.0))
    assert tuple(one.y) == pytest.approx((0.51, 0.61))
    low, high = mean_interval([0.5, 0.51, 0.52])
    assert (one.low[0], one.high[0]) == pytest.approx((low, high))
    assert [key.style for key in legend(figure)] == ["dots", "dots"]
    trace = specifications(figure)[0][0]["data"][0]
    assert trace["mode"] == "markers"
    assert trace["text"] == ["a", "b"]
    write_paper_figure(figure, tmp_path)
    drawn = (tmp_path / "values-frontier.svg").read_text()
    assert all(f">{arm}<" in drawn for arm in ("a", "b", "c"))
    assert _read_back(declared) == declared
    with pytest.raises(ConfigError, match="points need a quantity as x, not 'epoch'"):
        replace(declared, x="epoch")


def test_the_frontier_is_what_is_to_be_had_at_no_more(tmp_path: Path) -> None:
    cost, accuracy = Quantity("cost", "cost"), Quantity("accuracy", "accuracy")
    declared = ValueFigure("f", "F", "", (accuracy,), x=cost, point="arm", frontier=True, colour="kind")
    places = {"a": (5, 0.2), "worse": (6, 0.1), "b": (10, 0.5), "equal": (11, 0.5), "c": (40, 0.6)}
    lines = [
        {"arm": arm, "kind": arm in "bc", "seed": 0, "cost": x, "accuracy": y}
        for arm, (x, y) in places.items()
    ]
    (panel,) = value_figure(declared, lines).panels
    assert isinstance(panel, LinePanel)
    assert [(note.text, note.x, note.y) for note in panel.notes] == [
        (arm, *places[arm]) for arm in ("a", "b", "c")
    ]
    front = panel.lines[0]
    assert (front.name, front.colour, front.style) == ("frontier", None, "dash")
    assert list(zip(front.x, front.y, strict=True)) == [(5, 0.2), (10, 0.2), (10, 0.5), (40, 0.5), (40, 0.6)]
    figure = value_figure(declared, lines)
    # From the right: c ends over its point, b and a begin over theirs, and a would run into b.
    assert [(note.text, row, anchor) for note, row, anchor in note_rows(figure, panel)] == [
        ("c", 0, "right"), ("b", 0, "left"), ("a", 1, "left"),
    ]  # fmt: skip
    spec = specifications(figure)[0][0]
    assert [label["text"] for label in spec["layout"]["annotations"]] == ["c", "b", "a"]
    write_paper_figure(figure, tmp_path)
    drawn = (tmp_path / "values-f.svg").read_text()
    assert all((f">{arm}<" in drawn) == (arm in "abc") for arm in places)
    assert _read_back(declared) == declared
    (alone,) = value_figure(declared, lines[:1]).panels
    assert isinstance(alone, LinePanel)
    assert [line.name for line in alone.lines] == ["no"]
    with pytest.raises(ConfigError, match="a frontier is one of points"):
        replace(declared, point="")


def test_curves_lie_against_any_number() -> None:
    threshold, share = Quantity("threshold", "threshold"), Quantity("share", "share", percent=True)
    declared = ValueFigure("t", "T", "", (share,), x=threshold)
    lines = [
        {"method": "fgsm", "seed": seed, "threshold": at, "share": at * (0.5 + 0.1 * seed)}
        for at in (0.6, 0.2)
        for seed in range(3)
    ]
    (panel,) = value_figure(declared, lines).panels
    assert isinstance(panel, LinePanel)
    assert panel.x_axis == threshold.axis
    assert panel.lines[-1].x == (0.2, 0.6)
    assert panel.lines[-1].y == pytest.approx((0.12, 0.36))
    assert _read_back(declared) == declared


def test_colours_are_as_elsewhere_unless_two_would_share_one() -> None:
    quantity = (Quantity("y", "y"),)
    lines = [{"arm": f"{arm}", "seed": 0, "epoch": epoch, "y": 1.0} for arm in range(20) for epoch in (0, 1)]

    def drawn(*arms: int) -> list[tuple[int | None, str]]:
        declared = ValueFigure("c", "C", "", quantity, colour="arm", where={"arm": tuple(map(str, arms))})
        (panel,) = value_figure(declared, lines).panels
        assert isinstance(panel, LinePanel)
        return [(line.colour, line.style) for line in panel.lines]

    assert drawn(1, 4) == [(1, "solid"), (4, "solid")]
    assert drawn(4, 10) == [(4, "solid"), (2, "solid")]
    assert drawn(1, 4, 9) == [(0, "solid"), (1, "solid"), (2, "solid")]
    assert drawn(*range(10))[7:] == [(7, "solid"), (8, "dash"), (9, "dash")]


def _read_back(declared: ValueFigure) -> ValueFigure:
    entry = json.loads(json.dumps(finite(asdict(declared))))
    return read_figures({"figures": [entry]}, Path("study.json"))[0]


def test_derived_values_are_drawn_with_the_raw_ones(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gap"
    shutil.copytree(study, folder)
    verdicts = json.loads((folder / "study.json").read_text())
    declared = ValueFigure("worth", "What it is worth", "", (Quantity("worth", "worth"),), x="signal")
    verdicts["figures"] = [finite(asdict(declared))]
    verdicts["derived"] = [{"method": "pgd", "seed": seed, "signal": "s", "worth": 0.5} for seed in range(3)]
    (folder / "study.json").write_text(json.dumps(verdicts))
    assert "What it is worth" in write_report([folder], folder / "report.html").read_text()
    assert (folder / "figures" / "values-worth.svg").exists()
    (folder / "study.json").write_text(json.dumps({**verdicts, "derived": [1]}))
    with pytest.raises(RunFolderError, match="derived values cannot be read"):
        write_report([folder], folder / "report.html")
