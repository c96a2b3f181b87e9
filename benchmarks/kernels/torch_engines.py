"""The engines that run on torch, each as its users would write it: (model, x, case) -> kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from cases import Case, read
from gram_rate import gram_rate
from measure import Array, Spec, worker
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

Engine = Callable[[nn.Module, Tensor, Case], Tensor]


def ours(model: nn.Module, x: Tensor, case: Case, products: str | None = None) -> Tensor:
    """tangentlab.ntk."""
    import tangentlab as tl

    more: dict[str, Any] = {} if products is None else {"products": products}
    return tl.ntk(model, x, kind=case.kind, memory=case.memory, **more)


def torch_func(model: nn.Module, x: Tensor, case: Case) -> Tensor:
    """The Jacobian by vmap(jacrev), contracted parameter by parameter: PyTorch's own NTK tutorial."""
    parameters, f = _stateless(model)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention would be looped over under vmap
        J = vmap(jacrev(f), (None, 0))(parameters, x)
    return _contracted((j.flatten(2) for j in J.values()), case.kind)


def torch_func_by_class(model: nn.Module, x: Tensor, case: Case) -> Tensor:
    """vmap(grad(f_c)), one class after the other: a C-th of the memory, a forward a class more."""
    if case.kind == "full":
        raise NotImplementedError("class by class gives no kernel between classes")
    parameters, f = _stateless(model)
    K = x.new_zeros(case.classes, len(x), len(x))
    with sdpa_kernel(SDPBackend.MATH):
        for c in range(case.classes):
            g = vmap(grad(lambda p, xi, c=c: f(p, xi)[c]), (None, 0))(parameters, x)
            for part in g.values():
                K[c] += part.flatten(1) @ part.flatten(1).T
    return K if case.kind == "class" else K.mean(0)


def nngeometry(model: nn.Module, x: Tensor, case: Case) -> Tensor:
    """GramMatrix, the only kernel it has: the full one."""
    gram = importlib.import_module("nngeometry.gram")
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=len(x))
    return _of_full(gram.GramMatrix(model, loader).to_torch().permute(1, 3, 0, 2), case.kind)


def backpack(model: nn.Module, x: Tensor, case: Case) -> Tensor:
    """BatchGrad in one backward a class; kernels within a class need one class's gradients at a time."""
    package = importlib.import_module("backpack")
    extensions = importlib.import_module("backpack.extensions")
    out = package.extend(model)(x)
    gradients: list[list[Tensor]] = []
    K = []
    for c in range(case.classes):
        with package.backpack(extensions.BatchGrad(), retain_graph=True):
            out[:, c].sum().backward(retain_graph=c + 1 < case.classes)
        G = []
        for name, p in model.named_parameters():
            if not hasattr(p, "grad_batch"):
                raise NotImplementedError(f"no per-example gradient of {name}")
            G.append(p.grad_batch.flatten(1))
            p.grad = p.grad_batch = None
        if case.kind == "full":
            gradients.append(G)
        else:
            K.append(sum((g @ g.T for g in G), x.new_zeros(())))
    if case.kind == "full":
        return _contracted((torch.stack(g, 1) for g in zip(*gradients, strict=True)), "full")
    return torch.stack(K) if case.kind == "class" else torch.stack(K).mean(0)


def curvlinops(model: nn.Module, x: Tensor, case: Case, columns: int = 64) -> Tensor:
    """J Jᵀ composed of its two operators, applied to every unit vector, ``columns`` at once."""
    package = importlib.import_module("curvlinops")
    parameters = [p for p in model.parameters() if p.requires_grad]
    data = [(x, torch.zeros(len(x)))]
    J = package.JacobianLinearOperator(model, parameters, data, check_deterministic=False)
    JT, rows = J.adjoint(), len(x) * case.classes
    K = torch.cat([J @ (JT @ unit) for unit in torch.eye(rows).split(columns, dim=1)], dim=1)
    return _of_full(K.reshape(2 * (len(x), case.classes)).transpose(1, 2), case.kind)


def _stateless(model: nn.Module) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor], Tensor], Tensor]]:
    """The parameters, and f(parameters, x_i) -> [C] of one example."""
    buffers = dict(model.named_buffers())

    def f(parameters: dict[str, Tensor], xi: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, (parameters, buffers), (xi[None],))
        return logits[0]

    return {name: p.detach() for name, p in model.named_parameters()}, f


def _contracted(jacobians: Iterable[Tensor], kind: str) -> Tensor:
    """Σ_θ of J_θ [n, C, P_θ] with itself."""
    equation = {"full": "nap,mbp->nmab", "class": "nap,map->anm", "trace": "nap,map->nm"}[kind]
    parts = [(torch.einsum(equation, J, J), J.shape[1]) for J in jacobians]
    total = sum((K for K, _ in parts), torch.zeros(()))
    return total / parts[0][1] if kind == "trace" else total


def _of_full(full: Tensor, kind: str) -> Tensor:
    if kind == "full":
        return full
    K = full.diagonal(dim1=2, dim2=3).permute(2, 0, 1)
    return K if kind == "class" else K.mean(0)


# name -> (engine, its package)
ENGINES: dict[str, tuple[Engine, str]] = {
    "ours": (ours, "tangentlab"),
    "ours-bf16": (partial(ours, products="bf16"), "tangentlab"),
    "torch.func": (torch_func, "torch"),
    "torch.func-by-class": (torch_func_by_class, "torch"),
    "nngeometry": (nngeometry, "nngeometry"),
    "backpack": (backpack, "backpack-for-pytorch"),
    "curvlinops": (curvlinops, "curvlinops-for-pytorch"),
}


def build(spec: Spec) -> tuple[Callable[[], Array], list[str]]:
    """The call to be measured: everything imported, the network and its images loaded."""
    torch.set_num_threads(spec["threads"])
    case = Case(**spec["case"])
    engine, package = ENGINES[spec["engine"]]
    for module in {"backpack-for-pytorch": ["backpack", "backpack.extensions"], "torch": []}.get(
        package, [package.removesuffix("-for-pytorch")]
    ):
        importlib.import_module(module)
    model, x = read(case, spec["problem"])
    return lambda: engine(model, x, case).detach().numpy(), sorted({package, "torch"})


if __name__ == "__main__":
    worker(build, gram_rate)
