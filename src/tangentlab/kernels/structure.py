"""Through what a parameter acts, established before a kernel is trusted to it.

A parameter is first taken to act through the functions that have a rule. That is wrong for a weight that is
computed from parameters, for one that enters other functions, or one whose gradient mixes with the rest:
then the module that holds it is run again instead, or the one around that, at worst the model itself. Two
tests decide, on two unlike examples: whether every use in the autograd graph lies inside the recorded sites
(which a gradient of zero cannot hide), and whether the gradients agree with those of each example run alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.jit import ScriptModule

from tangentlab.errors import KernelError
from tangentlab.kernels.alone import Alone, dot, grouped
from tangentlab.kernels.blocks import Block, Replayed
from tangentlab.kernels.capture import Tape, consumers, record
from tangentlab.kernels.direct import Direct
from tangentlab.kernels.inputs import Inputs, count, joined, select, tensors
from tangentlab.kernels.replay import CannotReplay, Replay
from tangentlab.kernels.reproducible import called, coarsest, mixing, reproducible
from tangentlab.kernels.sites import Site
from tangentlab.randomness import generator

Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Path:
    """Through what a parameter acts: functions with a rule, or the modules at ``replayed``.

    Attributes:
        axis, interleaved: where the examples lie in the functions' outputs.
        entries: the shapes of its sites, an example's share of each.
        reason: why not through functions.
    """

    replayed: tuple[str, ...] = ()
    axis: int = 0
    interleaved: bool = False
    entries: tuple[object, ...] = ()
    reason: str = ""


Structure = Mapping[str, Path]

# The last structure found of each model; paths only, so that the model can be freed.
_known: WeakKeyDictionary[nn.Module, tuple[object, Structure]] = WeakKeyDictionary()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad by name, tied ones once.

    Raises:
        KernelError: there are none, or one is not real.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise KernelError("no parameter of the model requires grad: the kernel has nothing to be taken over")
    for name, p in found.items():
        if not p.is_floating_point():
            raise KernelError(f"parameter {name!r} is {p.dtype}; kernels are of real parameters")
    return found


class Changed(Exception):
    """A parameter acts on other examples in another way than on the two that were tested.

    Attributes:
        faults: the parameters by name, and what differs.
    """

    def __init__(self, faults: Mapping[str, str]) -> None:
        super().__init__(str(faults))
        self.faults = faults


def taped(model: nn.Module, structure: Structure, x: Inputs) -> Tape:
    """The model's forward on x, recorded where the structure says that parameters act.

    Raises:
        Changed: a parameter acts elsewhere than the structure says, or through other numbers of entries.
    """
    parameters = trained(model)
    tape = _recorded(model, parameters, structure, x)
    sites = _sites(model, parameters, structure, tape)
    faults = _faults(parameters, sites, tape)
    for name, path in structure.items():
        if name not in faults and tuple(site.entries(len(tape)) for site in sites[name]) != path.entries:
            faults[name] = "it acts on as many entries as the data say"
    if faults:
        raise Changed(faults)
    return tape


def _recorded(model: nn.Module, parameters: Parameters, structure: Structure, x: Inputs) -> Tape:
    direct = {
        id(parameters[name]): (parameters[name], path.axis, path.interleaved)
        for name, path in structure.items()
        if not path.replayed
    }
    modules = {model.get_submodule(at): at for path in structure.values() for at in path.replayed}
    return record(model, x, direct, modules)


def _sites(
    model: nn.Module, parameters: Parameters, structure: Structure, tape: Tape
) -> dict[str, list[Site]]:
    """Where each parameter acts."""
    return {
        name: [call for at in path.replayed for call in tape.calls[model.get_submodule(at)]]
        if path.replayed
        else list(tape.uses[id(parameters[name])])
        for name, path in structure.items()
    }


def _faults(parameters: Parameters, sites: Mapping[str, list[Site]], tape: Tape) -> dict[str, str]:
    """The parameters whose gradients cannot be had from their sites, and why."""
    faults: dict[str, str] = {}
    users = consumers(tape.output)
    inside = {site: site.inside() for site in tape.sites()}
    for name, own in sites.items():
        fault = next(filter(None, (site.fault(len(tape)) for site in own)), None)
        known = set().union(*(inside[site] for site in own))
        if fault is not None:
            faults[name] = f"a site {fault}"
        elif not users.get(get_gradient_edge(parameters[name]).node, set()) <= known:
            faults[name] = "it is used elsewhere" if own else "no function with a rule uses it"
    return faults


def blocks(model: nn.Module, structure: Structure) -> list[Block]:
    """The blocks that the kernel is summed from; parameters replayed with the same modules share one."""
    parameters = trained(model)
    found: list[Block] = []
    replayed: dict[tuple[str, ...], list[str]] = {}
    for name, path in structure.items():
        if path.replayed:
            replayed.setdefault(path.replayed, []).append(name)
        else:
            found.append(Direct(name, parameters[name]))
    for paths, names in replayed.items():
        modules = [model.get_submodule(path) for path in paths]
        replays = [Replay(m, [_local(m, parameters[name])[0] for name in names]) for m in modules]
        found.append(Replayed(names, sum(parameters[name].numel() for name in names), replays))
    return found


def _local(module: nn.Module, parameter: nn.Parameter) -> list[str]:
    """Every name that the parameter has inside the module."""
    return [name for name, p in module.named_parameters(remove_duplicate=False) if p is parameter]


def structure_of(model: nn.Module, signature: object, pair: Inputs, elements: float) -> Structure:
    """Through what each parameter that requires grad acts.

    Args:
        model: in evaluation mode.
        signature: :func:`signature_of` the model and its inputs, before any forward.
        pair: two examples, to be run.
        elements: how much of the gradients may be held at once.

    Raises:
        KernelError: the model draws random numbers, changes its parameters, mixes examples, or has a
            parameter for which no exact per-example gradient was found; names it.
    """
    if model not in _known or _known[model][0] != signature:
        _known[model] = (signature, _Check(model, pair, elements).settled(None, {}))
    return _known[model][1]


def promoted(model: nn.Module, pair: Inputs, elements: float, faults: Mapping[str, str]) -> None:
    """Take the parameters by their next way, for all kernels of the model from now on.

    Raises:
        KernelError: there is none.
    """
    signature, structure = _known[model]
    _known[model] = (signature, _Check(model, pair, elements).settled(structure, faults))


def forget(model: nn.Module) -> None:
    """Find the structure anew at the next call."""
    _known.pop(model, None)


def signature_of(model: nn.Module, x: Inputs) -> object:
    """What a structure depends on: parameters, modules with plain attributes and hooks, and examples."""
    modules = [
        (
            type(module),
            {k: v for k, v in vars(module).items() if _plain(v) and k != "training"},
            id(vars(module).get("forward")),
            [list(hooks) for k, hooks in vars(module).items() if k.endswith("_hooks") and hooks],
        )
        for module in model.modules()
    ]
    return (
        _holders(model),
        [(name, p.shape, p.dtype, p.device) for name, p in trained(model).items()],
        modules,
        [(place, t.shape[1:], t.dtype) for place, t in tensors(x).items()],
    )


def _plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return isinstance(value, bool | int | float | str | torch.dtype | None)


def _holders(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The paths of the modules that hold each trained parameter."""
    names = {id(p): name for name, p in trained(model).items()}
    holders: dict[str, tuple[str, ...]] = dict.fromkeys(names.values(), ())
    for path, module in model.named_modules():
        for p in dict.fromkeys(module._parameters.values()):
            if p is not None and id(p) in names:
                holders[names[id(p)]] += (path,)
    return holders


