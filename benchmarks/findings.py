"""Takes studies into results/studies and writes the ledgers of README and docs/findings.md anew.

    python benchmarks/findings.py [STUDY ...]      # such as runs/gap, where tangentlab study put it

Of each study the configurations, the raw values (packed where they are large) and the verdicts are kept, with
the last command that measured some of them, but for its folder, and its environment.
All studies there are judged anew from their raw values. With --unfinished the values go to results/unfinished
instead and nothing is judged: tangentlab study, given a copy of that folder as --out, goes on from them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any

import yaml

from tangentlab.files import json_bytes
from tangentlab.records import read_configs, read_values
from tangentlab.studies import judge_study, ledger, of_source
from tangentlab.studies.claims import PAPER
from tangentlab.studies.study import load_study

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "studies"
UNFINISHED = ROOT / "results" / "unfinished"
LARGE = 1_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", type=Path, nargs="*", metavar="STUDY")
    parser.add_argument("--unfinished", action="store_true")
    options = parser.parse_args()
    for folder in options.studies:
        print(take(folder, UNFINISHED if options.unfinished else RESULTS))
    if options.unfinished:
        return
    found = [judge(path.parent) for path in sorted(RESULTS.glob("*/config.yaml"))]
    write(ROOT / "docs" / "findings.md", "tangentlab study all", ledger(found))
    papers = ledger([of_source(study, PAPER) for study in found])
    write(ROOT / "README.md", f"tangentlab study all --source '{PAPER}'", papers)


def take(folder: Path, into: Path) -> str:
    """Copy what a study measured; returns what was taken."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    lines = read_values(folder)
    config["seeds"] = sorted({line["seed"] for line in lines})
    # As one call would have measured them: figures name their curves in this order.
    order = list(load_study(config["study"]).runs(config["tier"], config["seeds"]))
    lines.sort(key=lambda line: order.index(line["run"]))
    out = into / f"{config['study']}-tier{config['tier']}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_lines(out / "values.jsonl", lines)
    configs = read_configs(folder)
    write_lines(out / "configs.jsonl", [configs[run] for run in order if run in configs])
    there = json.loads((folder / "study.json").read_bytes())["environment"]
    there["command"] = re.sub(r" --out \S+", "", there["command"])
    (out / "study.json").write_bytes(json_bytes({"environment": there}))
    return f"{out}: seeds {config['seeds']}, {len(lines)} values"


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """In place of those there, packed where they are large; no file where there are none."""
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    packed = path.with_name(f"{path.name}.gz")
    path.unlink(missing_ok=True)
    packed.unlink(missing_ok=True)
    if len(content) >= LARGE:
        packed.write_bytes(gzip.compress(content, mtime=0))
    elif content:
        path.write_bytes(content)


def judge(folder: Path) -> dict[str, Any]:
    """Write the study's verdicts and figures anew; where its values came from stays."""
    path = folder / "study.json"
    found = {**judge_study(folder), "environment": json.loads(path.read_bytes())["environment"]}
    path.write_bytes(json_bytes(found))
    return found


def write(document: Path, command: str, text: str) -> None:
    """Put the text between the marks that name the command."""
    head, mark, rest = document.read_text().partition(f"<!-- {command} -->\n")
    _, end, tail = rest.partition("<!-- end -->")
    if not mark or not end:
        raise SystemExit(f"{document} has no marks for {command!r}")
    document.write_text(f"{head}{mark}\n{text}\n\n{end}{tail}")


if __name__ == "__main__":
    main()
