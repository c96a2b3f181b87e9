"""Through which modules a parameter acts, established before a kernel is trusted to it.

A parameter is first taken to act through the modules that hold it. That is wrong for a weight used
functionally elsewhere, a module whose forward is bypassed, or one that returns a tuple: then the enclosing
module takes over, at worst the model itself. Two tests decide, on two examples: whether every use in the
autograd graph lies inside the owners' calls (which a gradient of zero cannot hide), and whether the gradients
agree with those of each example run alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import takewhile
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from tangentlab.errors import KernelError
from tangentlab.kernels.capture import Call, Tape, record
from tangentlab.kernels.memory import watched
from tangentlab.kernels.reproducible import reproducible
from tangentlab.kernels.rules import Block, blocks
from tangentlab.randomness import generator

Owners = Mapping[str, tuple[str, ...]]

# The last structure checked of each model; paths only, so that the model can be freed.
_checked: WeakKeyDictionary[nn.Module, tuple[object, Owners]] = WeakKeyDictionary()


def owners(model: nn.Module, x: Tensor) -> Owners:
    """The paths of the modules through which each parameter that requires grad acts.

    Args:
        model: in evaluation mode.
        x: [n, ...]; the first two examples are run.

    Raises:
        KernelError: the model draws random numbers, mixes examples, or has a parameter for which no exact
            per-example gradient was found; names it.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    holders: dict[str, tuple[str, ...]] = dict.fromkeys(trained, ())
    names = {id(p): name for name, p in trained.items()}
    for path, module in model.named_modules():
        for p in dict.fromkeys(module._parameters.values()):
            if p is not None and id(p) in names:
                holders[names[id(p)]] += (path,)
    signature = (
        holders,
        [(p.shape, p.dtype, p.device) for p in trained.values()],
        [type(module) for module in model.modules()],
        x.shape[1:],
        x.dtype,
        len(x) > 1,
    )
    if model not in _checked or _checked[model][0] != signature:
        _checked[model] = (signature, _check(model, x[:2], trained, holders))
    return _checked[model][1]


def _check(model: nn.Module, pair: Tensor, trained: dict[str, nn.Parameter], holders: Owners) -> Owners:
    first = reproducible(model, pair)
    v = torch.randn(first.shape[1], generator=generator(0, "kernels.ownership")).to(first)
    alone = [_alone(model, pair[i : i + 1], v, list(trained.values())) for i in range(len(pair))]
    tolerance = _Tolerance(first.dtype, alone, list(trained.values()))
    if not tolerance.outputs_agree(first, torch.cat([output for output, _ in alone])):
        raise KernelError(
            "the model mixes examples: an output depends on the other examples in the batch, "
            "so that the kernel of single examples is undefined"
        )
    owners = dict(holders)
    while True:
        found = blocks(model, owners)
        tape = record(model, watched(found), pair)
        tape.pull(v[None])
        wrong = _disagreeing(found, tape, alone, trained, tolerance)
        if not wrong:
            return owners
        for name in wrong:
            if owners[name] == ("",):
                raise KernelError(
                    f"parameter {name!r}: no exact per-example gradient, not even by running "
                    f"the whole model on each example ({wrong[name]})"
                )
            owners[name] = (_enclosing(owners[name]),)


