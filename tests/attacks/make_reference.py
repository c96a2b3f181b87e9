"""Trains the network of ``reference.npz``, runs the authors' AutoAttack on it, and prints the comparison.

    python tests/attacks/make_reference.py [--seeds 3] [--compare-only]

``autoattack`` (github.com/fra31/auto-attack) must be importable; its numbers are stored, none of its code is
used by the tests. Every attack runs alone on all points, then "standard" runs them in a row, with 3 seeds.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
from autoattack_reference import ATTACKS, PATH, Reference, network
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from tangentlab.attacks import PGD, Attack, AutoAttack
from tangentlab.randomness import generator

EPS = {"linf": 0.2, "l2": 0.7}  # about half of the points are robust
TRAIN_EPS = 0.15
TRAIN, EPOCHS, BATCH = 1397, 20, 64


def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """PGD training in linf on the first digits; the last 400 are kept for the attacks."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    attack = PGD(TRAIN_EPS, TRAIN_EPS / 4, 7)
    noise = generator(0, "train")
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAIN, generator=noise).split(BATCH):
            model.eval()
            x_adv = attack(model, x[rows], y[rows], generator=noise)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y[rows]).backward()
            optimizer.step()
    return model.eval(), x[TRAIN:], y[TRAIN:]


def theirs(model: nn.Module, x: torch.Tensor, y: torch.Tensor, norm: str, name: str, seed: int) -> np.ndarray:
    """The points that the authors' attack leaves correct."""
    import autoattack

    options = {
        "norm": {"linf": "Linf", "l2": "L2"}[norm],
        "eps": EPS[norm],
        "device": "cpu",
        "seed": seed,
        "verbose": False,
    }
    if name == "standard":
        adversary = autoattack.AutoAttack(model, version="standard", **options)
    else:
        adversary = autoattack.AutoAttack(model, version="custom", attacks_to_run=[name], **options)
        # What version="standard" sets.
        adversary.apgd.n_restarts = adversary.fab.n_restarts = adversary.apgd_targeted.n_restarts = 1
        adversary.fab.n_target_classes = adversary.apgd_targeted.n_target_classes = 9
        adversary.square.n_queries = 5000
    x_adv = adversary.run_standard_evaluation(x, y, bs=len(x))
    with torch.no_grad():
        return ((model(x_adv).argmax(1) == y) & (model(x).argmax(1) == y)).numpy()


def ours(norm: str, name: str) -> Attack:
    attack = AutoAttack(EPS[norm], norm)
    return attack if name == "standard" else attack.attacks(10)[name]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--compare-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.compare_only:
        model, x, y = trained()
        stored = {f"model/{name}": value.numpy() for name, value in model.state_dict().items()}
        stored["x"], stored["y"] = (16 * x).round().byte().numpy(), y.byte().numpy()
        for norm, eps in EPS.items():
            stored[f"eps/{norm}"] = np.array(eps)
            for name in ATTACKS:
                started = time.perf_counter()
                masks = [theirs(model, x, y, norm, name, seed) for seed in range(arguments.seeds)]
                stored[f"{norm}/{name}"] = np.stack(masks)
                seconds = (time.perf_counter() - started) / arguments.seeds
                sys.stderr.write(f"{norm} {name}: {[int(m.sum()) for m in masks]}, {seconds:.1f} s\n")
        np.savez_compressed(PATH, **stored)
    compare(Reference.load(), arguments.seeds)


def compare(reference: Reference, seeds: int) -> None:
    """A row for each norm and attack.

    Robust points by the authors and by us, seed by seed; their standard error; points of another verdict, and
    such points between the authors' own first and last seed; our seconds.
    """
    n = len(reference.x)
    for norm in EPS:
        for name in ATTACKS:
            started = time.perf_counter()
            mine = [reference.survivors(ours(norm, name), n, seed) for seed in range(seeds)]
            seconds = (time.perf_counter() - started) / seeds
            authors = list(reference.masks[norm, name])
            share = float(torch.stack(authors).double().mean())
            error = (share * (1 - share) * n) ** 0.5
            differ = [int((a != b).sum()) for a, b in zip(mine, authors, strict=False)]
            between = int((authors[0] != authors[-1]).sum())
            counts = "/".join(str(int(m.sum())) for m in mine)
            expected = "/".join(str(int(m.sum())) for m in authors)
            sys.stdout.write(
                f"| {norm} | {name} | {expected} | {counts} | {error:.1f} | {differ} | {between} "
                f"| {seconds:.1f} s |\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
