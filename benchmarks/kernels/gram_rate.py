"""GFLOP/s of the Gram part of our engine: the operations that its plan counts, over the seconds they take.

The Gram part is forming per-example gradients and multiplying them; forward, backward and planning are not.
Its seconds are those of one more call inside the blocks' ``gram``.
"""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import torch
from cases import Case, read

PRODUCTS = {"ours": None, "ours-bf16": "bf16"}


def gram_rate(spec: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What a row of "ours" gains: the Gram part's seconds, operations and rate, and what the plan expected.

    Args:
        spec: names the engine, the case and the file of its weights and images.
        seconds: median of the whole call.
    """
    if spec["engine"] not in PRODUCTS:
        return {}
    import tangentlab as tl
    from tangentlab.kernels.blocks import Replayed
    from tangentlab.kernels.direct import Direct
    from tangentlab.kernels.planning import Plan

    case, products = Case(**spec["case"]), PRODUCTS[spec["engine"]]
    model, x = read(case, spec["problem"])
    asked: dict[str, Any] = {"kind": case.kind, "memory": case.memory, "products": products}
    plan = tl.kernels.plan(model, x, **asked)
    assert isinstance(plan, Plan)
    spent = 0.0

    def timed(gram: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            try:
                return gram(*args)
            finally:
                spent += time.perf_counter() - started

        return call

    tl.ntk(model, x, **asked)
    with (
        patch.object(Direct, "gram", timed(Direct.gram)),
        patch.object(Replayed, "gram", timed(Replayed.gram)),
    ):
        tl.ntk(model, x, **asked)
    return {
        "gram_seconds": spent,
        "gram_flops": plan.gram_flops,
        "gram_gflops": plan.gram_flops / spent / 1e9,
        "network_flops": plan.network_flops,
        "planned_seconds": plan.seconds,
        "planned_bytes": plan.bytes,
        "passes": len(plan.passes),
        "threads": torch.get_num_threads(),
    }
