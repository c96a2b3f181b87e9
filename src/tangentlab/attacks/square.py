"""Square Attack: random squares, kept where the margin falls; no gradients (Andriushchenko et al. 2020).

Algorithms 1 (search), 2 (linf) and 3 (l2) of arXiv 1912.00049. The loss is z_y − max_{i≠y} z_i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks.apgd import margins
from tangentlab.attacks.threat import (
    NaNWatch,
    Passes,
    check_count,
    check_eps,
    check_generator,
    check_norm,
    crafting,
    lengths,
    per_example,
    predicted,
)
from tangentlab.errors import ConfigError

# Share of the image that a square covers, halved after these queries. The paper stretches the schedule to
# other budgets than 10,000 queries; AutoAttack does not, and neither do we.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class Square:
    """Random search over squares, each example at its own place; it stops at an example's first success.

    Returned is the point of the smallest margin. Images only: x is [n, channels, height, width].

    Args:
        eps: radius of the ball, in units of inputs in [0, 1].
        num_queries: forwards per example at most, at least 1; 5000 in AutoAttack.
        norm: "linf" or "l2".
        initial_share: p, the share of the image that the first squares cover, in (0, 1].
    """

    eps: float
    num_queries: int = 5000
    norm: str = "linf"
    initial_share: float = 0.8

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_eps(self.eps, norm=self.norm)
        check_count(self.num_queries, "num_queries")
        if not 0 < self.initial_share <= 1:
            raise ConfigError(f"initial_share={self.initial_share:g} is out of range (0, 1]")

    @property
    def passes(self) -> Passes:
        """The most forwards per example."""
        return Passes(forwards=self.num_queries)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The points of smallest margin; places and signs are drawn from ``generator``.

        Raises:
            ConfigError: no generator, or x is not [n, channels, height, width].
            ModelError: the logits are NaN, or the model has one class.
        """
        generator = check_generator(generator)
        if x.dim() != 4:
            raise ConfigError(
                f"Square draws squares on images [n, channels, height, width], not {list(x.shape)}"
            )
        start, propose = (_stripes, _square_linf) if self.norm == "linf" else (_tiles_l2, _square_l2)
        with crafting(model, x, y) as (x, y):
            result = start(x, self.eps, generator)
            # What is still searched: fooled examples are taken out and cost no more queries.
            left, x_adv = torch.arange(len(x), device=x.device), result.clone()
            margin, fooled = _judge(model, x_adv, y)
            for query in range(1, self.num_queries):
                if bool(fooled.any()):
                    left, x, y, x_adv, margin = (part[~fooled] for part in (left, x, y, x_adv, margin))
                if not len(left):
                    break
                side = square_side(query - 1, x.shape, self.initial_share, self.norm)
                candidate = propose(x_adv, x, self.eps, side, generator)
                value, fooled = _judge(model, candidate, y)
                better = fooled | (value < margin)
                x_adv = torch.where(per_example(better, x), candidate, x_adv)
                margin = torch.where(better, value, margin)
                result[left[fooled]] = x_adv[fooled]
            result[left] = x_adv
        return result


def square_side(query: int, shape: torch.Size, initial_share: float, norm: str) -> int:
    """Side of the square at a query, counted from 0: ⌊√(p·h·w)⌉, at least 1; in l2 odd and at least 3."""
    height, width = shape[-2:]
    share = initial_share / 2 ** sum(query > halving for halving in HALVINGS)
    side = round(math.sqrt(share * height * width))
    side = max(side, 1) if norm == "linf" else max(side, 3) | 1
    return min(side, height, width)


def eta(height: int, width: int, x: Tensor) -> Tensor:
    """The l2 perturbation of a height × width window (section 3.3), of norm 1, in x's precision.

    Two pyramids of opposite sign, one on each half of the rows; the value in ring d around a pyramid's
    centre is Σ_{j=d+1}^{m+1} 1/j², m the outermost ring.
    """
    upper = height // 2
    halves = [_pyramid(upper, width), -_pyramid(height - upper, width)]
    window = torch.cat(halves)
    return (window / window.square().sum().sqrt()).to(x)


