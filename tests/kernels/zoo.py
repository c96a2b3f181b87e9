"""Small float64 networks, each with one mechanism that Jacobian engines get wrong.

``MODELS`` have an exact kernel. ``REFUSED`` have none: the message that says so names the module.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from .reference import Inputs

IMAGE, VECTOR, SEQUENCE, TOKENS = (2, 8, 7), (6,), (5, 6), (5,)

Maker = Callable[[int, torch.Generator], Any]


def floats(*shape: int) -> Maker:
    return lambda n, g: torch.randn(n, *shape, generator=g, dtype=torch.float64)


def integers(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Maker:
    return lambda n, g: torch.randint(0, high, (n, *shape), generator=g).to(dtype)


def together(*makers: Maker) -> Maker:
    """A tuple of inputs."""
    return lambda n, g: tuple(make(n, g) for make in makers)


def named(**makers: Maker) -> Maker:
    """A dict of inputs."""
    return lambda n, g: {name: make(n, g) for name, make in makers.items()}


def keep(*shape: int) -> Maker:
    """A mask that keeps the first position and half of the others."""

    def make(n: int, g: torch.Generator) -> Tensor:
        mask = torch.rand(n, *shape, generator=g) < 0.5
        mask[..., 0] = True
        return mask

    return make


class Made(nn.Module):
    """Parts, and a function of them that is the forward: for mechanisms that one expression says."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.function(self, *args, **kwargs)


def made(
    function: Callable[..., Tensor], **parts: Callable[[], nn.Module | Tensor]
) -> Callable[[], nn.Module]:
    """A builder of Made, for the parts are to be drawn when the seed is set."""
    return lambda: Made(function, **{name: part() for name, part in parts.items()})


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape) / 2)