class _Check:
    """The two tests on a pair of examples, and what follows from a failure."""

    def __init__(self, model: nn.Module, pair: Inputs, elements: float) -> None:
        self._model, self._pair, self._elements = model, pair, elements
        self._parameters = trained(model)
        outputs = reproducible(model, pair)
        self._alone = [Alone(model, pair, i) for i in range(count(pair))]
        # Another one for each example, lest they be taken for one another.
        self._v = torch.randn(outputs.shape, generator=generator(0, "kernels.structure")).to(outputs)
        self._tolerance = self._measured(outputs)
        if not self._tolerance.outputs_agree(outputs, torch.cat([alone.output for alone in self._alone])):
            raise KernelError(
                f"{mixing(model, pair)} mixes examples: an output depends on the other examples in the "
                "batch, so that the kernel of single examples is undefined"
            )

    def settled(self, structure: Structure | None, faults: Mapping[str, str]) -> Structure:
        """The structure; with one that was settled before, ``faults`` are what was found against it since."""
        paths = self._first() if structure is None else dict(structure)
        wrong = dict(faults)
        while True:
            for name, reason in wrong.items():
                paths[name] = self._promoted(name, paths[name], reason)
            tape = _recorded(self._model, self._parameters, paths, self._pair)
            sites = _sites(self._model, self._parameters, paths, tape)
            wrong = _faults(self._parameters, sites, tape)
            wrong |= self._differing(paths, tape, set(wrong))
            if not wrong:
                break
        return {
            name: replace(path, entries=tuple(site.entries(len(tape)) for site in sites[name]))
            for name, path in paths.items()
        }

    def _measured(self, outputs: Tensor) -> _Tolerance:
        whole = [0.0] * len(self._alone)
        moved = [0.0] * len(self._alone)
        for names in grouped({name: p.numel() for name, p in self._parameters.items()}, self._elements):
            for i, gradients in enumerate(self._gradients(names)):
                for name, g in gradients.items():
                    if g is not None:
                        whole[i] += dot(g, g)
                        moved[i] += float((g * self._parameters[name].detach()).norm()) ** 2
        return _Tolerance(coarsest(self._model, outputs), math.sqrt(max(whole)), math.sqrt(max(moved)))

    def _gradients(self, names: Sequence[str]) -> list[dict[str, Tensor | None]]:
        """Of each example alone."""
        parameters = {name: self._parameters[name] for name in names}
        return [alone.gradients(parameters, v) for alone, v in zip(self._alone, self._v, strict=True)]

    def _first(self) -> dict[str, Path]:
        """All parameters through functions; the examples' axis is the one that grows with their number."""
        watched = {id(p): (p, 0, False) for p in self._parameters.values()}
        first = select(self._pair, slice(0, 1))
        one, two = (record(self._model, x, watched, []) for x in (first, joined(first, first)))
        structure = {}
        for name, p in self._parameters.items():
            sites = list(zip(one.uses[id(p)], two.uses[id(p)], strict=False))
            axes = {_grown(a.shape, b.shape) for a, b in sites if a.shape is not None and b.shape is not None}
            structure[name] = Path(axis=axes.pop() if len(axes) == 1 else 0)
        return structure

    def _differing(self, structure: Structure, tape: Tape, known: set[str]) -> dict[str, str]:
        """The parameters whose gradients are not those of the examples alone."""
        wrong: dict[str, str] = {}
        for site in tape.sites():
            if site.fault(len(tape)) is not None:
                site.edge = None
        tape.pull(self._v[None])
        sizes = {
            block: sum(self._parameters[name].numel() for name in block.names)
            for block in blocks(self._model, structure)
            if not known & set(block.names)
        }
        for group in grouped(sizes, self._elements):
            expected = self._gradients([name for block in group for name in block.names])
            for block in group:
                wrong |= self._disagreeing(block, tape, expected)
        return wrong

    def _disagreeing(
        self, block: Block, tape: Tape, expected: list[dict[str, Tensor | None]]
    ) -> dict[str, str]:
        wrong: dict[str, str] = {}
        try:
            G = block.gradient(tape, tape.output.dtype)
        except CannotReplay as fault:
            return dict.fromkeys(block.names, f"its module {fault}")
        sizes = [self._parameters[name].numel() for name in block.names]
        for i, gradients in enumerate(expected):
            shares = [None] * len(sizes) if G is None else G[i, 0].split(sizes)
            for name, share in zip(block.names, shares, strict=True):
                if not self._tolerance.agree(share, gradients[name]):
                    wrong[name] = "its gradients differ from those of each example alone"
        return wrong

    def _promoted(self, name: str, path: Path, reason: str) -> Path:
        """The next way of taking a parameter."""
        if not path.replayed and not path.interleaved and path.axis == 0:
            return replace(path, interleaved=True)  # as attention lays its tokens out; harmless where untrue
        scripted = [at for at, module in self._model.named_modules() if isinstance(module, ScriptModule)]
        paths = (_enclosing(path.replayed),) if path.replayed else _holders(self._model)[name]
        while set(paths) & set(scripted) and paths != ("",):
            paths = (_enclosing(paths),)  # a scripted module takes no hooks
        if path.replayed == ("",) or "" in scripted:
            raise KernelError(
                f"parameter {name!r}: no exact per-example gradient, not even by running "
                f"the whole model on each example ({reason})"
            )
        return Path(paths, reason=path.reason or reason)


