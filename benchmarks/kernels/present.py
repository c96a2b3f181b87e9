"""The benchmark's JSON as Markdown, and the scaling as a figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Data = dict[str, Any]
Row = dict[str, Any]
OURS = "ours"
AXES = {"n": "images n", "P": "parameters P", "C": "classes C"}
PANELS = (("time", "seconds"), ("memory growth", "GB"))


def table(data: Data) -> str:
    """Markdown of whatever command wrote the file."""
    shape: dict[str, Callable[[Data], str]] = {"run": _compared, "scaling": _scaled, "probe": _shares}
    machine = data["environment"]
    head = (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"commit `{str(machine['commit'])[:12]}`"
    )
    peaks = [peak for peak in data["peaks"] if peak["status"] == "ok"]
    if peaks:
        rates = {name: max(peak[name]["gflops"] for peak in peaks) for name in ("fp32", "bf16")}
        head += f"; matrix peak {rates['fp32']:.0f} GFLOP/s in fp32, {rates['bf16']:.0f} in bf16"
    return f"{head}.\n\n{shape[data['command']](data)}"


def _compared(data: Data) -> str:
    lines = []
    for name, case in data["cases"].items():
        rows = [row for row in data["rows"] if row["case"] == name]
        lines += [
            f"**{name}**: {case['kind']}, n = {case['n']}, C = {case['classes']}, P = {case['parameters']:,}",
            "",
            "| engine | seconds | ratio to ours | memory growth, GB | relative error | runs |",
            "|---|---|---|---|---|---|",
        ]
        for engine in dict.fromkeys(row["engine"] for row in rows):
            mine = [row for row in rows if row["engine"] == engine]
            measured = [row for row in mine if row["status"] == "ok"]
            if not measured:
                lines.append(f"| {engine} | – | – | – | – | {mine[0]['status']}: {mine[0]['reason']} |")
                continue
            ratio = _ratio(rows, engine)
            lines.append(
                f"| {engine} | {_number(median(map(_seconds, measured)))} | "
                f"{'–' if ratio is None else f'{ratio:.2f}'} | {_growth(measured)} | "
                f"{max(row['error'] for row in measured):.1e} | {len(measured)} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _scaled(data: Data) -> str:
    lines = ["| sweep | n | P | C | " + " | ".join(f"{e}, s" for e in _engines(data)) + " |"]
    lines.append("|---" * (4 + len(_engines(data))) + "|")
    for name, case in data["cases"].items():
        cells = []
        for engine in _engines(data):
            measured = _measured(data, name, engine)
            cells.append(_number(median(map(_seconds, measured))) if measured else "–")
        size = f"{case['n']} | {case['parameters']:,} | {case['classes']}"
        lines.append(f"| {case['sweep']} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shares(data: Data) -> str:
    lines = [
        "| width | kernels | PGD-10 step of 128, s | epoch of 50,000, s | snapshot, s | share of an epoch |",
        "|---|---|---|---|---|---|",
    ]
    measured: dict[tuple[int, int], list[Data]] = {}
    for row in data["rows"]:
        if row["status"] == "ok":
            measured.setdefault((row["width"], row.get("sketch", 0)), []).append(row)
    for (width, sketch), rows in measured.items():
        step = median(median(row["step_seconds"]) for row in rows)
        snapshot = median(median(row["snapshot_seconds"]) for row in rows)
        epoch = step * rows[0]["steps_per_epoch"]
        cells = " | ".join(map(_number, (step, epoch, snapshot)))
        kernels = f"{sketch} features" if sketch else "exact"
        lines.append(f"| {width} | {kernels} | {cells} | {100 * snapshot / epoch:.2f} % |")
    return "\n".join(lines)


def plot(data: Data, out: Path) -> None:
    """Time and growth against n, P and C on log axes, from a scaling file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    values = {
        "time": _seconds,
        "memory growth": lambda row: (row["growth_bytes"] or 0) / 1e9,
    }
    sweeps = list(dict.fromkeys(case["sweep"] for case in data["cases"].values()))
    with mpl.rc_context({"svg.hashsalt": "tangentlab", "font.size": 9}):
        figure = Figure(figsize=(3.1 * len(sweeps), 5), layout="constrained")
        axes = figure.subplots(len(PANELS), len(sweeps), squeeze=False, sharex="col", sharey="row")
        for across, sweep in enumerate(sweeps):
            for down, (title, unit) in enumerate(PANELS):
                panel = axes[down, across]
                for engine in _engines(data):
                    points = [
                        (_size(case, sweep), median(map(values[title], measured)))
                        for name, case in data["cases"].items()
                        if case["sweep"] == sweep and (measured := _measured(data, name, engine))
                    ]
                    panel.loglog(*zip(*points, strict=True), "o-", ms=4, label=engine) if points else None
                panel.set(ylabel=f"{title}, {unit}" if across == 0 else "")
                if sweep != "P":  # few and small: their own numbers, not powers of ten
                    sizes = sorted({_size(c, sweep) for c in data["cases"].values() if c["sweep"] == sweep})
                    panel.set_xticks(sizes, [str(size) for size in sizes])
                    panel.set_xticks([], minor=True)
                panel.grid(visible=True, which="major", alpha=0.3)
            axes[-1, across].set_xlabel(AXES[sweep])
        axes[0, 0].legend(frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _size(case: Row, sweep: str) -> int:
    return int(case[{"n": "n", "P": "parameters", "C": "classes"}[sweep]])


def _engines(data: Data) -> list[str]:
    return list(dict.fromkeys(row["engine"] for row in data["rows"]))


def _measured(data: Data, case: str, engine: str) -> list[Row]:
    return [
        row
        for row in data["rows"]
        if row["status"] == "ok" and (row["case"], row["engine"]) == (case, engine)
    ]


def _seconds(row: Row) -> float:
    return float(median(row["seconds"]))


def _ratio(rows: list[Row], engine: str) -> float | None:
    """Median over the rounds of an engine's seconds to ours in the same round."""
    ours = {row["round"]: _seconds(row) for row in rows if row["engine"] == OURS and row["status"] == "ok"}
    found = [
        _seconds(row) / ours[row["round"]]
        for row in rows
        if row["engine"] == engine and row["status"] == "ok" and row["round"] in ours
    ]
    return median(found) if found else None


def _growth(measured: list[Row]) -> str:
    known = [row["growth_bytes"] for row in measured if row["growth_bytes"] is not None]
    return _number(median(known) / 1e9) if known else "–"


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