def buffer(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def linear(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*args, **kwargs)


def embedding(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Embedding(*args, **kwargs)


def stacked(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def images(*layers: nn.Module) -> nn.Module:
    """Layers on an image, then a classifier of what they give."""
    return classified(IMAGE, *layers)


def classified(shape: tuple[int, ...], *layers: nn.Module) -> nn.Module:
    """Layers on examples of that shape, then a classifier of what they give."""
    body = nn.Sequential(*layers)
    size = body.eval()(torch.zeros(1, *shape)).numel()
    return nn.Sequential(body, nn.Tanh(), nn.Flatten(), nn.Linear(size, 3))


def conv(*args: int, **kwargs: object) -> Callable[[], nn.Module]:
    return lambda: images(nn.Conv2d(*args, **kwargs))  # type: ignore[arg-type]


def with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics and scales that a network would have after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                if module.running_mean is not None:
                    module.running_mean.normal_(generator=generator)
                    module.running_var.uniform_(0.3, 2.0, generator=generator)
                if module.affine:
                    module.weight.normal_(1.0, 0.3, generator=generator)
                    module.bias.normal_(generator=generator)
    return model


class Twice(nn.Module):
    """One convolution applied twice, at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2 * 4 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(F.avg_pool2d(self.conv(x).tanh(), 2)).flatten(1))


class TiedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).tanh()).tanh())


class TiedEmbedding(nn.Module):
    """A language model's embedding is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens).tanh())).mean(1)


class Functional(nn.Module):
    """A weight used by its module and functionally; another module's only functionally; one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.other, self.unused = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.a.weight).tanh()
        return F.linear(self.a(h).tanh(), self.other.weight)


class DeadUse(Functional):
    """The functional use contributes zero at every example but those beyond the bend of a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.a(x)) + F.relu(F.linear(x, self.unused.weight) - 20)[:, :3]


class Bare(nn.Module):
    """Bare parameters: a position embedding and a class token, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 6, 6))
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.mix(h).tanh().mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].tanh().mean(1))


class Recurrent(nn.Module):
    """A fused kernel that vmap cannot vectorize."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class SequenceFirst(nn.Module):
    """Two positions first, so that on two examples the wrong dimension has the right length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x.view(-1, 2, 3).transpose(0, 1)).tanh().sum(0))


class InPlaceInput(nn.Module):
    """Changes its input, and a module's input after the module's call, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.a, self.head = nn.Parameter(torch.randn(6)), Add(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        h = x * self.position
        y = self.a(h)
        h.zero_()
        return self.head(y.tanh() + h)


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift * self.shift


class PreActivation(nn.Module):
    """A residual block in pre-activation order, with its activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.shortcut, self.relu = nn.Conv2d(2, 4, 1, stride=2, bias=False), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.relu(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(self.conv1(pre))))
        out += self.shortcut(pre)
        return out


class Stored(nn.Module):
    """Keeps an activation on itself and takes part of its weight from a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Gate(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.inner(x, gate=x.sin())
        return self.head(self.seen)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, *, gate: Tensor) -> Tensor:
        self.last = x * self.weight
        return self.last * gate


class DataDependent(nn.Module):
    """Control flow that vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([row * self.weight if row[0] > 0 else row for row in x]).tanh())


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def zero_branch() -> nn.Module:
    """Every gradient inside the branch is exactly zero."""
    model = images(PreActivation())
    nn.init.zeros_(model[0][0].conv2.weight)
    return model


class Scaled(nn.Linear):
    """A Linear by type, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias) * 2.0


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized at every call."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 0.1), self.bias)


class Conv1D(nn.Module):
    """GPT-2's Linear: the weight is transposed, the product an addmm over all tokens at once."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(features, out) / 2), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class LowRank(nn.Module):
    """A low-rank adapter around a frozen Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class StochasticDepth(nn.Module):
    """Drops whole examples' branches, in training mode only."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.branch(x)
        return x + self.branch(x) * (torch.rand(len(x), 1) < 0.5)


class Product(torch.autograd.Function):
    """x·w² with a backward of its own, in the style that functional transforms refuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return x * w * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return grad * w * w, (2 * grad * x * w).sum(tuple(range(grad.dim() - 1)))


class Symmetric(nn.Module):
    """A parametrization of one's own."""

    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class Decoder(nn.Module):
    """Causal attention by hand: one Linear for queries, keys and values, rotary positions, shared keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
        angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotated(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.rotated(self.q(x).unflatten(2, (2, 4)).transpose(1, 2))
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)
        k, v = self.rotated(k).expand_as(q), v.expand_as(q)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)).tanh().sum(1)


class Windows(nn.Module):
    """Attention inside windows that are folded into the batch dimension, with a table of relative biases."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 18), nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(9, 2))
        place = torch.cartesian_prod(torch.arange(2), torch.arange(2))
        offset = place[:, None] - place[None] + 1
        self.register_buffer("index", offset[..., 0] * 3 + offset[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        windows = x.view(n, 2, 2, 2, 2, 6).transpose(2, 3).reshape(n * 4, 4, 6)
        q, k, v = self.qkv(windows).view(n * 4, 4, 3, 2, 3).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(3) + self.table[self.index].permute(2, 0, 1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, 16, 6)
        return self.head(y.tanh().mean(1))


class Experts(nn.Module):
    """A mixture of experts; hard: every example goes to one, and an expert sees only its own examples."""

    def __init__(self, *, hard: bool) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
        self.hard = hard

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(1)
        if not self.hard:
            return (share[:, :, None] * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)
        choice, y = share.argmax(1), x.new_zeros(len(x), 3)
        for e, expert in enumerate(self.experts):
            (rows,) = (choice == e).nonzero(as_tuple=True)
            y = y.index_add(0, rows, share[rows, e, None] * expert(x[rows]))
        return y


class Halting(nn.Module):
    """A cell applied to every example until it is done: how often depends on the batch, no value does."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, left = x, x[:, 0].abs() + 0.5
        while bool((left > 0).any()):
            h = torch.where(left[:, None] > 0, self.cell(h).tanh() + x, h)
            left = left - 0.7
        return self.head(h)


class Energy(nn.Module):
    """The gradient of an energy with respect to the input, taken in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.b(self.a(x).tanh()).tanh().sum(), x, create_graph=True)
        return self.head(force)


class Spectral(nn.Module):
    """A global filter: a complex weight, stored as real numbers, on the spectrum of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(2, 8, 4, 2)), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        return self.head(torch.fft.irfft2(spectrum, x.shape[-2:], norm="ortho").tanh().mean((2, 3)))


class Transformer(nn.Module):
    """A small spatial transformer: the parameters act through the places that the image is read at."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.what = nn.Linear(2, 6), nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.where(x.mean((2, 3))).view(-1, 2, 3) * 0.3
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.what(F.grid_sample(x, grid, align_corners=False)).tanh().mean((2, 3))


class Unpacked(nn.Module):
    """Returns its logits in a container, as many libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, flags: dict[str, bool]) -> Any:
        hidden = self.a(x).tanh()
        if flags["return_dict"]:
            return OrderedDict(states=[SimpleNamespace(hidden=hidden, logits=(self.b(hidden),))])
        raise ValueError(flags)


class Cell(nn.Module):
    """A cell stepped over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0])


class ChannelsLast(nn.Module):
    """Weights and activations whose strides are not those of their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x.contiguous(memory_format=torch.channels_last))).tanh()
        return self.head(self.b(h).tanh().mean((2, 3)))


class GlobalResponse(nn.Module):
    """ConvNeXt V2's normalization, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        norm = x.norm(dim=(1, 2), keepdim=True)
        x = x + self.gamma * (x * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + self.beta
        return x.permute(0, 3, 1, 2)


class Checkpointed(nn.Module):
    """Activations computed again in the backward, where the modules are called again."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6))
        self.b, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.a, x, use_reentrant=False)
        return self.head(checkpoint(lambda h: self.b(h).sin(), h, use_reentrant=False))


class Lists(nn.Module):
    """Parameters and modules in lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.gates = nn.ParameterList(nn.Parameter(torch.randn(6)) for _ in range(2))
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.randn(6)), "b": nn.Parameter(torch.randn(6))})
        self.heads = nn.ModuleDict({"task": nn.Linear(6, 3), "other": nn.Linear(6, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for layer, gate, shift in zip(self.layers, self.gates, self.shifts.values(), strict=True):
            x = layer(x).tanh() * gate + shift
        return self.heads["task"](x)


class OneStorage(nn.Module):
    """Parameters that are views of one buffer, as flattening for distributed training leaves them."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(36 + 18, dtype=torch.float64) / 2
        self.a, self.b = nn.Parameter(flat[:36].view(6, 6)), nn.Parameter(flat[36:].view(6, 3).t())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x @ self.a).tanh(), self.b)


def hooked() -> nn.Module:
    """Hooks that change a module's input and its output."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    model[0].register_forward_hook(lambda module, args, output: output * output)
    return model


def replaced_forward() -> nn.Module:
    """A forward put on the instance, as quantizers and offloaders do."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    layer = model[0]
    layer.forward = lambda x: F.linear(x, layer.weight * layer.weight, layer.bias)  # type: ignore[method-assign]
    return model


def old_hooks(change: Callable[..., nn.Module], *args: Any) -> Callable[[], nn.Module]:
    """A weight that a hook computes before each call, and stores as an attribute that is no parameter."""

    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.Sequential(change(nn.Linear(6, 5), *args), nn.Tanh(), nn.Linear(5, 3))

    return build


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.Tanh()))
    return nn.Sequential(inner, nn.Linear(5, 3))


def one_module_at_two_paths() -> nn.Module:
    shared = nn.Linear(6, 6)
    return nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.Tanh()), nn.Linear(6, 3))


def one_parameter_with_two_names() -> nn.Module:
    model = Made(lambda s, x: s.head(x * s.gain + s.shift), gain=parameter(6)(), head=nn.Linear(6, 3))
    model.shift = model.gain
    return model


def tied_convolutions() -> nn.Module:
    """A convolution's weight is a transposed convolution's."""
    model = Made(lambda s, x: s.head(s.up(s.down(x).tanh()).flatten(1)))
    model.down, model.up = nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 3)
    model.up.weight, model.head = model.down.weight, nn.Linear(112, 3)
    return model


def only_biases() -> nn.Module:
    """Weights frozen, biases trained."""
    model = images(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return model


def frozen_batchnorm() -> nn.Module:
    model = images(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[0][1].requires_grad_(False)
    model[0][4].weight.requires_grad_(False)
    return model


def rounded(w: Tensor) -> Tensor:
    """Quantized, with the gradient straight through."""
    return w + ((w * 8).round() / 8 - w).detach()


def hypernetwork(s: Any, x: Tensor) -> Tensor:
    """Every example's weight is made from the example."""
    return torch.bmm(s.weights(x).view(-1, 3, 6), x.sin()[:, :, None])[:, :, 0] + s.bias


def dynamic_convolution(s: Any, x: Tensor) -> Tensor:
    """Every example's kernel in one grouped convolution: the examples are channels of a single image."""
    weight = s.weights(x.mean((2, 3))).view(-1, 2, 3, 3)
    y = F.conv2d(s.stem(x).view(1, -1, *x.shape[2:]), weight, groups=3 * len(x))
    return s.head(y.view(len(x), 3, -1).tanh().mean(2))


def both_views(s: Any, x: Tensor) -> Tensor:
    """Two views of every example, one batch of views after the other."""
    first, second = s.encoder(torch.cat([x, x.flip(1)])).chunk(2)
    return s.head(first * second)


def patches(s: Any, x: Tensor) -> Tensor:
    """A vision transformer's beginning: patches, a class token, position embeddings."""
    tokens = s.patch(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([s.token.expand(len(x), -1, -1), tokens], 1) + s.position
    return s.head(s.norm(tokens)[:, 0] + tokens.tanh().mean(1))


def ensemble(s: Any, x: Tensor) -> Tensor:
    """Members of an ensemble vectorized in the forward."""
    members = torch.func.vmap(lambda w, b: torch.tanh(x @ w + b))(s.w, s.b)
    return s.head(members.mean(0))


def residual_in_place(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    h += x
    h.relu_()
    y = s.b(h)
    y.add_(h).mul_(0.5)
    return s.head(y)


def masked_attention(s: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    h = s.embedding(tokens)
    h, _ = s.attention(h, h, h, key_padding_mask=~mask)
    weight = mask.to(h).unsqueeze(2)
    return s.head((h.tanh() * weight).sum(1) / weight.sum(1))


def graph(s: Any, nodes: Tensor, adjacency: Tensor) -> Tensor:
    """Messages along the edges of every example's own graph."""
    adjacency = adjacency.softmax(2)
    return s.head(s.b(adjacency @ s.a(nodes).tanh()).tanh().sum(1))


def time_first(s: Any, x: Tensor) -> Tensor:
    y, _ = s.attention(*[x.transpose(0, 1)] * 3)
    return s.head(y.tanh().mean(0))


def locally_connected(s: Any, x: Tensor) -> Tensor:
    """A kernel of its own at every position."""
    columns = F.unfold(x, 3, stride=2)
    return s.head(torch.einsum("ndt,odt->not", columns, s.weight).flatten(1).tanh())


def norms_by_hand(s: Any, x: Tensor) -> Tensor:
    """Functional normalizations on parameters of the model's own."""
    h = F.layer_norm(x, (6,), s.gain, s.shift)
    return s.head(F.group_norm(h.transpose(1, 2), 2, s.gain).flatten(1).tanh())


def searched(s: Any, x: Tensor) -> Tensor:
    """Candidate operations weighted by the softmax of a parameter, in differentiable architecture search."""
    weight = s.alpha.softmax(0)
    return s.head(weight[0] * s.a(x) + weight[1] * x.sin() + weight[2] * F.silu(s.beta * x))


def double_use(s: Any, x: Tensor) -> Tensor:
    """An autoencoder's decoder is its encoder transposed."""
    h = s.encoder(x).tanh()
    return s.head(F.linear(h, s.encoder.weight.t(), s.bias).tanh())


def prefix(s: Any, x: Tensor) -> Tensor:
    """Learned prompts before the sequence, learned queries that read it."""
    h = s.mix(torch.cat([s.prompt.unsqueeze(0).repeat(len(x), 1, 1), x], 1)).tanh()
    read = (s.query @ h.mT).softmax(-1) @ h
    return s.head(read.flatten(1))


def without_gradient(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


Models = dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | Maker]]

CONVOLUTIONS: Models = {
    "conv stride 2 padding 1": (conv(2, 4, 3, stride=2, padding=1), IMAGE),
    "conv stride 3 leaves a border": (conv(2, 4, (3, 2), stride=(3, 2)), IMAGE),
    "conv reflect": (conv(2, 4, 3, padding=(2, 1), padding_mode="reflect"), IMAGE),
    "conv replicate": (conv(2, 4, 3, padding=1, stride=2, padding_mode="replicate"), IMAGE),
    "conv circular": (conv(2, 4, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv same, even kernel": (conv(2, 4, (4, 3), padding="same", dilation=(1, 2)), IMAGE),
    "conv same, reflect": (conv(2, 4, 4, padding="same", padding_mode="reflect"), IMAGE),
    "conv valid": (conv(2, 4, 3, padding="valid"), IMAGE),
    "conv dilation": (conv(2, 4, 3, padding=2, dilation=2), IMAGE),
    "conv groups": (conv(2, 4, 3, groups=2), IMAGE),
    "conv depthwise no bias": (
        lambda: images(nn.Conv2d(2, 6, 3, groups=2, bias=False), nn.Conv2d(6, 3, 1)),
        IMAGE,
    ),
    "conv no bias": (conv(2, 4, 3, bias=False), IMAGE),
    "wide conv, few positions": (
        lambda: images(nn.Conv2d(2, 30, 5), nn.Tanh(), nn.Conv2d(30, 40, 3, stride=2)),
        IMAGE,
    ),
    "conv 1d": (
        lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        SEQUENCE,
    ),
    "conv transpose": (lambda: images(nn.ConvTranspose2d(2, 3, 3, stride=2)), IMAGE),
    "conv 1d grouped, same, circular": (
        lambda: classified(
            (4, 9),
            nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular", groups=2),
            nn.Conv1d(6, 2, 3, stride=2),
        ),
        floats(4, 9),
    ),
    "conv 3d": (
        lambda: classified(
            (2, 4, 5, 3), nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), nn.BatchNorm3d(3)
        ),
        floats(2, 4, 5, 3),
    ),
    "conv 3d replicate": (
        lambda: classified((2, 3, 4, 3), nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate", groups=2)),
        floats(2, 3, 4, 3),
    ),
    "conv transpose 1d": (
        lambda: classified((5, 6), nn.ConvTranspose1d(5, 4, 3, stride=2, padding=1, dilation=2)),
        SEQUENCE,
    ),
    "conv transpose grouped, output padding": (
        lambda: images(
            nn.ConvTranspose2d(2, 4, 3, stride=(3, 2), padding=1, output_padding=(2, 1), groups=2)
        ),
        IMAGE,
    ),
    "conv transpose 3d": (
        lambda: classified((2, 2, 3, 2), nn.ConvTranspose3d(2, 2, 2, stride=2, bias=False)),
        floats(2, 2, 3, 2),
    ),
    "conv subclass that standardizes": (lambda: images(Standardized(2, 4, 3, padding=1)), IMAGE),
    "channels last": (ChannelsLast, IMAGE),
    "locally connected": (made(locally_connected, weight=parameter(2, 18, 9), head=linear(18, 3)), IMAGE),
    "pixel shuffle": (
        lambda: classified(
            (2, 8, 6),
            nn.PixelUnshuffle(2),
            nn.Conv2d(8, 8, 1),
            nn.PixelShuffle(2),
            nn.MaxPool2d(2),
            nn.Conv2d(2, 2, 2),
        ),
        floats(2, 8, 6),
    ),
    "upsampling": (
        lambda: images(
            nn.Conv2d(2, 3, 3, stride=2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 2, 3)
        ),
        IMAGE,
    ),
    "spatial transformer": (Transformer, IMAGE),
}

LINEARS: Models = {
    "linear on sequences": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        SEQUENCE,
    ),
    "one output": (lambda: nn.Linear(6, 1), VECTOR),
    "in-place relu": (
        lambda: images(
            nn.Conv2d(2, 4, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
        ),
        IMAGE,
    ),
    "in-place relu on a view": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3)
        ),
        VECTOR,
    ),
    "pre-activation block": (lambda: images(PreActivation()), IMAGE),
    "zero branch": (zero_branch, IMAGE),
    "input changed in place": (InPlaceInput, VECTOR),
    "activations stored": (Stored, VECTOR),
    "linear with two middle dimensions": (
        stacked(linear(6, 4), nn.Tanh, linear(4, 2, bias=False), nn.Flatten, linear(12, 3)),
        floats(2, 3, 6),
    ),
    "bilinear": (
        made(lambda s, x, y: s.head(s.mix(x, y).tanh()), mix=lambda: nn.Bilinear(6, 4, 5), head=linear(5, 3)),
        together(floats(6), floats(4)),
    ),
    "linear subclass": (lambda: nn.Sequential(Scaled(6, 5), nn.Tanh(), Scaled(5, 3)), VECTOR),
    "forward replaced on the instance": (replaced_forward, VECTOR),
    "forward called directly": (
        made(lambda s, x: s.head(s.a.forward(x).tanh()), a=linear(6, 5), head=linear(5, 3)),
        VECTOR,
    ),
    "hooks that change values": (hooked, VECTOR),
    "residual added in place": (
        made(residual_in_place, a=linear(6, 6), b=linear(6, 6), head=linear(6, 3)),
        VECTOR,
    ),
}

NORMALIZATIONS: Models = {
    "batchnorm 2d": (lambda: images(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=0.03)), IMAGE),
    "batchnorm 2d not affine": (
        lambda: images(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=0.03, affine=False)),
        IMAGE,
    ),
    "batchnorm 1d": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, eps=0.1), nn.Tanh(), nn.Linear(4, 3)),
        VECTOR,
    ),
    "batchnorm 1d on sequences": (
        lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)),
        SEQUENCE,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        VECTOR,
    ),
    "group norm": (lambda: images(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), IMAGE),
    "instance norm": (lambda: images(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)), IMAGE),
    "batchnorm momentum none": (lambda: images(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=None)), IMAGE),
    "synchronized batchnorm": (lambda: images(nn.Conv2d(2, 4, 3), nn.SyncBatchNorm(4, eps=0.1)), IMAGE),
    "layer norm over an image": (lambda: images(nn.Conv2d(2, 3, 3), nn.LayerNorm([3, 6, 5], eps=0.1)), IMAGE),
    "layer norm not affine, without bias": (
        stacked(
            lambda: nn.LayerNorm((5, 6), elementwise_affine=False),
            linear(6, 4),
            lambda: nn.LayerNorm(4, bias=False),
            nn.Flatten,
            linear(20, 3),
        ),
        SEQUENCE,
    ),
    "instance norm not affine": (lambda: images(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4)), IMAGE),
    "instance norm tracked": (
        lambda: images(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        IMAGE,
    ),
    "rms norm": (
        stacked(
            linear(6, 4), lambda: nn.RMSNorm(4, eps=0.1), nn.Flatten, lambda: nn.RMSNorm([20]), linear(20, 3)
        ),
        SEQUENCE,
    ),
    "local response norm": (lambda: images(nn.Conv2d(2, 5, 3), nn.LocalResponseNorm(3, alpha=0.5)), IMAGE),
    "global response norm": (lambda: images(nn.Conv2d(2, 4, 3), GlobalResponse()), IMAGE),
    "functional norms": (
        made(norms_by_hand, gain=parameter(6), shift=parameter(6), head=linear(30, 3)),
        SEQUENCE,
    ),
}

