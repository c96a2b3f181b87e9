"""One forward of a tile of examples, recorded: what entered and left the watched modules.

The kernel is a sum over parameters, and a parameter's gradient is a local matter: it needs the inputs of
its module's calls and the gradients at their outputs (the cotangents), nothing else. One forward records
the former; one backward per output of the model gives the latter for every module at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tangentlab.errors import ModelError


class Call:
    """One call of a module: its inputs, where its output stands in the graph, and the cotangents there.

    Attributes:
        inputs: the tensors among the arguments, detached, not copied.
        sources: the nodes of the autograd graph that made the inputs.
        shape: the output's shape, None if the output is not one tensor.
        edge: the output's place in the autograd graph, None if no gradient can reach it. The edge, not the
            tensor: after ``ReLU(inplace=True)`` the tensor stands for the ReLU's output, the edge still for
            the module's.
        delta: the gradients of the model's outputs at this output, [n, R, ...], R cotangents an example;
            None if the outputs do not depend on it.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._spec = tree_flatten((args, kwargs))
        self.sources = {
            get_gradient_edge(leaf).node for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad
        }
        self._leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.inputs = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self._versions = [tensor._version for tensor in self.inputs]
        self.shape: torch.Size | None = None
        self.edge: GradientEdge | None = None
        self.delta: Tensor | None = None
        self._returned = "nothing"

    def returned(self, output: object) -> None:
        self._returned = type(output).__name__
        if isinstance(output, Tensor):
            self.shape = output.shape
            if output.requires_grad:
                self.edge = get_gradient_edge(output)

    def arguments(self, inputs: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with ``inputs`` in the places of its tensors."""
        given = iter(inputs)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def fault(self, n: int) -> str | None:
        """Why the per-example gradients cannot be had from this call, or None."""
        if self.shape is None:
            return f"returns a {self._returned}, not one tensor"
        if [tensor._version for tensor in self.inputs] != self._versions:
            return "has an input that is changed in place after the call"
        shapes = [self.shape, *(tensor.shape for tensor in self.inputs)]
        if len(shapes) == 1 or any(shape[:1] != (n,) for shape in shapes):
            return "takes or returns something whose first dimension is not the examples'"
        return None


class Tape:
    """The recorded forward of n examples: the model's output [n, C] with its graph, and the calls.

    Attributes:
        footprint: elements of the graph an example, where the planner has measured it.
    """

    def __init__(self, output: Tensor, calls: dict[nn.Module, list[Call]]) -> None:
        self.output = output
        self.calls = calls
        self.footprint = 0

    def __len__(self) -> int:
        return self.output.shape[0]

    def live(self, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Call, Tensor]]:
        """The modules' calls that the outputs depend on, with their cotangents."""
        return [
            (module, call, call.delta)
            for module in modules
            for call in self.calls[module]
            if call.delta is not None
        ]

    def pull(self, cotangents: Tensor) -> None:
        """Set every call's ``delta`` to the gradients of ``output @ cotangents[r]``, r = 0 … R − 1.

        In evaluation mode examples do not meet, so one backward of the sum over the examples gives each
        example's own gradient.
        """
        calls = [call for listed in self.calls.values() for call in listed if call.edge is not None]
        for call in calls:
            call.delta = None
        if not calls or not self.output.requires_grad:
            return
        edges = [call.edge for call in calls if call.edge is not None]
        for r, cotangent in enumerate(cotangents):
            gradients = torch.autograd.grad(
                [self.output], edges, [cotangent.expand_as(self.output)], retain_graph=True, allow_unused=True
            )
            for call, gradient in zip(calls, gradients, strict=True):
                if gradient is None:
                    continue
                if len(cotangents) == 1:
                    call.delta = gradient.unsqueeze(1)
                    continue
                if call.delta is None:
                    call.delta = gradient.new_empty(len(gradient), len(cotangents), *gradient.shape[1:])
                call.delta[:, r] = gradient


def record(model: nn.Module, modules: Iterable[nn.Module], x: Tensor) -> Tape:
    """Run ``model(x)`` in the mode that it is in and record the calls of ``modules``.

    Raises:
        ModelError: the output is not a floating-point tensor [n, C].
    """
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}
    open_calls: dict[nn.Module, list[Call]] = {module: [] for module in calls}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is model:  # nothing encloses it to be asked instead, should it change its input in place
            args, kwargs = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, (args, kwargs))
        open_calls[module].append(Call(args, kwargs))

    def leave(module: nn.Module, _args: Any, _kwargs: Any, output: object) -> None:
        call = open_calls[module].pop()
        call.returned(output)
        calls[module].append(call)

    # First before, last after: the hooks of others belong to the module's function, which replays run too.
    handles = [
        handle
        for module in calls
        for handle in (
            module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        )
    ]
    try:
        with torch.enable_grad():
            output = model(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns a {type(output).__name__}; a kernel needs a tensor [n, C]")
    if output.dim() != 2 or len(output) != len(x) or not output.is_floating_point():
        raise ModelError(
            f"the model maps {len(x)} examples to a {output.dtype} tensor of shape "
            f"{list(output.shape)}; a kernel needs floating-point outputs [{len(x)}, C]"
        )
    return Tape(output, calls)
