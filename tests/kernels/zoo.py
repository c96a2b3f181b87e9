"""Small float64 networks, each with one thing that Jacobian engines get wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

IMAGE, VECTOR, SEQUENCE, TOKENS = (2, 8, 7), (6,), (5, 6), (5,)


def images(*layers: nn.Module) -> nn.Module:
    """Layers on an image, then a classifier of what they give."""
    body = nn.Sequential(*layers)
    size = body.eval()(torch.zeros(1, *IMAGE)).numel()
    return nn.Sequential(body, nn.Tanh(), nn.Flatten(), nn.Linear(size, 3))


def conv(*args: int, **kwargs: object) -> Callable[[], nn.Module]:
    return lambda: images(nn.Conv2d(*args, **kwargs))  # type: ignore[arg-type]


def with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics and scales that a network would have after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
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


# name -> (builder, shape of an example)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
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
    "conv transpose": (lambda: images(nn.ConvTranspose2d(2, 3, 3, stride=2)), IMAGE),
    "conv 1d": (
        lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        SEQUENCE,
    ),
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
    "pre-activation block": (lambda: images(PreActivation()), IMAGE),
    "zero branch": (zero_branch, IMAGE),
    "linear on sequences": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        SEQUENCE,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        VECTOR,
    ),
    "group norm": (lambda: images(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), IMAGE),
    "instance norm": (lambda: images(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)), IMAGE),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        TOKENS,
    ),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)), VECTOR),
    "weight norm conv": (lambda: images(weight_norm(nn.Conv2d(2, 4, 3))), IMAGE),
    "applied twice": (Twice, IMAGE),
    "tied linear": (TiedLinear, VECTOR),
    "tied embedding": (TiedEmbedding, TOKENS),
    "functional use": (Functional, VECTOR),
    "dead functional use": (DeadUse, VECTOR),
    "bare parameters": (Bare, SEQUENCE),
    "attention": (Attention, SEQUENCE),
    "transformer layer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(30, 3)
        ),
        SEQUENCE,
    ),
    "lstm": (Recurrent, SEQUENCE),
    "sequence first": (SequenceFirst, VECTOR),
    "input changed in place": (InPlaceInput, VECTOR),
    "activations stored": (Stored, VECTOR),
    "data-dependent control flow": (DataDependent, VECTOR),
    "frozen": (frozen, VECTOR),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)), VECTOR),
    "one output": (lambda: nn.Linear(6, 1), VECTOR),
}


def build(name: str) -> nn.Module:
    """The model, in float64, from a fixed seed, with running statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return with_statistics(MODELS[name][0]()).double()


def examples(name: str, n: int, seed: int = 2) -> Tensor:
    """[n, ...], tokens or normal in float64."""
    generator, shape = torch.Generator().manual_seed(seed), MODELS[name][1]
    if shape == TOKENS:
        return torch.randint(0, 9, (n, *shape), generator=generator)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64)