TOKENIZED: Models = {
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        TOKENS,
    ),
    "embedding of repeated tokens": (
        stacked(embedding(3, 4), nn.Tanh, nn.Flatten, linear(28, 3)),
        integers(3, 7),
    ),
    "embedding with padding": (
        stacked(embedding(4, 4, padding_idx=1), nn.Tanh, nn.Flatten, linear(20, 3)),
        integers(4, 5),
    ),
    "sparse embedding": (stacked(embedding(9, 4, sparse=True), nn.Tanh, nn.Flatten, linear(20, 3)), TOKENS),
    "embedding bag": (
        stacked(lambda: nn.EmbeddingBag(9, 4, mode="mean", padding_idx=2), nn.Tanh, linear(4, 3)),
        TOKENS,
    ),
    "weighted embedding bag": (
        made(
            lambda s, tokens, weight: s.head(s.bag(tokens, per_sample_weights=weight).tanh()),
            bag=lambda: nn.EmbeddingBag(9, 4, mode="sum"),
            head=linear(4, 3),
        ),
        together(integers(9, 5), floats(5)),
    ),
    "one-hot tokens": (
        made(
            lambda s, x: s.head((F.one_hot(x, 9).to(s.w) @ s.w).tanh().sum(1)),
            w=parameter(9, 4),
            head=linear(4, 3),
        ),
        TOKENS,
    ),
}

