"""A site: a place in a recorded forward where parameters act, and the cotangents that arrive there.

The kernel is a sum over parameters, and a parameter's gradient is a local matter: it needs the inputs of the
function that the parameter enters and the gradients at that function's output (the cotangents), nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten


class Site:
    """One call of a function or module.

    Attributes:
        inputs: the tensors among its arguments that are not parameters, detached, not copied.
        shape: of the output, None if the output is not one tensor.
        edge: the output's place in the autograd graph, None if no gradient can reach it. The edge, not the
            tensor: after ``ReLU(inplace=True)`` the tensor stands for the ReLU's output, the edge still for
            the site's.
        axis: the dimension of inputs and output that holds the examples; n·k long if each example has k
            entries there, one example after the other, or with ``interleaved`` one entry after the other.
        delta: the gradients of the model's outputs at the output, [n, R, k, ...], R cotangents an example;
            None if the outputs do not depend on it.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        given = list(inputs)
        self._sources = {get_gradient_edge(tensor).node for tensor in given if tensor.requires_grad}
        self.inputs = [tensor.detach() for tensor in given]
        self._versions = [tensor._version for tensor in self.inputs]
        self.shape: torch.Size | None = None
        self.edge: GradientEdge | None = None
        self.axis = 0
        self.interleaved = False
        self.delta: Tensor | None = None
        self._returned = "nothing"

    def returned(self, output: object) -> None:
        """Note what the call returned."""
        self._returned = type(output).__name__
        if isinstance(output, Tensor):
            self.shape = output.shape
            if output.requires_grad:
                self.edge = get_gradient_edge(output)

    def fault(self, n: int) -> str | None:
        """Why the gradients of n single examples cannot be had from here, or None."""
        if self.shape is None:
            return f"returns a {self._returned}, not one tensor"
        if [tensor._version for tensor in self.inputs] != self._versions:
            return "has an input that is changed in place after the call"
        shapes = [self.shape, *(tensor.shape for tensor in self.inputs)]
        if any(len(shape) <= self.axis or shape[self.axis] % n for shape in shapes):
            return "takes or returns something without a dimension for the examples"
        return None

    def entries(self, n: int) -> object:
        """The shapes here with an example's own share of the examples' dimension: the same for every n."""

        def share(shape: torch.Size) -> tuple[int, ...]:
            return (*shape[: self.axis], shape[self.axis] // n, *shape[self.axis + 1 :])

        return tuple(
            map(share, [*([] if self.shape is None else [self.shape]), *(t.shape for t in self.inputs)])
        )

    def front(self, tensor: Tensor, n: int) -> Tensor:
        """The examples first: [n, k, ...]."""
        moved: Tensor = tensor.movedim(self.axis, 0).unflatten(0, (-1, n) if self.interleaved else (n, -1))
        return moved.transpose(0, 1) if self.interleaved else moved

    def forget(self) -> None:
        """Let the inputs go: their values are not needed."""
        self.inputs, self._versions = [], []

    def inside(self) -> set[Node]:
        """The nodes of the autograd graph between the output and the inputs."""
        stack = [self.edge.node] if self.edge is not None else []
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node not in seen and node not in self._sources:
                seen.add(node)
                stack += [source for source, _ in node.next_functions if source is not None]
        return seen


class Call(Site):
    """A call of a module, which can be made again on other tensors."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._spec = tree_flatten((args, kwargs))
        super().__init__(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self._leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def arguments(self, inputs: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with ``inputs`` in the places of its tensors."""
        given = iter(inputs)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def fault(self, n: int) -> str | None:
        """As for every site; a replay needs each example's entries whole and first."""
        shapes = [] if self.shape is None else [self.shape, *(tensor.shape for tensor in self.inputs)]
        if len(shapes) == 1 or any(shape[:1] != (n,) for shape in shapes):
            return "takes or returns something whose first dimension is not the examples'"
        return super().fault(n)


def dense(gradient: Tensor) -> Tensor:
    """A gradient as autograd gives it, without a sparse layout."""
    return gradient.to_dense() if gradient.is_sparse else gradient
