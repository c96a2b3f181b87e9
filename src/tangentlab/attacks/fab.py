"""FAB: the nearest point across a decision boundary (Croce & Hein 2020, arXiv 1907.02044, algorithm 1).

At x_k the boundary between y and a target class t is linearised, h(z) = f(x_k) + ∇f(x_k)·(z − x_k) with
f = z_t − z_y. The projections on {h = 0} and the box of x_k, by δ_k, and of x, by δ, are combined:

    x_{k+1} = (1 − α)(x_k + η δ_k) + α(x + η δ),   α = min(‖δ_k‖ / (‖δ_k‖ + ‖δ‖), α_max)

and once x_{k+1} is misclassified, it goes back towards x: x + β(x_{k+1} − x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangentlab.attacks.apgd import likeliest_others
from tangentlab.attacks.threat import (
    NaNWatch,
    Passes,
    ascent,
    check_count,
    check_eps,
    check_norm,
    crafting,
    lengths,
    per_example,
    predicted,
    project,
)

ALPHA_MAX = 0.1
OVERSHOOT = 1.05  # η
BACKWARD = 0.9  # β


@dataclass(frozen=True)
class FAB:
    """The targeted form, FAB-T: one search for each of the likeliest other classes, from x itself.

    It minimises the distance, not a loss at a given one: an example is fooled if the nearest misclassified
    point is within eps. Elsewhere the nearest point found is put on the ball, and x stays where nothing
    was found or it is misclassified already. Nothing is random: AutoAttack's FAB-T has no restarts.

    Args:
        eps: radius of the ball, in units of inputs in [0, 1].
        num_steps: at least 1; 100 in AutoAttack.
        norm: "linf" or "l2".
        num_target_classes: 9 in AutoAttack; C − 1 where there are fewer.
    """

    eps: float
    num_steps: int = 100
    norm: str = "linf"
    num_target_classes: int = 9

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_eps(self.eps, norm=self.norm)
        check_count(self.num_steps, "num_steps")
        check_count(self.num_target_classes, "num_target_classes")

    @property
    def passes(self) -> Passes:
        """The most passes per example: fooled ones are left out of the further targets."""
        steps = self.num_target_classes * self.num_steps
        return Passes(forwards=1 + 2 * steps, input_backwards=steps)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The nearest adversarial points; nothing is drawn from ``generator``.

        Raises:
            ModelError: the input gets no gradient, or a NaN.
        """
        with crafting(model, x, y) as (x, y):
            logits = predicted(model, x)
            targets = likeliest_others(logits, y, self.num_target_classes)
            x_adv = x.clone()
            distance = x.new_full((len(x),), torch.inf)
            left = (logits.argmax(dim=1) == y).nonzero().squeeze(1)
            for number in range(targets.shape[1]):
                if not len(left):
                    break
                found, length = self._search(model, x[left], y[left], targets[left, number])
                nearer = length < distance[left]
                x_adv[left[nearer]] = found[nearer]
                distance[left[nearer]] = length[nearer]
                left = left[distance[left] > self.eps]
        # Points beyond eps are of no use but as a direction.
        outside = per_example(distance > self.eps, x)
        return torch.where(outside, project(x_adv, x, self.eps, self.norm), x_adv)

    def _search(self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest misclassified point met, and its distance (infinite where none was met)."""
        watch = NaNWatch()
        current, best = x, x
        distance = x.new_full((len(x),), torch.inf)

        def gap(logits: Tensor) -> Tensor:
            return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

        for _ in range(self.num_steps):
            _, value, slope = ascent(model, current, gap)
            watch.see(slope)
            watch.see(value)
            # h at x, of the same linearisation as at the current point
            at_x = value + (slope * (x - current)).flatten(1).sum(dim=1)
            step = onto_hyperplane(current, slope, value, self.norm)
            step_x = onto_hyperplane(x, slope, at_x, self.norm)
            a, b = (lengths(delta, self.norm).clamp_min(1e-8) for delta in (step, step_x))
            alpha = per_example((a / (a + b)).clamp_max(ALPHA_MAX), x)
            current = (1 - alpha) * (current + OVERSHOOT * step) + alpha * (x + OVERSHOOT * step_x)
            current = current.clamp_(0.0, 1.0)
            fooled = predicted(model, current).argmax(dim=1) != y
            length = lengths(current - x, self.norm)
            nearer = fooled & (length < distance)
            best = torch.where(per_example(nearer, x), current, best)
            distance = torch.where(nearer, length, distance)
            current = torch.where(per_example(fooled, x), x + BACKWARD * (current - x), current)
        watch.refuse()
        return best, distance


def onto_hyperplane(x: Tensor, w: Tensor, value: Tensor, norm: str) -> Tensor:
    """The shortest δ with value + w·δ = 0 and x + δ in the box [0, 1], example by example (section 3.1).

    Where no point of the box is on the hyperplane, δ goes to the corner nearest to it.

    δ_i = s_i·min(λ·r_i, room_i): all coordinates go in the direction s_i = −sign(value·w_i) that reduces
    |value|, at the rate r_i = 1 (linf) or |w_i| (l2), until the wall. The reduction Σ|w_i|·min(λ·r_i, room_i)
    grows with λ and is linear between the walls' λ_i = room_i/r_i, so sorting these gives λ exactly.

    Args:
        x: points of the box, [n, …].
        w: the hyperplanes' normals, x's shape.
        value: h(x), [n].
        norm: "linf" or "l2".
    """
    flat, normal = x.flatten(1), w.flatten(1)
    # Only the ratio counts; scaled so that squares of small gradients do not vanish.
    scale = lengths(normal, "linf").clamp_min(torch.finfo(x.dtype).tiny)
    normal, value = normal / scale[:, None], value / scale
    sign = -torch.where(value >= 0, 1.0, -1.0).to(x)[:, None] * normal.sign()
    room = torch.where(sign > 0, 1 - flat, flat)
    weight = normal.abs()
    rate = torch.ones_like(weight) if norm == "linf" else weight
    # Coordinates without weight never count; a wall far away keeps infinities out of the sums.
    wall = torch.where(weight > 0, room / rate.clamp_min(torch.finfo(x.dtype).tiny), 1e12).clamp_max(1e12)
    wall, order = wall.sort(dim=1)
    at_walls = (weight * room).gather(1, order)
    slopes = (weight * rate).gather(1, order)
    done = at_walls.cumsum(dim=1)  # by coordinates at their walls
    # Summed from the end, so that the tail of weightless coordinates is exactly 0.
    open_slope = slopes.flip(1).cumsum(dim=1).flip(1)
    after = torch.nn.functional.pad(open_slope[:, 1:], (0, 1))
    reduction = done + wall * after
    needed = value.abs()[:, None]
    index = (reduction < needed).sum(dim=1, keepdim=True)
    reachable = index < flat.shape[1]
    index = index.clamp_max(flat.shape[1] - 1)
    before = (done - at_walls).gather(1, index)
    level = (needed - before).clamp_min(0) / open_slope.gather(1, index).clamp_min(torch.finfo(x.dtype).tiny)
    level = torch.where(reachable, level, 1e12).clamp_max(1e12)
    return (sign * torch.minimum(level * rate, room)).reshape(x.shape)