ATTENTION: Models = {
    "attention": (Attention, SEQUENCE),
    "transformer layer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(30, 3)
        ),
        SEQUENCE,
    ),
    "lstm": (Recurrent, SEQUENCE),
    "attention time first": (
        made(time_first, attention=lambda: nn.MultiheadAttention(6, 3), head=linear(6, 3)),
        SEQUENCE,
    ),
    "attention of other widths": (
        made(
            lambda s, x, y: s.head(s.attention(x, y[..., :4], y[..., 4:])[0].tanh().mean(1)),
            attention=lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=3, batch_first=True, bias=False),
            head=linear(6, 3),
        ),
        together(floats(5, 6), floats(4, 7)),
    ),
    "attention with biased keys": (
        made(
            lambda s, x: s.head(s.attention(x, x, x)[0].tanh().mean(1)),
            attention=lambda: nn.MultiheadAttention(
                6, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True
            ),
            head=linear(6, 3),
        ),
        SEQUENCE,
    ),
    "transformer layer, norm first": (
        stacked(
            lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True, activation="gelu"),
            nn.Flatten,
            linear(30, 3),
        ),
        SEQUENCE,
    ),
    "transformer layer, time first": (
        made(
            lambda s, x: s.head(s.layer(x.transpose(0, 1)).mean(0)),
            layer=lambda: nn.TransformerEncoderLayer(6, 2, 8),
            head=linear(6, 3),
        ),
        SEQUENCE,
    ),
    "transformer decoder layer": (
        made(
            lambda s, x, y: s.head(s.layer(x, y).mean(1)),
            layer=lambda: nn.TransformerDecoderLayer(6, 2, 8, batch_first=True),
            head=linear(6, 3),
        ),
        together(floats(3, 6), floats(4, 6)),
    ),
    "causal attention by hand": (Decoder, SEQUENCE),
    "attention in windows": (Windows, floats(4, 4, 6)),
    "lstm time first, two layers": (
        made(
            lambda s, x: s.head(s.lstm(x.transpose(0, 1))[0][-1]),
            lstm=lambda: nn.LSTM(6, 3, num_layers=2, proj_size=2),
            head=linear(2, 3),
        ),
        SEQUENCE,
    ),
    "gru in both directions": (
        made(
            lambda s, x: s.head(s.gru(x)[1].transpose(0, 1).flatten(1)),
            gru=lambda: nn.GRU(6, 3, bidirectional=True, batch_first=True),
            head=linear(6, 3),
        ),
        SEQUENCE,
    ),
    "lstm cell": (Cell, SEQUENCE),
}

