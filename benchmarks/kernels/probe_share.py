"""A kernel probe's share of an adversarial epoch: seconds of a snapshot against those of PGD-10 training."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from tangentlab import KernelProbe
from tangentlab.attacks import PGD
from tangentlab.models import PreActResNet18
from tangentlab.training import Batch, Memory, Network, PGDTraining

EPS, STEP_SIZE, IMAGES, BATCH, PROBED, CLASSES = 8 / 255, 2 / 255, 50_000, 128, 128, 10


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    model = PreActResNet18((3, 32, 32), CLASSES, width=spec["width"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.rand(BATCH, 3, 32, 32), torch.arange(BATCH) % CLASSES
    method, draws = PGDTraining(EPS, STEP_SIZE, 10), torch.Generator().manual_seed(0)

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        method.loss(Network(model, model), Batch(x, y), memory=Memory(), generator=draws).backward()
        optimizer.step()

    inputs = {"clean": None, "pgd": PGD(EPS, STEP_SIZE, 10)}
    probe = KernelProbe(
        x[:PROBED], y[:PROBED], inputs=inputs, kinds=("class",), sketch=spec["sketch"] or None
    )
    steps, snapshots = [], []
    for k in range(1 + spec["calls"]):
        steps.append(clock(step))
        snapshots.append(clock(lambda k=k: probe.measure(model, step=k)))
    answer = {
        "status": "ok",
        "first_snapshot_seconds": snapshots[0],
        "step_seconds": steps[1:],
        "snapshot_seconds": snapshots[1:],
        "steps_per_epoch": -(-IMAGES // BATCH),
    }
    Path(spec["answer"]).write_text(json.dumps(answer))


def clock(call: object) -> float:
    """Seconds of a call."""
    assert callable(call)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
