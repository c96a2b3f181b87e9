"""One forward of a tile of examples, recorded: the functions and modules through which parameters act.

One forward records what entered each site; one backward per output of the model brings the cotangents to
all of them, and each is dealt with as it arrives, so that the cotangents never live together.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from tangentlab.kernels.functions import RULES
from tangentlab.kernels.inputs import Inputs, outputs
from tangentlab.kernels.linear import linear
from tangentlab.kernels.sites import Call, Site
from tangentlab.kernels.uses import Use

# Attention is one function to a function mode; this is its body, whose projections the mode then sees.
_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F) | {"has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class Tape:
    """The recorded forward of n examples: the model's output [n, C] with its graph, and the sites.

    Attributes:
        uses: the calls of functions with a rule, by the identity of the parameter.
        calls: the calls of the watched modules.
        footprint: elements of the graph an example, where the planner has measured it.
    """

    def __init__(
        self, output: Tensor, uses: dict[int, list[Use]], calls: dict[nn.Module, list[Call]]
    ) -> None:
        self.output = output
        self.uses = uses
        self.calls = calls
        self.footprint = 0

    def __len__(self) -> int:
        return self.output.shape[0]

    def sites(self) -> list[Site]:
        """All sites, each once."""
        return list(dict.fromkeys(s for found in (self.uses, self.calls) for g in found.values() for s in g))

    def pull(self, cotangents: Tensor, ready: Callable[[Site], None] | None = None) -> None:
        """Bring the gradients of ``(output * cotangents[r]).sum()``, r < R, to every site's ``delta``.

        In evaluation mode examples do not meet, so one backward of the sum over the examples gives each
        example's own gradient. ``cotangents`` is [R, C], or [R, n, C] for others at each example. With one
        cotangent ``ready`` is called during the backward, site by site, and may set ``delta`` to None again;
        sites that the outputs do not depend on keep None and are not announced.
        """
        sites = [site for site in self.sites() if site.edge is not None]
        for site in sites:
            site.delta = None
        if not sites or not self.output.requires_grad:
            return
        if len(cotangents) == 1:
            self._stream(sites, cotangents[0].expand_as(self.output), ready)
            return
        edges = [site.edge for site in sites if site.edge is not None]
        for r, cotangent in enumerate(cotangents):
            gradients = self._gradients(edges, cotangent.expand_as(self.output))
            for site, gradient in zip(sites, gradients, strict=True):
                if gradient is None:
                    continue
                gradient = site.front(gradient, len(self))
                if site.delta is None:
                    site.delta = gradient.new_empty(len(gradient), len(cotangents), *gradient.shape[1:])
                site.delta[:, r] = gradient
        if ready is not None:
            for site in sites:
                if site.delta is not None:
                    ready(site)

    def _stream(self, sites: list[Site], cotangent: Tensor, ready: Callable[[Site], None] | None) -> None:
        """One backward; nodes are met by hooks, and the last ones of every path are asked for by edge."""
        waiting: dict[Node, list[Site]] = {}
        for site in sites:
            assert site.edge is not None
            waiting.setdefault(site.edge.node, []).append(site)
        last = self._last(set(waiting))

        def arrived(site: Site, gradient: Tensor | None) -> None:
            if gradient is not None:
                site.delta = site.front(gradient, len(self)).unsqueeze(1)
                if ready is not None:
                    ready(site)

        def meet(met: list[Site]) -> Callable[[tuple[Tensor, ...]], None]:
            def hook(gradients: tuple[Tensor, ...]) -> None:
                for site in met:
                    assert site.edge is not None
                    arrived(site, gradients[site.edge.output_nr])

            return hook

        handles = [node.register_prehook(meet(met)) for node, met in waiting.items() if node not in last]
        ends = [site for node in last for site in waiting[node]]
        if not ends:
            return
        try:
            edges = [site.edge for site in ends if site.edge is not None]
            gradients = self._gradients(edges, cotangent)
        finally:
            for handle in handles:
                handle.remove()
        for site, gradient in zip(ends, gradients, strict=True):
            arrived(site, gradient)

    def _gradients(self, edges: list[GradientEdge], cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad([self.output], edges, [cotangent], retain_graph=True, allow_unused=True)

    def _last(self, nodes: set[Node]) -> list[Node]:
        """Those of the nodes that lead to no other of them."""
        leads: dict[Node, bool] = {}  # whether a node lies on the way to one of the nodes, or is one
        last = []
        stack = [(self.output.grad_fn, False)]
        while stack:
            node, left = stack.pop()
            if node is None or (node in leads and not left):
                continue
            if not left:
                leads[node] = False
                stack.append((node, True))
                stack += [(source, False) for source, _ in node.next_functions if source not in leads]
                continue
            below = any(leads[source] for source, _ in node.next_functions if source is not None)
            leads[node] = below or node in nodes
            if node in nodes and not below:
                last.append(node)
        return last


def consumers(output: Tensor) -> dict[Node, set[Node]]:
    """For every node of the output's graph, the nodes that pass a gradient to it."""
    found: dict[Node, set[Node]] = {}
    stack = [output.grad_fn] if output.grad_fn is not None else []
    seen = set(stack)
    while stack:
        node = stack.pop()
        for source, _ in node.next_functions:
            if source is not None:
                found.setdefault(source, set()).add(node)
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
    return found


class _Recorder(TorchFunctionMode):
    """Notes the calls of functions with a rule that watched parameters enter."""

    def __init__(self, watched: Mapping[int, tuple[nn.Parameter, int, bool]]) -> None:
        super().__init__()
        self._watched = {key: p for key, (p, _, _) in watched.items()}
        self._layouts = {key: (axis, interleaved) for key, (_, axis, interleaved) in watched.items()}
        self.uses: dict[int, list[Use]] = {key: [] for key in watched}

    def __torch_function__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        rule = RULES.get(function)
        use = None
        if rule is not None and not any(map(_transformed, (*args, *kwargs.values()))):
            use = rule(self._watched, args, kwargs)
        output = (linear if function is F.linear and use is not None else function)(*args, **kwargs)
        if use is not None:
            use.returned(output)
            for p in use.roles.values():
                use.axis, use.interleaved = self._layouts[id(p)]
                self.uses[id(p)].append(use)
        return output


def _transformed(argument: object) -> bool:
    """Whether it is a tensor inside one of torch.func's transforms, or a nested one: no rule reads those."""
    return isinstance(argument, Tensor) and (
        argument.is_nested or torch._C._functorch.is_functorch_wrapped_tensor(argument)
    )


def record(
    model: nn.Module,
    x: Inputs,
    parameters: Mapping[int, tuple[nn.Parameter, int, bool]],
    modules: Iterable[nn.Module],
) -> Tape:
    """Run the model on x in the mode that it is in and record the sites.

    Args:
        parameters: by identity, those whose uses by functions are wanted, and where the examples lie there:
            their axis, and whether they are interleaved.
        modules: those whose calls are wanted.

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
    recorder = _Recorder(parameters)
    try:
        with torch.enable_grad(), recorder:
            output = outputs(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return Tape(output, recorder.uses, calls)
