"""Uses of parameters by functions with a rule: their per-example gradients, from δ and the inputs.

With δ [n, R, k, ...] the cotangents at the output and a [n, k, ...] the input, both with the examples first:

    weights at positions   G = Σ_p δ_p a_pᵀ       linear, x @ W, addmm; conv1d, conv2d (a_p the patch)
    tables                 G = Σ_p e_{t_p} δ_pᵀ   embedding, t_p the token
    convolutions           G = the convolution's own weight gradient, of every dimension, grouped, transposed
    scales                 G = Σ_p δ_p x̂_p        BatchNorm, LayerNorm, GroupNorm, RMSNorm, x * γ
    shifts                 G = Σ_p δ_p            biases, x + b, b.expand(n, …)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangentlab.kernels.sites import Site


class Use(Site):
    """One call of a function, with watched parameters in the places ``roles`` of its arguments."""

    positional = False

    def __init__(self, inputs: Sequence[Tensor], roles: Mapping[str, nn.Parameter]) -> None:
        super().__init__(inputs)
        self.roles = dict(roles)
        if "weight" not in roles:
            self.forget()  # a shift's gradient is of δ alone

    def fault(self, n: int) -> str | None:
        fault = super().fault(n)
        if fault is None and not self.admits(self.axis):
            return "has its examples in a dimension that the rule does not cover"
        return fault

    def admits(self, axis: int) -> bool:
        """Whether the examples may lie in that dimension."""
        return axis == 0

    def gradient(self, role: str, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        """G [b, R, P] in ``dtype`` of the examples of ``part``, of n; P in the parameter's own order."""
        raise NotImplementedError

    def transient(self, role: str, n: int) -> int:
        """Elements that ``gradient`` holds for an example beside its result."""
        return 3 * sum(t.numel() for t in (*self.inputs, self._delta)) // n

    @property
    def _delta(self) -> Tensor:
        assert self.delta is not None
        return self.delta


