"""FAB: the projection against general solvers, and the distances of a linear model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import nn

from tangentlab.attacks import FAB
from tangentlab.attacks.fab import onto_hyperplane


def nearest(x: np.ndarray, w: np.ndarray, value: float, norm: str) -> np.ndarray | None:
    """The same projection by linear programming (linf) or sequential quadratic programming (l2)."""
    d = len(x)
    if norm == "linf":  # unknowns: δ and the bound t on its entries
        eye, one = np.eye(d), np.ones((d, 1))
        found = linprog(
            np.r_[np.zeros(d), 1.0],
            A_ub=np.block([[eye, -one], [-eye, -one]]),
            b_ub=np.zeros(2 * d),
            A_eq=np.r_[w, 0.0][None, :],
            b_eq=[-value],
            bounds=[*zip(-x, 1 - x, strict=True), (0, None)],
        )
        return found.x[:d] if found.success else None
    found = minimize(
        lambda delta: delta @ delta,
        np.zeros(d),
        jac=lambda delta: 2 * delta,
        bounds=list(zip(-x, 1 - x, strict=True)),
        constraints={"type": "eq", "fun": lambda delta: w @ delta + value, "jac": lambda delta: w},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x if found.success and abs(w @ found.x + value) < 1e-8 else None


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_projection_agrees_with_general_solvers(norm: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(30, 7, dtype=torch.float64)
    x[::3, :2] = torch.tensor([0.0, 1.0], dtype=torch.float64)  # on the walls
    w = torch.randn(30, 7, dtype=torch.float64)
    w[::4, 3] = 0
    value = torch.randn(30, dtype=torch.float64)
    found = onto_hyperplane(x, w, value, norm)
    assert (x + found).min() >= 0
    assert (x + found).max() <= 1
    solved = 0
    for i in range(30):
        expected = nearest(x[i].numpy(), w[i].numpy(), float(value[i]), norm)
        if expected is None:
            continue
        solved += 1
        assert abs(float(w[i] @ found[i] + value[i])) < 1e-9
        size = np.abs if norm == "linf" else np.square
        measure = np.max if norm == "linf" else np.sum
        assert measure(size(found[i].numpy())) == pytest.approx(measure(size(expected)), abs=1e-6)
    assert solved > 20


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_out_of_reach_it_goes_to_the_nearest_corner(norm: str) -> None:
    x = torch.tensor([[0.5, 0.25, 0.5]])
    found = onto_hyperplane(x, torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([10.0]), norm)
    assert torch.allclose(x + found, torch.tensor([[0.0, 1.0, 0.5]]))
    still = onto_hyperplane(x, torch.zeros(1, 3), torch.tensor([1.0]), norm)  # no direction at all
    assert torch.equal(still, torch.zeros(1, 3))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_finds_the_distance_of_a_linear_model(norm: str) -> None:
    """Away from the walls |z_y − z_t| / ‖w_y − w_t‖, dual norm; eps lies between the points' distances."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x = 0.4 + 0.2 * torch.rand(40, 1, 3, 4, dtype=torch.float64)
    logits = model(x).detach()
    y = logits.argmax(dim=1)
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    distance = (logits[:, 0] - logits[:, 1]).abs() / (w.abs().sum() if norm == "linf" else w.norm())
    eps = float(distance.median())
    fooled = model(FAB(eps, 20, norm)(model, x, y)).argmax(dim=1) != y
    near, far = distance < 0.999 * eps, distance > eps
    assert near.sum() > 10
    assert far.sum() > 10
    assert fooled[near].all()
    assert not fooled[far].any()