BARE: Models = {
    "bare parameters": (Bare, SEQUENCE),
    "position embedding [T, D]": (
        made(
            lambda s, x: s.head((s.a(x) + s.position).tanh().mean(1)),
            a=linear(6, 6),
            position=parameter(5, 6),
            head=linear(6, 3),
        ),
        SEQUENCE,
    ),
    "position embedding, sliced": (
        made(
            lambda s, x: s.head((s.a(x) + s.position[:, : x.shape[1]]).tanh().mean(1)),
            a=linear(6, 6),
            position=parameter(1, 8, 6),
            head=linear(6, 3),
        ),
        SEQUENCE,
    ),
    "position embedding by module": (
        made(
            lambda s, x: s.head((s.a(x) + s.position(torch.arange(x.shape[1]))).tanh().mean(1)),
            a=linear(6, 6),
            position=embedding(8, 6),
            head=linear(6, 3),
        ),
        SEQUENCE,
    ),
    "vision transformer's patches": (
        made(
            patches,
            patch=lambda: nn.Conv2d(2, 6, 3, stride=3),
            token=parameter(1, 1, 6),
            position=parameter(1, 5, 6),
            norm=lambda: nn.LayerNorm(6),
            head=linear(6, 3),
        ),
        IMAGE,
    ),
    "learned prompts and queries": (
        made(prefix, prompt=parameter(2, 6), query=parameter(2, 6), mix=linear(6, 6), head=linear(12, 3)),
        SEQUENCE,
    ),
    "layer scale": (
        made(
            lambda s, x: s.head(x + s.scale * s.a(x).tanh()),
            scale=parameter(6),
            a=linear(6, 6),
            head=linear(6, 3),
        ),
        VECTOR,
    ),
    "temperature": (
        made(lambda s, x: s.head(x) * s.scale.exp(), scale=parameter(), head=linear(6, 3)),
        VECTOR,
    ),
    "prelu": (lambda: images(nn.Conv2d(2, 4, 3), nn.PReLU(4), nn.Conv2d(4, 3, 3), nn.PReLU()), IMAGE),
    "bias on the logits": (
        made(lambda s, x: s.head(x).tanh() + s.bias, bias=parameter(3), head=linear(6, 3)),
        VECTOR,
    ),
    "architecture weights": (
        made(searched, alpha=parameter(3), beta=parameter(), a=linear(6, 6), head=linear(6, 3)),
        VECTOR,
    ),
    "lists and dicts": (Lists, VECTOR),
    "one storage": (OneStorage, VECTOR),
    "custom function": (
        made(lambda s, x: s.head(Product.apply(x, s.w)), w=parameter(6), head=linear(6, 3)),
        VECTOR,
    ),
    "complex filter": (Spectral, IMAGE),
    "complex weight": (
        made(
            lambda s, x: s.head((x.to(torch.complex128) @ torch.complex(s.re, s.im)).abs()),
            re=parameter(6, 5),
            im=parameter(6, 5),
            head=linear(5, 3),
        ),
        VECTOR,
    ),
}

