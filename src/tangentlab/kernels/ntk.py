"""The empirical neural tangent kernel Θ(x, x') = J(x) J(x')ᵀ, exact and in bounded memory.

J is the Jacobian of the model's outputs with respect to its parameters (Jacot, Gabriel & Hongler 2018,
arXiv 1806.07572, eq. 4). It is never formed: the kernel is a sum over the layers of Grams of per-example
gradients, taken tile by tile (after Novak, Sohl-Dickstein & Schoenholz 2022, arXiv 2206.08720, who compare
the routes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError, KernelError, unknown_choice
from tangentlab.kernels.capture import Tape, record
from tangentlab.kernels.gram import chunks, mirrored
from tangentlab.kernels.memory import Plan, bytes_of, plan, watched
from tangentlab.kernels.ownership import owners
from tangentlab.kernels.reproducible import called
from tangentlab.kernels.rules import Block, blocks
from tangentlab.modes import batchnorm_modules, evaluation, preserved

KINDS = ("full", "class", "trace", "pseudo")
BATCHNORM = ("running",)


def ntk(
    model: nn.Module,
    x: Tensor,
    x2: Tensor | None = None,
    *,
    kind: str = "trace",
    batchnorm: str = "running",
    memory: int | str = "2GiB",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """The kernel Θ(x, x2) = J(x) J(x2)ᵀ of a model whose outputs are [n, C].

    Every example is taken on its own, in evaluation mode whatever the model's mode is. The parameters are
    those with ``requires_grad`` at the call, once each however often they are tied. The result is exact up to
    rounding for every module: modules without a rule of their own are run again, example by example, and the
    assumptions are tested on two examples the first time that a model is seen.

    Args:
        model: any module; it comes back as it was, submodule by submodule.
        x: [n, ...], floats or integers; moved to the model's device.
        x2: [m, ...], or None for x2 = x: then only half of the work is done, and Θ is symmetric bit for bit.
        kind: "full" [n, m, C, C], Θ_ijcd = ⟨∇f_c(x_i), ∇f_d(x2_j)⟩; "class" [C, n, m], its diagonal c = d,
            one kernel an output; "trace" [n, m], the mean of the class kernels; "pseudo" [n, m], the kernel
            of Σ_c f_c/√C.
        batchnorm: "running", BatchNorm normalizes with its running statistics.
        memory: bound on the growth of working memory, the result not counted: bytes, or "512MiB", "1.5GB".
            The first call for a model also tests its structure, which takes about two of its gradients.
        dtype: of the result and of the sums; by default that of the parameters.
        progress: show a progress bar on stderr.

    Returns:
        The kernel, without a graph, on the model's device.

    Raises:
        ConfigError: kind, batchnorm, memory, dtype, x or x2 out of range.
        ModelError: the model does not map x to a floating-point [n, C].
        KernelError: no parameter requires grad; a BatchNorm without running statistics; randomness that
            evaluation mode does not switch off; a model that mixes examples; a parameter without exact
            per-example gradients; too little memory (names the least that would do); a result that is
            not finite.

    Example:
        >>> model = nn.Linear(2, 3)  # Θ_ij = (x_i·x_j + 1)·I
        >>> ntk(model, torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor([[2., 2.],
                [2., 6.]])
    """
    if kind not in KINDS:
        raise ConfigError(unknown_choice("kind", kind, KINDS))
    if batchnorm not in BATCHNORM:
        raise ConfigError(unknown_choice("batchnorm", batchnorm, BATCHNORM))
    limit = bytes_of(memory)
    parameter = _first_parameter(model)
    dtype = parameter.dtype if dtype is None else dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r} is not a floating-point torch.dtype")
    _check_inputs(x, x2)
    _check_batchnorm(model)
    with _undisturbed(model, parameter.device):
        # A copy also of an inference tensor, which autograd could not save.
        x = x.detach().to(parameter.device, copy=True)
        x2 = None if x2 is None else x2.detach().to(parameter.device, copy=True)
        found = blocks(model, owners(model, x))
        with torch.no_grad():
            classes = record(model, [], x[:1]).output.shape[1]
        cotangents = _cotangents(kind, classes, parameter)
        result = x.new_zeros(
            classes if kind == "class" else 1,
            len(x),
            len(x if x2 is None else x2),
            *2 * cotangents.shape[1:2],
            dtype=dtype,
        )
        settled = plan(
            model,
            found,
            x,
            (len(x), None if x2 is None else len(x2)),
            cotangents.shape[1],
            len(cotangents),
            dtype,
            limit,
        )
        _fill(result, model, found, x, x2, cotangents, settled, progress)
    if kind == "trace":
        result /= classes
    bad = int((~result.isfinite()).sum())
    if bad:
        raise KernelError(f"{bad} of {result.numel()} entries of the kernel are not finite")
    if kind == "full":
        return result[0]
    return result[..., 0, 0] if kind == "class" else result[0, ..., 0, 0]


def _fill(
    result: Tensor,
    model: nn.Module,
    found: list[Block],
    x: Tensor,
    x2: Tensor | None,
    cotangents: Tensor,
    settled: Plan,
    progress: bool,
) -> None:
    """Add Σ_θ G_ir G_jsᵀ to result[k, i, j, r, s], for each of the sets of cotangents [sets, R, C].

    A set has the slot k of its own, or all share one. With x2 None the lower triangle of tiles is computed,
    and the upper copied.
    """

    def taped(part: slice, of: Tensor) -> Tape:
        tape = record(model, modules, of[part])
        for module, calls in tape.calls.items():
            for fault in filter(None, (call.fault(len(tape)) for call in calls)):
                raise KernelError(
                    f"a {type(module).__name__} of the model {fault}, "
                    "though it does not for the first examples"
                )
        return tape

    modules, tile = watched(found), settled.tile
    rights = [
        list(chunks(len(x2), tile)) if x2 is not None else list(chunks(part.stop, tile))
        for part in chunks(len(x), tile)
    ]
    with torch.no_grad(), _bar(progress, sum(map(len, rights)) * len(cotangents)) as advance:
        for left_part, parts in zip(chunks(len(x), tile), rights, strict=True):
            left = taped(left_part, x)
            for part in parts:
                itself = x2 is None and part == left_part
                right = None if itself else taped(part, x if x2 is None else x2)
                cache: dict[object, Tensor] = {}
                for k, v in enumerate(cotangents):
                    for tape in (left, right):
                        if tape is not None:
                            tape.pull(v)
                    K = _summed(found, left, right, result.dtype, settled.space, cache)
                    if K is not None:
                        K = (mirrored(K) if itself else K).permute(0, 2, 1, 3)
                        slot = result[k % len(result)]
                        slot[left_part, part] += K
                        if x2 is None and not itself:
                            slot[part, left_part] += K.permute(1, 0, 3, 2)
                    advance()
                # Freed before the next forward: two tiles live at once, never three.
                del right, tape, cache
            del left


def _summed(
    found: list[Block],
    left: Tape,
    right: Tape | None,
    dtype: torch.dtype,
    space: float,
    cache: dict[object, Tensor],
) -> Tensor | None:
    """The kernel of two tiles: the parameters' shares added up, None if there are none."""
    K: Tensor | None = None
    for block in found:
        share = block.gram(left, right, dtype, space, cache)
        if share is not None:
            K = share if K is None else K.add_(share)
    return K


def _cotangents(kind: str, classes: int, like: Tensor) -> Tensor:
    """What the outputs are contracted with, in sets taken at once, [sets, R, C]."""
    unit = torch.eye(classes, dtype=like.dtype, device=like.device)
    if kind == "full":
        return unit[None]
    return unit[:, None] if kind in ("class", "trace") else unit.sum(0)[None, None] / classes**0.5


def _first_parameter(model: nn.Module) -> nn.Parameter:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise KernelError("no parameter of the model requires grad: the kernel has nothing to be taken over")
    for name, p in trained:
        if not p.is_floating_point():
            raise KernelError(f"parameter {name!r} is {p.dtype}; kernels are of real parameters")
    return trained[0][1]


def _check_inputs(x: Tensor, x2: Tensor | None) -> None:
    for name, value in (("x", x), ("x2", x2)):
        if value is None and name == "x2":
            continue
        if not isinstance(value, Tensor):
            raise ConfigError(f"{name} is a {type(value).__name__}; give a tensor of examples [n, ...]")
        if value.dim() == 0 or len(value) == 0:
            raise ConfigError(f"{name} has shape {list(value.shape)}; give at least one example, [n, ...]")
    if x2 is not None and (x2.shape[1:] != x.shape[1:] or x2.dtype != x.dtype):
        raise ConfigError(
            f"x2 holds examples of shape {list(x2.shape[1:])} and {x2.dtype}, x of "
            f"{list(x.shape[1:])} and {x.dtype}; they must be alike"
        )


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
