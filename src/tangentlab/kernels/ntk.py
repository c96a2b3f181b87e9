"""The empirical neural tangent kernel Θ(x, x') = J(x) J(x')ᵀ, exact and in bounded memory.

J is the Jacobian of the model's outputs with respect to its parameters (Jacot, Gabriel & Hongler 2018,
arXiv 1806.07572, eq. 4). It is never formed: the kernel is a sum over the parameters of Grams of per-example
gradients, taken tile by tile (after Novak, Sohl-Dickstein & Schoenholz 2022, arXiv 2206.08720, who compare
the routes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError, KernelError, unknown_choice
from tangentlab.kernels import inputs
from tangentlab.kernels.alone import pair
from tangentlab.kernels.batch import BatchPlan, batch_ntk, batch_plan
from tangentlab.kernels.blocks import Block, Tile, in_turn
from tangentlab.kernels.costs import Costs, table
from tangentlab.kernels.costs import measured as measured_costs
from tangentlab.kernels.inputs import Inputs, count, joined, moved, select
from tangentlab.kernels.memory import bytes_of
from tangentlab.kernels.planning import Plan, settle
from tangentlab.kernels.products import PRODUCTS, mirrored, precision
from tangentlab.kernels.reproducible import made, require_statistics
from tangentlab.kernels.structure import (
    Changed,
    Structure,
    blocks,
    forget,
    promoted,
    refused,
    signature_of,
    structure_of,
    taped,
    trained,
)
from tangentlab.kernels.undisturbed import undisturbed
from tangentlab.kernels.verification import Disproved, Verifier
from tangentlab.randomness import generator

_Result = TypeVar("_Result")

# The structure of a model and the plans made for it.
_planned: WeakKeyDictionary[nn.Module, tuple[Structure, dict[object, Plan]]] = WeakKeyDictionary()
_MOST_PLANS = 16

KINDS = ("full", "class", "trace", "pseudo")
BATCHNORM = ("running", "batch", ("running", "batch"))


def ntk(
    model: nn.Module,
    x: Inputs,
    x2: Inputs | None = None,
    *,
    kind: str = "trace",
    batchnorm: str | tuple[str, str] = "running",
    memory: int | str = "2GiB",
    dtype: torch.dtype | None = None,
    products: str | None = None,
    plan: Plan | None = None,
    check: bool = True,
    progress: bool = False,
) -> Tensor:
    """The kernel Θ(x, x2) = J(x) J(x2)ᵀ of a model whose outputs are [n, C].

    Everything runs in evaluation mode whatever the model's mode is; BatchNorm as ``batchnorm`` says. The
    parameters are those with ``requires_grad`` at the call, once each however often they are tied. The result
    is exact up to rounding for every module: functions without a rule of their own are run again, example by
    example, and the assumptions are tested on two examples the first time that a model is seen.

    Args:
        model: any module; it comes back as it was, submodule by submodule.
        x: [n, ...], floats or integers, or a tuple (positional arguments) or dict (keyword arguments) of such
            tensors; moved to the model's device.
        x2: [m, ...], or None for x2 = x: then only half of the work is done, and Θ is symmetric bit for bit.
        kind: "full" [n, m, C, C], Θ_ijcd = ⟨∇f_c(x_i), ∇f_d(x2_j)⟩; "class" [C, n, m], its diagonal c = d,
            one kernel an output; "trace" [n, m], the mean of the class kernels; "pseudo" [n, m], the kernel
            of Σ_c f_c/√C.
        batchnorm: "running", BatchNorm normalizes with its running statistics, and every example is taken on
            its own; "batch", with those of the whole x (and of the whole x2), derivative through them;
            ("running", "batch"), the mixed kernel J_running(x) J_batch(x2)ᵀ, which is not symmetric.
        memory: bound on the growth of working memory, the result not counted: bytes, or "512MiB", "1.5GB".
        dtype: of the result and of the sums; by default that of the parameters.
        products: None, or "tf32" (GPUs) or "bf16": the factors of the Gram part are rounded to that, its sums
            are float32. Relative errors of about 1e-4 and 2e-3; the network itself is not rounded.
        plan: what :func:`tangentlab.kernels.plan` returned for these arguments; it overrides ``memory``.
        check: compare the routes taken with an independent path, once a model (see verification.py).
        progress: show a progress bar on stderr.

    Returns:
        The kernel, without a graph, on the model's device.

    Raises:
        ConfigError: an argument out of range, or a plan made for others.
        ModelError: the model does not map x to a floating-point [n, C].
        KernelError: no parameter requires grad; a BatchNorm without running statistics; randomness that
            evaluation mode does not switch off; a model that mixes examples; a parameter without exact
            per-example gradients; too little memory (names the least that would do); a result that is
            not finite; a failed self-check.

    Example:
        >>> model = nn.Linear(2, 3)  # Θ_ij = (x_i·x_j + 1)·I
        >>> ntk(model, torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor([[2., 2.],
                [2., 6.]])
    """
    parameter, dtype, limit = checked(model, x, x2, kind, batchnorm, memory, dtype, products)
    if plan is not None and not isinstance(plan, Plan):
        raise ConfigError(
            f"plan is a {type(plan).__name__}; give what kernels.plan returned for batchnorm='running'"
        )
    with undisturbed(model, parameter.device):
        x, x2 = moved(x, parameter.device), None if x2 is None else moved(x2, parameter.device)
        if batchnorm != "running":
            if plan is not None or products is not None:
                raise ConfigError("plan and products are for batchnorm='running'")
            mixed = batchnorm != "batch"
            batched = batch_plan(model, x, x2, kind=kind, mixed=mixed, limit=limit, dtype=dtype)
            with _bar(progress, batched.backwards) as advance:
                result = batch_ntk(
                    model,
                    x,
                    x2,
                    kind=kind,
                    mixed=mixed,
                    limit=limit,
                    dtype=dtype,
                    advance=advance,
                    plan=batched,
                )
        else:
            request = Request(model, x, x2, kind, dtype, products, limit if plan is None else plan.limit)
            result = request.retried(lambda: request.kernel(plan, check=check, progress=progress))
    bad = _not_finite(result)
    if bad:
        raise KernelError(f"{bad} of {result.numel()} entries of the kernel are not finite")
    return result


def plan(
    model: nn.Module,
    x: Inputs,
    x2: Inputs | None = None,
    *,
    kind: str = "trace",
    batchnorm: str | tuple[str, str] = "running",
    memory: int | str = "2GiB",
    dtype: torch.dtype | None = None,
    products: str | None = None,
    measured: bool = False,
) -> Plan | BatchPlan:
    """How :func:`ntk` would compute the kernel: passes, tiles, every parameter's route, time and memory.

    Print it; or give it to ``ntk(..., plan=...)``. It is deterministic, by a table of costs for the class of
    the device, unless ``measured`` asks for costs measured on the device at hand: these are then part of it.

    Raises:
        As :func:`ntk`.
    """
    parameter, dtype, limit = checked(model, x, x2, kind, batchnorm, memory, dtype, products)
    with undisturbed(model, parameter.device):
        x, x2 = moved(x, parameter.device), None if x2 is None else moved(x2, parameter.device)
        if batchnorm != "running":
            return batch_plan(model, x, x2, kind=kind, mixed=batchnorm != "batch", limit=limit, dtype=dtype)
        request = Request(model, x, x2, kind, dtype, products, limit)
        costs = (measured_costs if measured else table)(parameter.device)
        return request.retried(lambda: request.plan(costs))


def checked(
    model: nn.Module,
    x: Inputs,
    x2: Inputs | None,
    kind: str,
    batchnorm: str | tuple[str, str],
    memory: int | str,
    dtype: torch.dtype | None,
    products: str | None,
) -> tuple[nn.Parameter, torch.dtype, int]:
    """The first trained parameter, the dtype of the sums and the bytes allowed, all arguments in range.

    Raises:
        ConfigError, KernelError: as :func:`ntk`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; give an nn.Module")
    if kind not in KINDS:
        raise ConfigError(unknown_choice("kind", kind, KINDS))
    if batchnorm not in BATCHNORM:
        raise ConfigError(
            f"batchnorm {batchnorm!r} is unknown; choose from {', '.join(map(repr, BATCHNORM))}"
        )
    if products is not None and products not in PRODUCTS:
        raise ConfigError(unknown_choice("products", products, PRODUCTS))
    made(model)
    limit = bytes_of(memory)
    parameter = next(iter(trained(model).values()))
    dtype = parameter.dtype if dtype is None else dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r} is not a floating-point torch.dtype")
    if products is not None and dtype != torch.float32:
        raise ConfigError(f"products={products!r} have float32 sums, not {dtype}")
    if products == "tf32" and parameter.device.type != "cuda":
        raise ConfigError("products='tf32' needs a GPU; on a CPU there is 'bf16'")
    inputs.check(x, x2)
    if batchnorm != "batch":
        require_statistics(model, "batchnorm='running'")
    reason = refused(model)
    if reason is not None:
        raise KernelError(reason)
    return parameter, dtype, limit