SHARED: Models = {
    "applied twice": (Twice, IMAGE),
    "tied linear": (TiedLinear, VECTOR),
    "tied embedding": (TiedEmbedding, TOKENS),
    "tied autoencoder": (
        made(double_use, encoder=linear(6, 4), bias=parameter(6), head=linear(6, 3)),
        VECTOR,
    ),
    "tied convolutions": (tied_convolutions, IMAGE),
    "applied at two shapes": (
        made(
            lambda s, x: s.head((s.a(x).tanh() + s.a(x.mean(1)).sin()[:, None]).sum(1)),
            a=linear(6, 6),
            head=linear(6, 3),
        ),
        SEQUENCE,
    ),
    "one block three times": (
        made(
            lambda s, x: s.head(s.block(s.block(s.block(x) + x) + x)),
            block=stacked(linear(6, 6), lambda: nn.LayerNorm(6), nn.Tanh),
            head=linear(6, 3),
        ),
        VECTOR,
    ),
    "one module at two paths": (one_module_at_two_paths, VECTOR),
    "one parameter with two names": (one_parameter_with_two_names, VECTOR),
    "siamese": (
        made(lambda s, x, y: s.head(s.a(x).tanh() * s.a(y).tanh()), a=linear(6, 5), head=linear(5, 3)),
        together(floats(6), floats(6)),
    ),
    "both views in one batch": (
        made(
            both_views,
            encoder=stacked(linear(6, 5), lambda: nn.BatchNorm1d(5), nn.Tanh, lambda: nn.LayerNorm(5)),
            head=linear(5, 3),
        ),
        VECTOR,
    ),
}