def _disagreeing(
    found: list[Block],
    tape: Tape,
    alone: list[tuple[Tensor, list[Tensor | None]]],
    trained: dict[str, nn.Parameter],
    tolerance: _Tolerance,
) -> dict[str, str]:
    """The parameters that do not act as their blocks assume, and why."""
    wrong: dict[str, str] = {}
    index = {name: i for i, name in enumerate(trained)}
    consumers = _consumers(tape.output)
    for block in found:
        faults = [
            fault
            for module in block.modules
            for call in tape.calls[module]
            if (fault := call.fault(len(tape))) is not None
        ]
        if faults:
            wrong |= dict.fromkeys(block.names, f"its module {faults[0]}")
            continue
        inside = {node for module in block.modules for call in tape.calls[module] for node in _inside(call)}
        G = block.gradient(tape, tape.output.dtype, 0)
        sizes = [trained[name].numel() for name in block.names]
        shares = G[:, 0].split(sizes, 1) if G is not None else [None] * len(sizes)
        for name, share in zip(block.names, shares, strict=True):
            accumulate = get_gradient_edge(trained[name]).node
            if not consumers.get(accumulate, set()) <= inside:
                wrong[name] = "it is used outside of its module"
            for i, (_, gradients) in enumerate(alone):
                if not tolerance.agree(None if share is None else share[i], gradients[index[name]]):
                    wrong[name] = f"it differs from the gradient of example {i} alone"
    return wrong


def _enclosing(paths: tuple[str, ...]) -> str:
    """The path of the innermost module around one path, or around all of several."""
    parts = [path.split(".") for path in paths]
    if len(parts) == 1:
        return ".".join(parts[0][:-1])
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in shared)


def _consumers(output: Tensor) -> dict[Node, set[Node]]:
    """For every node of the output's graph, the nodes that pass a gradient to it."""
    consumers: dict[Node, set[Node]] = {}
    stack = [output.grad_fn] if output.grad_fn is not None else []
    seen = set(stack)
    while stack:
        node = stack.pop()
        for source, _ in node.next_functions:
            if source is not None:
                consumers.setdefault(source, set()).add(node)
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
    return consumers


def _inside(call: Call) -> set[Node]:
    """The nodes between a call's output and its inputs."""
    stack = [call.edge.node] if call.edge is not None else []
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen and node not in call.sources:
            seen.add(node)
            stack += [source for source, _ in node.next_functions if source is not None]
    return seen


def _alone(
    model: nn.Module, x: Tensor, v: Tensor, parameters: list[nn.Parameter]
) -> tuple[Tensor, list[Tensor | None]]:
    """The outputs of one example run alone, and the gradients of their product with v; None where unused."""
    output = record(model, [], x).output
    if not output.requires_grad:
        return output, [None] * len(parameters)
    return output.detach(), list(torch.autograd.grad([(output @ v).sum()], parameters, allow_unused=True))


class _Tolerance:
    """How far two computations of one thing may lie apart.

    Half of the digits, √eps relative to the norm: rounding grows with depth, faults of structure are of order
    one. Where the thing itself cancels to nearly nothing, what is left is rounding, so a floor is added: for
    a parameter's gradient 64·eps of the whole gradient's norm, which the kernel would not show either; for
    the outputs 8·eps·‖g∘θ‖, what rounding the parameters does to them.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        alone: list[tuple[Tensor, list[Tensor | None]]],
        parameters: list[nn.Parameter],
    ) -> None:
        eps = torch.finfo(dtype).eps
        self._relative = math.sqrt(eps)
        whole = [
            [
                (g.norm(), (g * p.detach()).norm())
                for g, p in zip(gradients, parameters, strict=True)
                if g is not None
            ]
            for _, gradients in alone
        ]
        self._gradient_floor = 64 * eps * max(math.hypot(*(float(g) for g, _ in row)) for row in whole)
        self._output_floor = 8 * eps * max(math.hypot(*(float(gp) for _, gp in row)) for row in whole)

    def agree(self, a: Tensor | None, b: Tensor | None) -> bool:
        """Whether two gradients agree; None is zero."""
        if a is None or b is None:
            return all(g is None or float(g.norm()) <= self._gradient_floor for g in (a, b))
        return _distance(a, b.flatten()) <= self._relative * float(b.norm()) + self._gradient_floor

    def outputs_agree(self, a: Tensor, b: Tensor) -> bool:
        return _distance(a, b) <= self._relative * float(b.norm()) + self._output_floor


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())
