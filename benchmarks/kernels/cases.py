"""What is measured: networks, inputs, kinds of kernel; and the sweeps over n, P and C."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangentlab.models import PreActResNet18

SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Case:
    """The kernel of ``kind`` of a network on n images.

    ``sweep``: what a scaling case varies. ``engines``: whom it is meant for; none named, for all.
    """

    name: str
    network: str
    n: int
    kind: str
    width: int = 0
    classes: int = 10
    memory: str = "2GiB"
    sweep: str = ""
    engines: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """Names the network and its inputs: cases that share it share weights and images."""
        return f"{self.network}-w{self.width}-C{self.classes}-n{self.n}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_PRN16 = Case("prn18-w16", "prn18", 128, "class", width=16)
_PRN64 = Case("prn18-w64", "prn18", 32, "class", width=64)
_FIGURES = [
    *(Case(f"conv3-{kind}", "conv3", 64, kind) for kind in ("full", "class", "trace")),
    _PRN16,
    _PRN64,
    replace(_PRN64, name="prn18-w64-n256", n=256, memory="4GiB", engines=("ours", "ours-bf16", "torch.func")),
    Case("vit-tiny", "vit-tiny", 64, "class", width=192),
]
CASES = {case.name: case for case in _FIGURES}
SWEEPS = [
    *(replace(_PRN16, name=f"n-{n}", n=n, sweep="n") for n in (8, 16, 32, 64, 128, 256)),
    *(replace(_PRN16, name=f"P-{w}", n=16, width=w, sweep="P") for w in (4, 8, 16, 32, 64)),
    *(replace(_PRN16, name=f"C-{C}", n=32, classes=C, sweep="C") for C in (2, 5, 10, 20, 50, 100)),
]


def chosen(names: list[str]) -> list[Case]:
    """The cases by name, or by the network's name for all of its cases.

    Raises:
        SystemExit: a name is unknown.
    """
    found: dict[str, Case] = {}
    for name in names or list(CASES):
        some = {k: case for k, case in CASES.items() if name in (k, case.network)}
        if not some:
            choices = dict.fromkeys([*CASES, *(case.network for case in CASES.values())])
            raise SystemExit(f"case {name!r} is unknown; choose from {', '.join(choices)}")
        found |= some
    return list(found.values())


class ViTTiny(nn.Module):
    """ViT-Ti (Touvron et al. 2021, DeiT) on patches of 4×4: pre-norm, class token, GELU."""

    def __init__(self, classes: int, dim: int, depth: int = 12, heads: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.patch = patch
        tokens = (SHAPE[1] // patch) * (SHAPE[2] // patch) + 1
        self.embed = nn.Linear(SHAPE[0] * patch**2, dim)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        token = self.token.expand(len(x), -1, -1)
        x = self.blocks(torch.cat([token, self.embed(patches)], dim=1) + self.position)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return mixed


def network(case: Case) -> nn.Module:
    """The network of a case, untrained, in evaluation mode."""
    if case.network == "prn18":
        return PreActResNet18(SHAPE, case.classes, width=case.width).eval()
    if case.network == "vit-tiny":
        return ViTTiny(case.classes, case.width).eval()
    channels, layers = SHAPE[0], []
    for out in (32, 64, 128):
        layers += [nn.Conv2d(channels, out, 3, 2, 1), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, case.classes)).eval()


def write(case: Case, path: Path, seed: int = 0) -> None:
    """Weights and images, for every process alike; BatchNorm's statistics and affine maps are not trivial."""
    torch.manual_seed(seed)
    model = network(case)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
        model.train()
        for _ in range(3):
            model(torch.rand(32, *SHAPE))
    arrays: dict[str, Any] = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(path, inputs=torch.rand(case.n, *SHAPE).numpy(), **arrays)


def read(case: Case, path: str | Path) -> tuple[nn.Module, Tensor]:
    """The network in evaluation mode, and its images [n, 3, 32, 32]."""
    with np.load(path) as stored:
        arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
    x = arrays.pop("inputs")
    model = network(case)
    model.load_state_dict(arrays)
    return model, x