FUNCTIONAL: Models = {
    "functional use": (Functional, VECTOR),
    "dead functional use": (DeadUse, VECTOR),
    "matmul with a parameter": (
        made(
            lambda s, x: (x @ s.a).tanh() @ s.b + s.bias,
            a=parameter(6, 5),
            b=parameter(5, 3),
            bias=parameter(3),
        ),
        VECTOR,
    ),
    "parameter on the left": (
        made(lambda s, x: (s.b @ (s.a @ x.t()).tanh()).t(), a=parameter(5, 6), b=parameter(3, 5)),
        VECTOR,
    ),
    "einsum": (
        made(
            lambda s, x: torch.einsum("ntd,dhe,thc->nec", x, s.a, s.b).tanh().sum(1),
            a=parameter(6, 2, 4),
            b=parameter(5, 2, 3),
        ),
        SEQUENCE,
    ),
    "batched matmul with an expanded weight": (
        made(lambda s, x: torch.bmm(x, s.a.expand(len(x), -1, -1)).tanh().sum(1), a=parameter(6, 3)),
        SEQUENCE,
    ),
    "addmm over tokens": (
        made(lambda s, x: s.b(s.a(x).tanh()).sum(1), a=lambda: Conv1D(6, 5), b=lambda: Conv1D(5, 3)),
        SEQUENCE,
    ),
    "functional convolution": (
        made(
            lambda s, x: s.head(F.conv2d(F.pad(x, (1, 0)), s.w, s.b, stride=2).tanh().mean((2, 3))),
            w=parameter(4, 2, 3, 3),
            b=parameter(4),
            head=linear(4, 3),
        ),
        IMAGE,
    ),
    "masked weight": (
        made(
            lambda s, x: s.head(F.linear(x, s.a.weight * (s.mask > 0), s.a.bias).tanh()),
            a=linear(6, 5),
            mask=buffer(5, 6),
            head=linear(5, 3),
        ),
        VECTOR,
    ),
    "weight quantized straight through": (
        made(
            lambda s, x: s.head(F.linear(x, rounded(s.a.weight)).tanh()),
            a=linear(6, 5, bias=False),
            head=linear(5, 3),
        ),
        VECTOR,
    ),
    "hypernetwork": (made(hypernetwork, weights=linear(6, 18), bias=parameter(3)), VECTOR),
    "dynamic convolution": (
        made(
            dynamic_convolution, weights=linear(2, 3 * 18), stem=lambda: nn.Conv2d(2, 6, 1), head=linear(3, 3)
        ),
        IMAGE,
    ),
    "ensemble": (made(ensemble, w=parameter(2, 6, 5), b=parameter(2, 1, 5), head=linear(5, 3)), VECTOR),
    "gradient in the forward": (Energy, VECTOR),
}

PARAMETRIZED: Models = {
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)), VECTOR),
    "weight norm conv": (lambda: images(weight_norm(nn.Conv2d(2, 4, 3))), IMAGE),
    "frozen": (frozen, VECTOR),
    "weight norm by hooks": (old_hooks(nn.utils.weight_norm), VECTOR),
    "spectral norm": (
        stacked(lambda: parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh, linear(5, 3)),
        VECTOR,
    ),
    "spectral norm by hooks": (old_hooks(nn.utils.spectral_norm), VECTOR),
    "orthogonal": (
        stacked(lambda: parametrizations.orthogonal(nn.Linear(6, 6)), nn.Tanh, linear(6, 3)),
        VECTOR,
    ),
    "parametrization of one's own": (
        lambda: nn.Sequential(
            parametrize.register_parametrization(nn.Linear(6, 6), "weight", Symmetric()),
            nn.Tanh(),
            nn.Linear(6, 3),
        ),
        VECTOR,
    ),
    "pruned": (old_hooks(prune.random_unstructured, "weight", 0.4), VECTOR),
    "low-rank adapter": (
        stacked(lambda: LowRank(nn.Linear(6, 5)), nn.Tanh, lambda: LowRank(nn.Linear(5, 3))),
        VECTOR,
    ),
    "only biases train": (only_biases, IMAGE),
    "frozen batchnorm": (frozen_batchnorm, IMAGE),
    "buffers": (
        made(
            lambda s, x: s.head((x * s.scale @ s.frequencies).cos() * s.gain),
            scale=buffer(6),
            frequencies=buffer(6, 5),
            gain=parameter(5),
            head=linear(5, 3),
        ),
        VECTOR,
    ),
    "stop gradient": (
        made(
            lambda s, x: s.head(s.a(x).detach() * s.b(x) + s.a(x)),
            a=linear(6, 5),
            b=linear(6, 5),
            head=linear(5, 3),
        ),
        VECTOR,
    ),
    "backbone without gradient": (
        made(lambda s, x: s.head(without_gradient(s.a, x).tanh()), a=linear(6, 5), head=linear(5, 3)),
        VECTOR,
    ),
}

FLOW: Models = {
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)), VECTOR),
    "data-dependent control flow": (DataDependent, VECTOR),
    "sequence first": (SequenceFirst, VECTOR),
    "dropout of channels": (
        lambda: images(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.5), nn.AlphaDropout(0.5)),
        IMAGE,
    ),
    "stochastic depth": (
        lambda: nn.Sequential(StochasticDepth(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)),
        VECTOR,
    ),
    "gradient checkpointing": (Checkpointed, VECTOR),
    "halting": (Halting, VECTOR),
    "soft mixture of experts": (lambda: Experts(hard=False), VECTOR),
    "hard mixture of experts": (lambda: Experts(hard=True), VECTOR),
    "scripted": (scripted, VECTOR),
    "deep set": (
        made(
            lambda s, x: s.after(s.before(x).amax(1) + s.before(x).sum(1)),
            before=stacked(linear(6, 5), nn.Tanh),
            after=linear(5, 3),
        ),
        SEQUENCE,
    ),
    "tokens flattened": (
        made(
            lambda s, x: s.head(s.norm(s.a(x.view(-1, 6))).tanh().view(len(x), -1)),
            a=linear(6, 4),
            norm=lambda: nn.BatchNorm1d(4),
            head=linear(20, 3),
        ),
        SEQUENCE,
    ),
    "examples along a convolution's positions": (
        made(
            lambda s, x: s.head(s.a(x.t()[None])[0].t().tanh()),
            a=lambda: nn.Conv1d(6, 4, 1),
            head=linear(4, 3),
        ),
        VECTOR,
    ),
    "logits in a container": (
        made(lambda s, x: s.inner(x, flags={"return_dict": True})["states"][0].logits[0], inner=Unpacked),
        VECTOR,
    ),
}

