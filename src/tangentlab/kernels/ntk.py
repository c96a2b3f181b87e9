"""The empirical neural tangent kernel Θ(x, x') = J(x) J(x')ᵀ, exact and in bounded memory.

J is the Jacobian of the model's outputs with respect to its parameters (Jacot, Gabriel & Hongler 2018,
arXiv 1806.07572, eq. 4). It is never formed: the kernel is a sum over the parameters of Grams of per-example
gradients, taken tile by tile (after Novak, Sohl-Dickstein & Schoenholz 2022, arXiv 2206.08720, who compare
the routes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError, KernelError, unknown_choice
from tangentlab.kernels import inputs
from tangentlab.kernels.batch import BatchPlan, batch_ntk, batch_plan
from tangentlab.kernels.blocks import Block, Tile, in_turn
from tangentlab.kernels.costs import measured as measured_costs
from tangentlab.kernels.costs import table
from tangentlab.kernels.inputs import Inputs, count, joined, mapped, select
from tangentlab.kernels.memory import bytes_of
from tangentlab.kernels.planning import Plan, settle
from tangentlab.kernels.products import PRODUCTS, mirrored, precision
from tangentlab.kernels.reproducible import called
from tangentlab.kernels.structure import Changed, Structure, blocks, promoted, structure_of, taped, trained
from tangentlab.kernels.verification import verify
from tangentlab.modes import batchnorm_modules, evaluation, preserved

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
    parameter, dtype, limit = _checked(model, x, x2, kind, batchnorm, memory, dtype, products)
    with _undisturbed(model, parameter.device):
        x, x2 = _moved(x, x2, parameter.device)
        if batchnorm != "running":
            if plan is not None or products is not None:
                raise ConfigError("plan and products are for batchnorm='running'")
            mixed = batchnorm != "batch"
            settled = batch_plan(model, x, x2, kind=kind, mixed=mixed, limit=limit, dtype=dtype)
            with _bar(progress, settled.backwards) as advance:
                result = batch_ntk(
                    model,
                    x,
                    x2,
                    kind=kind,
                    mixed=mixed,
                    limit=limit,
                    dtype=dtype,
                    advance=advance,
                    plan=settled,
                )
        else:
            made = count(x), None if x2 is None else count(x2), kind, dtype, products
            if plan is not None and (plan.n, plan.m, plan.kind, plan.dtype, plan.products) != made:
                raise ConfigError(f"plan was made for another kernel: {str(plan).splitlines()[0]}")
            while True:
                try:
                    result = _running(model, x, x2, made, limit, plan, check=check, progress=progress)
                    break
                except Changed as change:
                    promoted(model, x, change.faults)
                    limit, plan = limit if plan is None else plan.limit, None
    bad = int((~result.isfinite()).sum())
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
    parameter, dtype, limit = _checked(model, x, x2, kind, batchnorm, memory, dtype, products)
    with _undisturbed(model, parameter.device):
        x, x2 = _moved(x, x2, parameter.device)
        if batchnorm != "running":
            return batch_plan(model, x, x2, kind=kind, mixed=batchnorm != "batch", limit=limit, dtype=dtype)
        return _settled(
            model,
            structure_of(model, x),
            x,
            x2,
            kind,
            _classes(model, x),
            dtype,
            products,
            limit,
            measured=measured,
        )


def _checked(
    model: nn.Module,
    x: Inputs,
    x2: Inputs | None,
    kind: str,
    batchnorm: str | tuple[str, str],
    memory: int | str,
    dtype: torch.dtype | None,
    products: str | None,
) -> tuple[nn.Parameter, torch.dtype, int]:
    """The first trained parameter, the dtype of the sums and the bytes allowed, all arguments in range."""
    if kind not in KINDS:
        raise ConfigError(unknown_choice("kind", kind, KINDS))
    if batchnorm not in BATCHNORM:
        raise ConfigError(
            f"batchnorm {batchnorm!r} is unknown; choose from {', '.join(map(repr, BATCHNORM))}"
        )
    if products is not None and products not in PRODUCTS:
        raise ConfigError(unknown_choice("products", products, PRODUCTS))
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
        _check_batchnorm(model)
    return parameter, dtype, limit


def _moved(x: Inputs, x2: Inputs | None, device: torch.device) -> tuple[Inputs, Inputs | None]:
    # A copy also of an inference tensor, which autograd could not save.
    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=True)

    return mapped(x, moved), None if x2 is None else mapped(x2, moved)


def _classes(model: nn.Module, x: Inputs) -> int:
    with torch.no_grad():
        return inputs.outputs(model, select(x, slice(0, 1))).shape[1]


def _running(
    model: nn.Module,
    x: Inputs,
    x2: Inputs | None,
    made: tuple[int, int | None, str, torch.dtype, str | None],
    limit: int,
    plan: Plan | None,
    *,
    check: bool,
    progress: bool,
) -> Tensor:
    """The kernel with running statistics.

    Raises:
        Changed: a parameter acts otherwise on these examples than on the first ones.
    """
    _, _, kind, dtype, products = made
    structure, classes = structure_of(model, x), _classes(model, x)
    if plan is None:
        plan = _settled(model, structure, x, x2, kind, classes, dtype, products, limit, measured=False)
    found = _routed(model, structure, plan)
    cotangents = _cotangents(kind, classes, next(iter(trained(model).values())))
    factors = torch.bfloat16 if products == "bf16" else dtype
    if check:
        verify(model, structure, found, x, cotangents.shape[1], dtype, factors, plan.space)
    return _filled(model, structure, found, x, x2, kind, cotangents, plan, progress)


def _settled(
    model: nn.Module,
    structure: Structure,
    x: Inputs,
    x2: Inputs | None,
    kind: str,
    classes: int,
    dtype: torch.dtype,
    products: str | None,
    limit: int,
    *,
    measured: bool,
) -> Plan:
    parameter = next(iter(trained(model).values()))
    rows = _cotangents(kind, classes, parameter)
    costs = (measured_costs if measured else table)(parameter.device)
    sizes = count(x), None if x2 is None else count(x2)
    return settle(model, structure, x, sizes, kind, (len(rows), rows.shape[1]), dtype, products, limit, costs)


def _routed(model: nn.Module, structure: Structure, plan: Plan) -> list[Block]:
    """The blocks that the plan has a route for, set to it; the others act nowhere."""
    routes = {layer.names: layer.route for layer in plan.layers}
    found = []
    for block in blocks(model, structure):
        if tuple(block.names) in routes:
            block.route = routes[tuple(block.names)]
            found.append(block)
    return found


def _filled(
    model: nn.Module,
    structure: Structure,
    found: list[Block],
    x: Inputs,
    x2: Inputs | None,
    kind: str,
    cotangents: Tensor,
    plan: Plan,
    progress: bool,
) -> Tensor:
    """Σ_θ G_ir G_jsᵀ for each of the sets of cotangents [sets, R, C], in the shape of the kind."""
    sets, rows, classes = cotangents.shape
    result = cotangents.new_zeros(
        classes if kind == "class" else 1, plan.n, plan.m or plan.n, rows, rows, dtype=plan.dtype
    )
    factors = torch.bfloat16 if plan.products == "bf16" else plan.dtype
    other = x if x2 is None else x2
    with torch.no_grad(), _bar(progress, len(plan.passes) * sets) as advance:
        for left, right in plan.passes:
            examples = select(x, left) if right is None else joined(select(x, left), select(other, right))
            tape = taped(model, structure, examples)
            split = None if right is None else left.stop - left.start
            tile = Tile(tape, split, plan.dtype, factors, plan.space)
            for k, v in enumerate(cotangents):
                K = _summed(found, tile, v, plan.products)
                advance()
                if K is None:
                    continue
                K = (mirrored(K) if split is None else K).permute(0, 2, 1, 3)
                slot = result[k % len(result)]
                slot[left, left if right is None else right] += K
                if x2 is None and right is not None:
                    slot[right, left] += K.permute(1, 0, 3, 2)
            del tape, tile  # before the next forward
    if kind == "trace":
        result /= classes
    if kind == "full":
        return result[0]
    return result[..., 0, 0] if kind == "class" else result[0, ..., 0, 0]


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


def _cotangents(kind: str, classes: int, like: Tensor) -> Tensor:
    """What the outputs are contracted with, in sets taken at once, [sets, R, C]."""
    unit = torch.eye(classes, dtype=like.dtype, device=like.device)
    if kind == "full":
        return unit[None]
    return unit[:, None] if kind in ("class", "trace") else unit.sum(0)[None, None] / classes**0.5


def _check_batchnorm(model: nn.Module) -> None:
    untracked = {module for module in batchnorm_modules(model) if module.running_mean is None}
    for path, module in model.named_modules():
        if module in untracked:
            raise KernelError(
                f"{called(path)} ({type(module).__name__}) has no running statistics, "
                "so that batchnorm='running' is undefined"
            )


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode with gradients, whatever the caller is inside; all as it was at the end.

    Also what modules store on themselves in their forward: a replay would leave dead tensors there.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(cuda),
        preserved(model),
        evaluation(model),
        precision(),
    ):
        try:
            yield
        finally:
            for module, stored in attributes:
                vars(module).clear()
                vars(module).update(stored)


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
