"""A case's weights and images, and its kernel in float64: slow, and obviously right.

One ``autograd.grad`` per example and class; none of the engines under test has a part in it.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from cases import Case, read, write
from torch import Tensor, nn

BYTES = 3 * 10**9  # of gradients at once; it sets the number of examples


def kernel(model: nn.Module, x: Tensor, kind: str) -> Tensor:
    """Θ in float64: "full" [n, n, C, C], "class" [C, n, n], "trace" [n, n], the mean over the classes."""
    model = copy.deepcopy(model).double()
    x = x.double()
    classes = model(x[:1]).shape[1]
    if kind == "full":
        K = _gram(model, x, list(range(classes)))
        return K.reshape(2 * (len(x), classes)).transpose(1, 2)
    K = torch.stack([_gram(model, x, [c]) for c in range(classes)])
    return K if kind == "class" else K.mean(dim=0)


def _gram(model: nn.Module, x: Tensor, classes: list[int]) -> Tensor:
    """Σ_θ G_θ G_θᵀ, the row i·len(classes) + c of G_θ being ∂f_c(x_i)/∂θ."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = len(x) * len(classes)
    G = [torch.empty(rows, p.numel(), dtype=p.dtype) for p in parameters]
    for row in range(rows):
        i, c = divmod(row, len(classes))
        gradients = torch.autograd.grad(model(x[i : i + 1])[0, classes[c]], parameters)
        for g, gradient in zip(G, gradients, strict=True):
            g[row] = gradient.flatten()
    return sum((g @ g.T for g in G), torch.zeros(rows, rows, dtype=torch.float64))


def main() -> None:
    spec = json.loads(sys.argv[1])
    case = Case(**spec["case"])
    path = Path(spec["problem"])
    if not path.exists():
        write(case, path)
    model, x = read(case, path)
    count = sum(p.numel() for p in model.parameters())
    if spec["reference"] and not Path(spec["reference"]).exists():
        each = 8 * count * (case.classes if case.kind == "full" else 1)
        some = min(case.n, max(2, BYTES // each))
        examples = (
            np.arange(some) * case.n // some
        )  # evenly spread: an entry depends on its two examples alone
        np.savez(spec["reference"], kernel=kernel(model, x[examples], case.kind).numpy(), examples=examples)
    Path(spec["answer"]).write_text(json.dumps({"status": "ok", "parameters": count}))


if __name__ == "__main__":
    main()