INPUTS: Models = {
    "tuple": (
        made(
            lambda s, x, y: s.head(s.a(x).tanh() + s.b(y).mean((2, 3))),
            a=linear(6, 4),
            b=lambda: nn.Conv2d(2, 4, 3),
            head=linear(4, 3),
        ),
        together(floats(6), floats(*IMAGE)),
    ),
    "dict": (
        made(lambda s, *, x, gate: s.head(s.a(x).tanh() * gate[:, None]), a=linear(6, 4), head=linear(4, 3)),
        named(gate=floats(), x=floats(6)),
    ),
    "integers and floats": (
        made(
            lambda s, *, tokens, values: s.head(s.embedding(tokens).sum(1).tanh() + s.a(values)),
            embedding=embedding(9, 4),
            a=linear(6, 4),
            head=linear(4, 3),
        ),
        named(tokens=integers(9, 5), values=floats(6)),
    ),
    "tokens and a mask": (
        made(
            masked_attention,
            embedding=embedding(9, 6),
            attention=lambda: nn.MultiheadAttention(6, 2, batch_first=True),
            head=linear(6, 3),
        ),
        together(integers(9, 5), keep(5)),
    ),
    "bytes": (
        lambda: nn.Sequential(
            Made(lambda s, x: x.double() / 255), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(90, 3)
        ),
        integers(256, *IMAGE, dtype=torch.uint8),
    ),
    "graphs": (
        made(graph, a=linear(6, 5), b=linear(5, 4, bias=False), head=linear(4, 3)),
        together(floats(5, 6), floats(5, 5)),
    ),
}

MODELS: Models = {
    **CONVOLUTIONS,
    **LINEARS,
    **NORMALIZATIONS,
    **TOKENIZED,
    **ATTENTION,
    **BARE,
    **SHARED,
    **FUNCTIONAL,
    **PARAMETRIZED,
    **FLOW,
    **INPUTS,
}


class Always(nn.Module):
    """Drops activations in evaluation mode too, as Monte Carlo dropout does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True)


class GaussianNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class ForeignNoise(nn.Module):
    """Draws from a generator that is not PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


class DroppedAttention(nn.Module):
    """Leaves the dropout of its attention on: the function does not know of modes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), dropout_p=0.2)


class Counting(nn.Module):
    """Another function at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class BatchSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(0)


class BatchAttention(nn.Module):
    """Attention that takes the examples for the sequence: its layout is not the data's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recentred(nn.Module):
    """Subtracts the batch's mean from its parameter's share only, which leaves one example with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return x + y - y.mean(0)


class Constrained(nn.Linear):
    """Changes its weight in the forward, so that gradients are not those of the function."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


class Clipped(nn.Linear):
    """The same, in place."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def between(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A network whose module '1' is the layer."""
    return stacked(linear(6, 6), layer, linear(6, 3))


def of_tokens(layer: Callable[[], nn.Module], size: int) -> Callable[[], nn.Module]:
    """A network whose module '1' is the layer, which makes ``size`` numbers of the tokens."""
    return stacked(nn.Identity, layer, nn.Tanh, nn.Flatten, linear(size, 3))


# name -> (builder, shape or maker of the examples, the module's class); the module is called '1'
REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | Maker, str]] = {
    "dropout always on": (between(Always), VECTOR, "Always"),
    "gaussian noise": (between(GaussianNoise), VECTOR, "GaussianNoise"),
    "noise of another generator": (between(ForeignNoise), VECTOR, "ForeignNoise"),
    "attention's dropout always on": (
        stacked(linear(6, 6), DroppedAttention, nn.Flatten, linear(30, 3)),
        SEQUENCE,
        "DroppedAttention",
    ),
    "another function at every call": (between(Counting), VECTOR, "Counting"),
    "softmax over the batch": (between(BatchSoftmax), VECTOR, "BatchSoftmax"),
    "attention over the batch": (between(BatchAttention), VECTOR, "MultiheadAttention"),
    "mean of the batch": (between(Recentred), VECTOR, "Recentred"),
    "untracked batchnorm": (
        between(lambda: nn.BatchNorm1d(6, track_running_stats=False)),
        VECTOR,
        "BatchNorm1d",
    ),
    "weight constrained in the forward": (between(lambda: Constrained(6, 6)), VECTOR, "Constrained"),
    "weight clipped in place": (between(lambda: Clipped(6, 6)), VECTOR, "Clipped"),
    "embedding with a largest norm": (of_tokens(embedding(9, 4, max_norm=0.5), 20), TOKENS, "Embedding"),
    "embedding scaled by frequency": (
        of_tokens(embedding(3, 4, scale_grad_by_freq=True), 28),
        integers(3, 7),
        "Embedding",
    ),
    "embedding bag with a largest norm": (
        of_tokens(lambda: nn.EmbeddingBag(9, 4, max_norm=0.5), 4),
        TOKENS,
        "EmbeddingBag",
    ),
}

# What functional transforms cannot run, and why.
NOT_FUNCTIONAL = {
    "sparse embedding": "a gradient that is a sparse tensor",
    "custom function": "an autograd.Function without setup_context",
    "gradient checkpointing": "hooks on saved tensors",
    "gradient in the forward": "requires_grad_ inside of the function",
}


def build(name: str) -> nn.Module:
    """The model, in float64, from a fixed seed, with running statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return with_statistics((MODELS | REFUSED)[name][0]()).double()


def examples(name: str, n: int, seed: int = 2) -> Inputs:
    """[n, ...], tokens or normal in float64; a tuple or a dict of such for the models that take several."""
    generator, shape = torch.Generator().manual_seed(seed), (MODELS | REFUSED)[name][1]
    if callable(shape):
        return shape(n, generator)
    make = integers(9, *shape) if shape == TOKENS else floats(*shape)
    return make(n, generator)
