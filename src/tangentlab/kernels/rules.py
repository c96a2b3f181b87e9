"""Parameters by the rule that gives their per-example gradients, and the blocks that a kernel is summed from.

The kernel is Σ_θ G_θ G'_θᵀ over the parameters θ: every block adds the share of its own. A block is a
:class:`Contraction` (weights of Linear and Conv2d) or an :class:`Explicit` one: biases, BatchNorm's scale,
and :class:`Replay`, exact for every module.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tangentlab.kernels.capture import Call, Tape
from tangentlab.kernels.contraction import Contraction, columns, contracts
from tangentlab.kernels.gram import chunks, product
from tangentlab.kernels.replay import Replay


class Rule(Protocol):
    """Per-example gradients of some parameters of some modules."""

    modules: list[nn.Module]

    def gradient(self, tape: Tape, dtype: torch.dtype, space: float) -> Tensor | None:
        """G [n, R, P] in ``dtype``, None if the outputs do not depend on the parameters.

        ``space`` elements beside G are for the transients, which take ``transient`` an example.
        """
        ...

    def transient(self, tape: Tape) -> int:
        """Elements that forming one example's G holds beside it."""
        ...


class Block(Protocol):
    """The parameters ``names``, flattened one after the other, and their share of the kernel."""

    names: list[str]
    modules: list[nn.Module]

    def gradient(self, tape: Tape, dtype: torch.dtype, space: float) -> Tensor | None:
        """As a rule's."""
        ...

    def gram(
        self, left: Tape, right: Tape | None, dtype: torch.dtype, space: float, cache: dict[object, Tensor]
    ) -> Tensor | None:
        """K[i,r,j,s] = ⟨G_ir, G_js⟩, [n, R, m, R]; with ``right`` None left with itself, i ≥ j valid.

        Args:
            left, right: tapes with their cotangents pulled.
            dtype: of the factors, and so of the sums.
            space: elements of ``dtype`` that the transients may hold.
            cache: what a pair of tapes keeps from one set of cotangents to the next.
        """
        ...

    def plan(self, tape: Tape, tile: int, sides: int, rows: int, sets: int) -> tuple[int, int]:
        """Settle how ``gram`` will work; elements it keeps in the cache, and the least ``space`` it needs.

        Args:
            tape: one recorded example, its cotangents pulled.
            tile: examples a tile.
            sides: 1 if a tile meets only itself, else 2.
            rows, sets: ``sets`` times ``rows`` cotangents at once.
        """
        ...


class Bias:
    """∂f/∂b = Σ_p δ_p: the bias of Linear, Conv2d and BatchNorm, added at every position p."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = [module]

    def gradient(self, tape: Tape, dtype: torch.dtype, space: float) -> Tensor | None:
        return _total(
            columns(module, delta).sum(3, dtype=dtype) for module, _, delta in tape.live(self.modules)
        )

    def transient(self, tape: Tape) -> int:
        return max((delta[0].numel() for _, _, delta in tape.live(self.modules)), default=0)


class Scale:
    """∂f/∂γ = Σ_p δ_p x̂_p: BatchNorm's scale, x̂ = (x − mean) / √(var + eps) with the running statistics."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = [module]

    def gradient(self, tape: Tape, dtype: torch.dtype, space: float) -> Tensor | None:
        return _total(
            self._share(module, call, delta, dtype, space) for module, call, delta in tape.live(self.modules)
        )

    def _share(self, module: Any, call: Call, delta: Tensor, dtype: torch.dtype, space: float) -> Tensor:
        mean, var = (getattr(module, name).to(dtype)[:, None] for name in ("running_mean", "running_var"))
        G = delta.new_empty(delta.shape[:3], dtype=dtype)
        for some in chunks(len(delta), space / (4 * delta[0].numel())):
            x = call.inputs[0][some].to(dtype).reshape(-1, len(mean), delta[0, 0, 0].numel())
            x_hat = (x - mean) * (var + module.eps).rsqrt()  # [n, C, T]
            G[some] = (columns(module, delta[some]).to(dtype) * x_hat[:, None]).sum(3)
        return G

    def transient(self, tape: Tape) -> int:
        return max((4 * delta[0].numel() for _, _, delta in tape.live(self.modules)), default=0)


class Explicit:
    """Parameters whose per-example gradients are formed whole: the sum of their rules' shares."""

    def __init__(self, names: list[str], size: int, rules: list[Rule]) -> None:
        self.names = names
        self.modules = [module for rule in rules for module in rule.modules]
        self._size = size
        self._rules = rules

    def gradient(self, tape: Tape, dtype: torch.dtype, space: float) -> Tensor | None:
        return _total(
            share for rule in self._rules if (share := rule.gradient(tape, dtype, space)) is not None
        )

    def gram(
        self, left: Tape, right: Tape | None, dtype: torch.dtype, space: float, cache: dict[object, Tensor]
    ) -> Tensor | None:
        tapes = [left] if right is None else [left, right]
        rows = max((delta.shape[1] for _, _, delta in left.live(self.modules)), default=0)
        room = space - self._held(max(map(len, tapes)), len(tapes), rows)
        G = [self.gradient(tape, dtype, room) for tape in tapes]
        if G[0] is None or G[-1] is None:
            return None
        return product(G[0], None if right is None else G[1])

    def plan(self, tape: Tape, tile: int, sides: int, rows: int, sets: int) -> tuple[int, int]:
        return 0, self._held(tile, sides, rows) + max(rule.transient(tape) for rule in self._rules)

    def _held(self, tile: int, sides: int, rows: int) -> int:
        """G of every side, and while it is made a share that is added to it or cast."""
        return (sides + 1) * tile * rows * self._size


def blocks(model: nn.Module, owners: Mapping[str, tuple[str, ...]]) -> list[Block]:
    """The blocks of a model whose parameters act through the modules at the paths ``owners[name]``."""
    parameters = dict(model.named_parameters())
    found: list[Block] = []
    replayed: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, paths in owners.items():
        modules = [model.get_submodule(path) for path in paths]
        rules = [_rule(module, name, parameters[name]) for module in modules]
        if all(isinstance(rule, Contraction) for rule in rules):
            found.append(Contraction(name, modules))
        elif all(isinstance(rule, Replay) for rule in rules):
            replayed[paths].append(name)
        else:
            found.append(Explicit([name], parameters[name].numel(), rules))
    for paths, names in replayed.items():
        replays: list[Rule] = [
            Replay(module, [_local_names(module, parameters[name])[0] for name in names])
            for module in map(model.get_submodule, paths)
        ]
        found.append(Explicit(names, sum(parameters[name].numel() for name in names), replays))
    return found


def _rule(module: nn.Module, name: str, parameter: nn.Parameter) -> Rule:
    """The rule for a parameter that acts through the module; the forwards known to the letter have one."""
    forward, local = type(module).forward, _local_names(module, parameter)
    if local == ["weight"] and contracts(module):
        return Contraction(name, [module])
    if local == ["weight"] and forward is _BatchNorm.forward:
        return Scale(module)
    if local == ["bias"] and forward in (nn.Linear.forward, nn.Conv2d.forward, _BatchNorm.forward):
        return Bias(module)
    return Replay(module, local[:1])


def _local_names(module: nn.Module, parameter: nn.Parameter) -> list[str]:
    """Every name that the parameter has inside the module."""
    return [name for name, p in module.named_parameters(remove_duplicate=False) if p is parameter]


def _total(shares: Iterable[Tensor]) -> Tensor | None:
    G: Tensor | None = None
    for share in shares:
        G = share if G is None else G + share
    return G
