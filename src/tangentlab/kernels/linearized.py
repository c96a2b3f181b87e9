"""A network linearised at its weights: to train it is to train with a kernel that stands still.

Loo et al. (2022), "Evolution of neural tangent kernels under benign and adversarial training",
arXiv 2210.12030, section 2: linearised and centred dynamics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from tangentlab.kernels.structure import trained
from tangentlab.modes import evaluation


class Linearized(nn.Module):
    """x ↦ f(x; θ) + J(x) δ in evaluation mode; its trainable parameters are δ, all zero at first.

    Gradient descent on δ follows the kernel J Jᵀ of ``model`` as it stands, whatever the loss.

    Args:
        model: [n, ...] to [n, C]; it becomes a part of this network, its own parameters frozen. δ is over
            those that required grad.
        zero_offset: leave f(x; θ) out: what is learned owes nothing but the kernel to the model.

    Raises:
        KernelError: no parameter requires grad.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> linear = Linearized(model, zero_offset=True)
    >>> with torch.no_grad():
    ...     _ = linear.delta[0].copy_(torch.tensor([[1.0, 2.0]]))
    >>> linear(torch.tensor([[3.0, 4.0]])).tolist()
    [[11.0]]
    """

    def __init__(self, model: nn.Module, *, zero_offset: bool = False) -> None:
        super().__init__()
        found = trained(model)
        self._names = tuple(found)
        self.delta = nn.ParameterList(torch.zeros_like(parameter) for parameter in found.values())
        self.model = model.requires_grad_(False)
        self.zero_offset = zero_offset

    def forward(self, x: Tensor) -> Tensor:
        at = {name: self.model.get_parameter(name) for name in self._names}
        delta = dict(zip(self._names, self.delta, strict=True))
        with evaluation(self.model):
            value: Tensor
            change: Tensor
            value, change = jvp(lambda theta: functional_call(self.model, theta, (x,)), (at,), (delta,))  # type: ignore[misc]
        return change if self.zero_offset else value + change
