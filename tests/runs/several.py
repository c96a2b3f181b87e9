"""Trains one configuration after another in the processes that torchrun starts: ``several.py RUNS.json``.

Runs that end early leave OUT-RANK.txt.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tangentlab.errors import TangentlabError
from tangentlab.runs import load_config, train
from tangentlab.training import TrainingState


class Ends:
    """A display that sends its process a batch system's notice after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def start(self, name: str, *, epochs: int, steps_per_epoch: int) -> None:
        pass

    def show(self, state: TrainingState, values: Mapping[str, Any]) -> None:
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def say(self, text: str) -> None:
        pass


for run in json.loads(Path(sys.argv[1]).read_text()):
    end, rank = run.get("end"), os.environ["RANK"]
    if rank == "0" and run.get("full"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    try:
        train(
            load_config("digits", run["words"]),
            run["out"],
            resume=run.get("resume", False),
            display=Ends(end) if end else None,
        )
    except TangentlabError as error:
        Path(f"{run['out']}-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