class Positional(Use):
    """A weight that meets a vector a_p at every position p = 1 … T of an example: G = Σ_p δ_p a_pᵀ.

    Attributes:
        channels, features: the lengths O of δ_p and D of a_p.
        swapped: whether the parameter is [D, O], not [O, D].
    """

    positional = True
    channels: int
    features: int
    swapped = False

    def positions(self, n: int) -> int:
        """T, the positions an example."""
        return self._delta[0, 0].numel() // self.channels

    def transient(self, role: str, n: int) -> int:
        patches = 2 * self.positions(n) * self.features if role == "weight" else 0
        return super().transient(role, n) + patches

    def patches(self, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        """a [b, D, T], in the layout that is made fastest."""
        raise NotImplementedError

    def vectors(self, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        """a [b, T, D], contiguous; D in an order of its own, the same for all examples."""
        return self.patches(n, part, dtype).transpose(1, 2).contiguous()

    def projected(self, n: int, rows: Tensor) -> Tensor:
        """⟨row, a_p⟩ [n, S, T] of rows [S, D], without patches where there is another way."""
        return rows @ self.patches(n, slice(None), rows.dtype)

    def columns(self, part: slice, some: slice, dtype: torch.dtype) -> Tensor:
        """δ [b, R, |some|, T] of the channels ``some``."""
        raise NotImplementedError

    def gradient(self, role: str, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        if role == "bias":
            return self.columns(part, slice(None), dtype).sum(3)
        a, d = self.patches(n, part, dtype), self.columns(part, slice(None), dtype)
        G: Tensor = torch.einsum("nrot,ndt->nrdo" if self.swapped else "nrot,ndt->nrod", d, a)
        return G.reshape(len(G), G.shape[1], -1)


class Linear(Positional):
    """a Wᵀ + b, and a W + b with ``swapped``."""

    def __init__(self, a: Tensor, roles: Mapping[str, nn.Parameter], out: int, *, swapped: bool) -> None:
        super().__init__([a], roles)
        self.channels, self.features, self.swapped = out, a.shape[-1], swapped

    def admits(self, axis: int) -> bool:
        return self.shape is not None and axis < len(self.shape) - 1

    def patches(self, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        a = self.front(self.inputs[0], n)[part].to(dtype)
        return a.reshape(len(a), -1, self.features).transpose(1, 2)

    def columns(self, part: slice, some: slice, dtype: torch.dtype) -> Tensor:
        d = self._delta[part][..., some].to(dtype)
        return d.reshape(*d.shape[:2], -1, d.shape[-1]).transpose(2, 3)


class Embedding(Positional):
    """W[t]: the patch of a token is its one-hot vector e_t, never formed."""

    swapped = True

    def __init__(self, tokens: Tensor, roles: Mapping[str, nn.Parameter], padding: int | None) -> None:
        super().__init__([tokens], roles)
        self.features, self.channels = roles["weight"].shape
        self._padding = None if padding is None else padding % self.features

    def admits(self, axis: int) -> bool:
        return self.shape is not None and axis < len(self.shape) - 1

    def tokens(self, n: int, part: slice) -> Tensor:
        """[b, T], −1 where the padding stands, which has no gradient."""
        tokens = self.front(self.inputs[0], n)[part]
        tokens = tokens.reshape(len(tokens), -1)
        return tokens if self._padding is None else tokens.masked_fill(tokens == self._padding, -1)

    def projected(self, n: int, rows: Tensor) -> Tensor:
        tokens = self.tokens(n, slice(None))
        found = rows[:, tokens.clamp(min=0)] * (tokens >= 0)
        return found.transpose(0, 1)

    def columns(self, part: slice, some: slice, dtype: torch.dtype) -> Tensor:
        d = self._delta[part][..., some].to(dtype)
        return d.reshape(*d.shape[:2], -1, d.shape[-1]).transpose(2, 3)

    def gradient(self, role: str, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        tokens, d = self.tokens(n, part), self.columns(part, slice(None), dtype).transpose(2, 3)
        G = d.new_zeros(*d.shape[:2], self.features, self.channels)
        seen = (tokens >= 0)[:, None, :, None]
        return G.scatter_add_(2, tokens.clamp(min=0)[:, None, :, None].expand_as(d), d * seen).flatten(2)


class Convolution(Positional):
    """Convolutions: their own weight gradient for all, patches for ungrouped ones in one and two dimensions.

    G is what aten's convolution_backward gives for a single example. Several examples, and the R cotangents
    of each, go through one call as groups and channels of one large convolution.
    """

    def __init__(
        self,
        a: Tensor,
        roles: Mapping[str, nn.Parameter],
        shape: torch.Size,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        output_padding: list[int] | None,
    ) -> None:
        super().__init__([a], roles)
        self._kernel, self._stride, self._padding, self._dilation = shape[2:], stride, padding, dilation
        self._groups, self._transposed = groups, output_padding is not None
        self._output_padding = output_padding or [0] * len(stride)
        self._weight_shape = shape
        self.channels = shape[1] * groups if self._transposed else shape[0]
        self.features = shape[1:].numel()

        # Whether the weight meets patches, so that other routes than the convolution's own are open.
        self.positional = groups == 1 and not self._transposed and len(self._kernel) <= 2

    def patches(self, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        windows = self._windows(self.front(self.inputs[0], n)[part].to(dtype))  # [b, k, C, h, w, u, v]
        return windows.permute(0, 2, 5, 6, 1, 3, 4).reshape(len(windows), self.features, -1)

    def projected(self, n: int, rows: Tensor) -> Tensor:
        a = self.front(self.inputs[0], n).to(rows.dtype)
        # A convolution with the rows as filters.
        convolve = (F.conv1d, F.conv2d)[len(self._kernel) - 1]
        filters = rows.view(len(rows), *self._weight_shape[1:])
        found = convolve(a.flatten(0, 1), filters, None, self._stride, self._padding, self._dilation)
        by_example: Tensor = found.unflatten(0, (n, -1))
        return by_example.flatten(3).transpose(1, 2).flatten(2)

    def vectors(self, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        # Channels last, where whole rows of a window lie together.
        a = self.front(self.inputs[0], n)[part].to(dtype).movedim(2, -1).contiguous().movedim(-1, 2)
        windows = self._windows(a).permute(0, 1, 3, 4, 5, 6, 2)
        return windows.reshape(len(windows), -1, self.features).contiguous()

    def _windows(self, a: Tensor) -> Tensor:
        """a [b, k, C, ...] as [b, k, C, h, w, u, v]: at output (h, w) what meets the weight's entry (u, v).

        A view of the padded images, so that a copy of it runs along their rows: ten times faster than unfold.
        """
        missing = [1] * (2 - len(self._kernel))  # a sequence is an image of height one
        kernel, stride, dilation = (
            [*missing, *sizes] for sizes in (self._kernel, self._stride, self._dilation)
        )
        a = F.pad(a, [width for size in reversed(self._padding) for width in (size, size)])
        a = a.unsqueeze(3) if missing else a
        extents = [
            (size - d * (u - 1) - 1) // s + 1
            for size, u, s, d in zip(a.shape[3:], kernel, stride, dilation, strict=True)
        ]
        *outer, h, w = a.stride()
        steps = [h * stride[0], w * stride[1], h * dilation[0], w * dilation[1]]
        return a.as_strided([*a.shape[:3], *extents, *kernel], [*outer, *steps])

    def columns(self, part: slice, some: slice, dtype: torch.dtype) -> Tensor:
        d = self._delta[part][:, :, :, some].to(dtype).flatten(4)  # [b, R, k, |some|, T/k]
        return d[:, :, 0] if d.shape[2] == 1 else d.transpose(2, 3).flatten(3)

    def gradient(self, role: str, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        if role == "bias":
            return self.columns(part, slice(None), dtype).sum(3)
        a = self.front(self.inputs[0], n)[part]
        out = self._delta.new_empty(len(a), self._delta.shape[1], self._weight_shape.numel(), dtype=dtype)
        self.convolve(a, self._delta[part], slice(None), 1, out)
        return out

    def convolve(self, a: Tensor, delta: Tensor, some: slice, together: int, out: Tensor) -> None:
        """Write G of the output channels ``some`` (all of a grouped or transposed weight) into out [b, R, ·].

        ``together`` examples go through one call.
        """
        for low in range(0, len(a), together):
            block = slice(low, low + together)
            out[block] = self._convolved(a[block].to(out.dtype), delta[block][:, :, :, some].to(out.dtype))

    def _convolved(self, a: Tensor, d: Tensor) -> Tensor:
        """a [e, k, C_in, ...] and δ [e, R, k, O, ...] to G [e, R, P]."""
        e, rows, _, channels = d.shape[:4]
        g, size, dims = self._groups, list(self._kernel), len(self._kernel)
        # Examples are groups, rows are channels of a group, an example's k entries are the batch.
        x = a.transpose(0, 1).flatten(1, 2)
        y = d.unflatten(3, (g, -1)).permute(2, 0, 3, 1, 4, *range(5, 5 + dims)).flatten(1, 4)
        inner = a.shape[2]
        shape = [e * inner, rows * channels // g] if self._transposed else [e * rows * channels, inner // g]
        weight = x.new_empty(1).expand(*shape, *size)
        G: Tensor = torch.ops.aten.convolution_backward(
            y,
            x,
            weight,
            None,
            self._stride,
            self._padding,
            self._dilation,
            self._transposed,
            self._output_padding,
            e * g,
            [False, True, False],
        )[1]
        if self._transposed:
            return G.reshape(e, inner, rows, -1).transpose(1, 2).reshape(e, rows, -1)
        return G.reshape(e, g, rows, -1).transpose(1, 2).reshape(e, rows, -1)


class Affine(Use):
    """x̂·γ + β, or one of them, x̂ made without parameters: normalizations, x * γ, x + β, β.expand(n, …)."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        roles: Mapping[str, nn.Parameter],
        view: Sequence[int],
        normalized: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``view`` is the parameters' shape beside the output, aligned at the last dimension."""
        super().__init__(inputs, roles)
        self._view, self._normalized = view, normalized

    def _kept(self) -> list[int]:
        """The view with one entry for each dimension of the output."""
        assert self.shape is not None
        return [1] * (len(self.shape) - len(self._view)) + list(self._view)

    def admits(self, axis: int) -> bool:
        if self.shape is None or self._kept()[axis] != 1:
            return False
        # What normalizes channels knows them by their place.
        return axis == 0 or self._normalized is None or len(self._view) < len(self.shape) - axis

    def gradient(self, role: str, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        if role == "bias":
            return self._shift(part, dtype)
        x = self.front(self.inputs[0], n)[part].to(dtype)
        if self._normalized is not None:
            x = self._normalized(x.flatten(0, 1)).view_as(x)
        return self._summed(self._delta[part].to(dtype) * x[:, None])

    def _shift(self, part: slice, dtype: torch.dtype) -> Tensor:
        return self._summed(self._delta[part].to(dtype))

    def _summed(self, product: Tensor) -> Tensor:
        """[n, R, k, ...] summed over all that the parameters are broadcast along: [n, R, P]."""
        view = self._kept()
        kept = [1, *view[: self.axis], *view[self.axis + 1 :]]  # k, and the output's other dimensions
        summed = [i + 2 for i, size in enumerate(kept) if size == 1 and product.shape[i + 2] > 1]
        return (product.sum(summed) if summed else product).reshape(*product.shape[:2], -1)


class BatchNorm(Affine):
    """x̂ = (x − μ) / √(σ² + eps) with the running statistics, one of each a channel."""

    def __init__(
        self, x: Tensor, roles: Mapping[str, nn.Parameter], mean: Tensor, var: Tensor, eps: float
    ) -> None:
        super().__init__([x], roles, [x.shape[1], *[1] * (x.dim() - 2)])
        self._mean, self._var, self._eps = mean, var, eps

    def admits(self, axis: int) -> bool:
        return axis == 0

    def gradient(self, role: str, n: int, part: slice, dtype: torch.dtype) -> Tensor:
        if role == "bias":
            return self._shift(part, dtype)
        x = self.front(self.inputs[0], n)[part].to(dtype)
        x = x.reshape(*x.shape[:3], -1)
        d = self._delta[part].to(dtype).reshape(len(x), -1, *x.shape[1:])
        # Σ_p δ_p x̂_p = (Σ_p δ_p x_p − μ Σ_p δ_p) / √(σ² + eps): x̂ is not formed.
        G: Tensor = torch.einsum("nrkct,nkct->nrc", d, x) - self._mean.to(dtype) * self._shift(part, dtype)
        G *= (self._var.to(dtype) + self._eps).rsqrt()
        return G