def _grown(one: Sequence[int], two: Sequence[int]) -> int:
    """The first dimension in which two shapes differ, 0 if none does."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)


def refused(model: nn.Module) -> str | None:
    """Why the model has no kernel, as its modules show."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            return (
                f"{called(path)} ({type(module).__name__}) has max_norm={module.max_norm}: "
                "it changes its weight in its forward, so that the outputs have no gradient"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
            return (
                f"{called(path)} ({type(module).__name__}) has scale_grad_by_freq=True: "
                "its gradients depend on the other tokens in the batch and are not those of a function"
            )
    return None


def _enclosing(paths: tuple[str, ...]) -> str:
    """The path of the innermost module around one path, or around all of several."""
    parts = [path.split(".") for path in paths]
    if len(parts) == 1:
        return ".".join(parts[0][:-1])
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in shared)


class _Tolerance:
    """How far two computations of one thing may lie apart.

    Half of the digits, √eps relative to the norm: rounding grows with depth, faults of structure are of order
    one. Where the thing itself cancels to nearly nothing, what is left is rounding, so a floor is added: for
    a parameter's gradient 64·eps of the ``whole`` gradient's norm, which the kernel would not show either;
    for the outputs 8·eps·‖g∘θ‖ (``moved``), what rounding the parameters does to them.
    """

    def __init__(self, eps: float, whole: float, moved: float) -> None:
        self._relative = math.sqrt(eps)
        self._gradient_floor, self._output_floor = 64 * eps * whole, 8 * eps * moved

    def agree(self, a: Tensor | None, b: Tensor | None) -> bool:
        """Whether two gradients agree; None is zero."""
        if a is None or b is None:
            return all(g is None or float(g.norm()) <= self._gradient_floor for g in (a, b))
        return _distance(a, b.flatten()) <= self._relative * float(b.norm()) + self._gradient_floor

    def outputs_agree(self, a: Tensor, b: Tensor) -> bool:
        return _distance(a, b) <= self._relative * float(b.norm()) + self._output_floor


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())
