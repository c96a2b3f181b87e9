"""The signal and the threshold of the alarm, by the looks of alarm_looks.py on several data sets together.

    python benchmarks/alarm_threshold.py results/overfitting/looks-tier[012].json

A line of each signal, then of the shipped one by threshold: the share of the collapses that it would have
spoken before, that of quiet runs that it would have spoken in, and what the first is worth less the second,
of which the largest chose; then in how many runs it is raised at the shipped threshold, by what became of
them and by method.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from alarm_looks import by_signal, by_threshold, lines

from tangentlab.probes.overfitting_alarm import THRESHOLD
from tangentlab.studies.overfitting_watches import seen_runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("looks", type=Path, nargs="+")
    options = parser.parse_args()
    rows = [
        {**row, "run": f"{path.stem}/{row['run']}"}
        for path in options.looks
        for row in json.loads(path.read_bytes())["runs"]
    ]
    values = [line for row in rows for line in lines(row)]
    runs = seen_runs(values)
    for found in by_signal(runs):
        print(json.dumps(found))
    for found in by_threshold(runs):
        print(json.dumps({**found, "worth": found.get("in_time", 0.0) - found.get("false_alarms", 0.0)}))
    raised = defaultdict(list)
    for line in values:
        if line["what"] == "run":
            raised[line["fate"], line["method"]].append(min(line["alarm_pooled"]) < THRESHOLD)
    for (fate, method), own in sorted(raised.items()):
        told = {"threshold": THRESHOLD, "fate": fate, "method": method}
        print(json.dumps({**told, "runs": len(own), "raised": sum(own)}))


if __name__ == "__main__":
    main()