def _pyramid(height: int, width: int) -> Tensor:
    rows = (torch.arange(height, dtype=torch.float64) - height // 2).abs()
    columns = (torch.arange(width, dtype=torch.float64) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns[None, :])
    outermost = max(height // 2, width // 2)
    terms = 1.0 / torch.arange(1, outermost + 2, dtype=torch.float64).square()
    values = terms.flip(0).cumsum(0).flip(0)[ring.long()]
    return values / values.square().sum().sqrt() if height else values


def _judge(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The margin of each example, and whether it is misclassified."""
    logits = predicted(model, x)
    margin = margins(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
    # A NaN margin counts as a success, so the one look at the device that finds successes finds it too.
    fooled = (logits.argmax(dim=1) != y) | margin.isnan()
    if bool(fooled.any()):
        watch = NaNWatch()
        watch.see(margin)
        watch.refuse()
    return margin, fooled


def _stripes(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """x ± eps, one sign for each channel and column."""
    signs = _signs((len(x), x.shape[1], 1, x.shape[3]), x, generator)
    return (x + eps * signs).clamp_(0.0, 1.0)


def _square_linf(x_adv: Tensor, x: Tensor, eps: float, side: int, generator: torch.Generator) -> Tensor:
    """x ± eps inside a square, one sign for each channel; x_adv outside."""
    inside = _window(x, side, generator).inside
    signs = _signs((len(x), x.shape[1], 1, 1), x, generator)
    return torch.where(inside, (x + eps * signs).clamp_(0.0, 1.0), x_adv)


def _tiles_l2(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """A grid of about 5 × 5 windows eta, one sign for each window and channel, of norm eps."""
    height, width = x.shape[-2:]
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    tile = eta(side, side, x)
    signs = _signs((len(x), x.shape[1], rows, columns), x, generator)
    flips = _uniform((len(x), 1, rows, columns), x, generator) > 0.5
    large = [part.repeat_interleave(side, 2).repeat_interleave(side, 3) for part in (signs, flips)]
    shape = large[1].shape
    tiles = torch.where(
        large[1], tile.T.repeat(rows, columns).expand(shape), tile.repeat(rows, columns).expand(shape)
    )
    delta = torch.zeros_like(x)
    top, first = (height - rows * side) // 2, (width - columns * side) // 2
    delta[:, :, top : top + rows * side, first : first + columns * side] = large[0] * tiles
    return _on_sphere(delta, x, eps)


def _square_l2(x_adv: Tensor, x: Tensor, eps: float, side: int, generator: torch.Generator) -> Tensor:
    """Takes the perturbation's mass out of one window and puts it, reshaped, into another (algorithm 3)."""
    delta = x_adv - x
    to, source = _window(x, side, generator), _window(x, side, generator)
    shape = eta(side, side, x)
    rows, columns = to.offsets
    flip = _uniform((len(x), 1, 1, 1), x, generator) > 0.5
    placed = torch.where(flip, shape[columns, rows], shape[rows, columns])
    signs = _signs((len(x), x.shape[1], 1, 1), x, generator)

    here = delta * to.inside
    fresh = (signs * placed + here / (_plane_lengths(here) + 1e-12)) * to.inside
    either = to.inside | source.inside
    unused = (eps**2 - per_example(lengths(delta, "l2").square(), x)).clamp_min(0) / x.shape[1]
    mass = (_plane_lengths(delta * either).square() + unused).sqrt()
    fresh = fresh / (_plane_lengths(fresh) + 1e-12) * mass
    moved = torch.where(to.inside, fresh, torch.where(source.inside, torch.zeros_like(delta), delta))
    return _on_sphere(moved, x, eps)


@dataclass(frozen=True)
class _Window:
    inside: Tensor  # [n, 1, h, w], boolean
    offsets: tuple[
        Tensor, Tensor
    ]  # row and column within the window, clamped outside; [n, 1, h, 1], [n, 1, 1, w]


def _window(x: Tensor, side: int, generator: torch.Generator) -> _Window:
    """A square at a uniform place of each image, all of it inside."""
    height, width = x.shape[-2:]
    place = _uniform((len(x), 2), x, generator)
    offsets = []
    for axis, length in enumerate((height, width)):
        corner = (place[:, axis] * _places(length, side)).long().clamp_max(length - side)
        offset = torch.arange(length, device=x.device)[None, :] - corner[:, None]
        offsets.append(offset.reshape(len(x), 1, *((length, 1) if axis == 0 else (1, length))))
    rows, columns = offsets
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return _Window(inside, (rows.clamp(0, side - 1), columns.clamp(0, side - 1)))


def _places(length: int, side: int) -> int:
    # The authors' code has one fewer and never reaches the last row and column; the paper does.
    return length - side + 1


def _on_sphere(delta: Tensor, x: Tensor, eps: float) -> Tensor:
    scale = eps / lengths(delta, "l2").clamp_min(1e-12)
    return (x + delta * per_example(scale, x)).clamp_(0.0, 1.0)


def _plane_lengths(delta: Tensor) -> Tensor:
    """The l2 norm of each channel, [n, c, 1, 1]."""
    return delta.square().sum(dim=(-2, -1), keepdim=True).sqrt()


def _signs(shape: tuple[int, ...], x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(_uniform(shape, x, generator) < 0.5, -1.0, 1.0).to(x)


def _uniform(shape: tuple[int, ...], x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(x.device)