class Request:
    """One kernel with running statistics: the model in evaluation mode and what is asked of it."""

    def __init__(
        self,
        model: nn.Module,
        x: Inputs,
        x2: Inputs | None,
        kind: str,
        dtype: torch.dtype,
        products: str | None,
        limit: int,
    ) -> None:
        self.model, self._x, self._x2 = model, x, x2
        self._kind, self._dtype, self._products, self._limit = kind, dtype, products, limit
        self._pair = pair(x, x2)
        self._signature = signature_of(model, x)  # before a forward changes what the modules store
        # A few of the model's gradients within the bound; structures are tested by groups of parameters.
        self._elements = limit / 16 / dtype.itemsize

    def retried(self, work: Callable[[], _Result]) -> _Result:
        """The work, again as long as examples show that a parameter acts otherwise than it was thought to."""
        fresh = False
        while True:
            try:
                return work()
            except Changed as change:
                promoted(self.model, self._pair, self._elements, change.faults)
            except Disproved:
                # The structure may have been found on examples that show too little: once more, on these.
                if fresh:
                    raise
                forget(self.model)
                fresh = True

    def structure(self) -> Structure:
        """Through what the parameters act."""
        return structure_of(self.model, self._signature, self._pair, self._elements)

    @cached_property
    def _cotangents(self) -> Tensor:
        """[sets, R, C]; after the structure, which makes sure that a forward does no harm."""
        with torch.enable_grad():  # without it some modules take another path
            classes = inputs.outputs(self.model, select(self._x, slice(0, 1))).shape[1]
        p = next(iter(trained(self.model).values()))
        return inputs.cotangents(self._kind, classes, p.dtype, p.device)

    def plan(self, costs: Costs) -> Plan:
        """The plan by these costs; kept as long as the structure holds, for probes ask again and again."""
        structure = self.structure()
        held, plans = _planned.get(self.model, (None, {}))
        if held is not structure or len(plans) > _MOST_PLANS:
            plans = {}
            _planned[self.model] = (structure, plans)
        sizes = (count(self._x), None if self._x2 is None else count(self._x2))
        key = (sizes, self._kind, self._dtype, self._products, self._limit, costs)
        if key not in plans:
            plans[key] = settle(
                self.model,
                structure,
                self._x,
                sizes,
                self._kind,
                (len(self._cotangents), self._cotangents.shape[1]),
                self._dtype,
                self._products,
                self._limit,
                costs,
                self._signature,
            )
        return plans[key]

    def kernel(self, given: Plan | None, *, check: bool, progress: bool) -> Tensor:
        """The kernel by the plan, or by one of its own.

        Raises:
            ConfigError: the plan was made for another kernel.
            Changed: a parameter acts otherwise than it was thought to.
        """
        model, structure = self.model, self.structure()
        device = next(iter(trained(model).values())).device
        plan = self.plan(table(device)) if given is None else given
        asked = (count(self._x), None if self._x2 is None else count(self._x2), self._kind, self._dtype)
        if (plan.n, plan.m, plan.kind, plan.dtype) != asked or plan.products != self._products:
            raise ConfigError(f"plan was made for another kernel: {str(plan).splitlines()[0]}")
        found = self._routed(plan)
        factors = torch.bfloat16 if self._products == "bf16" else self._dtype
        verifier = None
        if check:
            routes = tuple((layer.names, layer.route) for layer in plan.layers)
            key = (self._kind, self._dtype, self._products, str(plan.passes), routes)
            verifier = Verifier(model, structure, key, factors, self._elements)
            if verifier.needed:
                tile = Tile(taped(model, structure, self._pair), None, self._dtype, factors, plan.space)
                verifier.blocks(found, self._pair, tile, self._cotangents.shape[1])
        result = self._filled(structure, found, plan, factors, verifier, progress=progress)
        if verifier is not None and verifier.needed and not _not_finite(result):
            verifier.entries(result, self._x, self._x if self._x2 is None else self._x2, self._kind)
            verifier.done()
        return result

    def _routed(self, plan: Plan) -> list[Block]:
        """The blocks that the plan has a route for, set to it; on the others no output depends."""
        routes = {layer.names: layer.route for layer in plan.layers}
        listed = {tuple(block.names): block for block in blocks(self.model, self.structure())}
        if plan.made_for != self._signature or set(listed) != set(routes) | set(plan.idle):
            raise ConfigError("plan was made for another model, or for other parameters of it; make it anew")
        for names, route in routes.items():
            listed[names].route = route
        return [listed[names] for names in routes]

    def _filled(
        self,
        structure: Structure,
        found: list[Block],
        plan: Plan,
        factors: torch.dtype,
        verifier: Verifier | None,
        *,
        progress: bool,
    ) -> Tensor:
        """Σ_θ G_ir G_jsᵀ for each of the sets of cotangents [sets, R, C], in the shape of the kind."""
        sets, rows, classes = self._cotangents.shape
        result = self._cotangents.new_zeros(
            classes if plan.kind == "class" else 1, plan.n, plan.m or plan.n, rows, rows, dtype=plan.dtype
        )
        x, other = self._x, self._x if self._x2 is None else self._x2
        g = generator(0, "kernels.drawn", plan.n)
        drawn = tuple(int(torch.randint(size, (), generator=g)) for size in (len(plan.passes), sets))
        with torch.no_grad(), _bar(progress, len(plan.passes) * sets) as advance:
            for number, (left, right) in enumerate(plan.passes):
                examples = select(x, left) if right is None else joined(select(x, left), select(other, right))
                tape = taped(self.model, structure, examples)
                tape.footprint = plan.footprint
                split = None if right is None else left.stop - left.start
                tile = Tile(tape, split, plan.dtype, factors, plan.space)
                if verifier is not None:
                    verifier.outputs(tile, examples)
                for k, v in enumerate(self._cotangents):
                    K = _summed(found, tile, v, plan.products)
                    if verifier is not None and drawn == (number, k):
                        verifier.entry(K, examples, split, v)
                    advance()
                    if K is None:
                        continue
                    K = (mirrored(K) if split is None else K).permute(0, 2, 1, 3)
                    slot = result[k % len(result)]
                    slot[left, left if right is None else right] += K
                    if self._x2 is None and right is not None:
                        slot[right, left] += K.permute(1, 0, 3, 2)
                del tape, tile  # before the next forward
        if plan.kind == "trace":
            result /= classes
        if plan.kind == "full":
            return result[0]
        return result[..., 0, 0] if plan.kind == "class" else result[0, ..., 0, 0]


def _not_finite(K: Tensor) -> int:
    """Entries that are not finite, counted in slices: the result may be far larger than the room for work."""
    return sum(int((~part.isfinite()).sum()) for part in K.view(-1).split(2**20))


def _summed(found: list[Block], tile: Tile, cotangents: Tensor, products: str | None) -> Tensor | None:
    """The kernel of a tile, the blocks' shares added up as their cotangents arrive; None without any."""
    total: list[Tensor] = []

    def add(block: Block) -> None:
        with precision("tf32") if products == "tf32" else nullcontext():
            share = block.gram(tile)
        if share is not None:
            total[:] = [total[0].add_(share) if total else share]

    in_turn(found, tile.tape, cotangents, add)
    return total[0] if total else None


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], None]]:
    """What to call after each of ``total`` steps."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("kernel", total=total)
        yield lambda: bar.advance(task)
