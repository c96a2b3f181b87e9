"""What a collapse looks like: eigenvectors before and after catastrophic overfitting, as images.

    python benchmarks/collapse_images.py docs/images/collapse.png results/overfitting/collapse.json --seed 1

FGSM training at an eps of tier 1 of the study of overfitting (Fashion-MNIST). Of 100 class-balanced
training examples, crafted by FGSM and by PGD-10 from a zero start, the first eigenvectors v of the trace
kernel are drawn as Σ_i v_i (x_i − their mean), and those of the Gram of the input gradients at unit length as
Σ_i v_i g_i/‖g_i‖: red is up, blue down, each image on its own scale and its share of the trace beneath. The
JSON file has the run, the numbers and the environment.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from tangentlab import data, metrics, modes, ntk
from tangentlab.attacks import FGSM, PGD, Attack
from tangentlab.attacks.threat import ascent, cross_entropies
from tangentlab.probes import update_signals
from tangentlab.records import environment
from tangentlab.runs import RunConfig, train
from tangentlab.runs.build import build_data, build_model
from tangentlab.runs.evaluation import kept_checkpoints
from tangentlab.studies.overfitting import STUDY
from tangentlab.training import load_weights

EXAMPLES, TOP = 100, 4
MOMENTS = {"2 epochs before": -2.0, "last look before": 0.0, "2 epochs after": 2.0}
ROWS = {"fgsm": "kernel on\nFGSM inputs", "pgd": "kernel on\nPGD inputs", "gradients": "input\ngradients"}


@dataclass(frozen=True)
class Eigenvectors:
    """Images [TOP, height, width] and their shares of the trace."""

    images: Tensor
    shares: list[float]
    entropy_rank: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tier", type=int, default=1)
    parser.add_argument("--eps", default="0.2")
    options = parser.parse_args()
    # Once, before the files are touched: the commit would look changed.
    machine = environment()
    config = STUDY.runs(options.tier, [options.seed])[f"fgsm-{options.eps}-{options.seed}"]
    with tempfile.TemporaryDirectory() as folder:
        record = train(config, Path(folder) / "run")
        epochs, robust = record.series("robust_accuracy")
        fgsm = record.series("fgsm_accuracy")[1]
        collapse = metrics.catastrophic_overfitting(epochs, fgsm, robust, lasting=metrics.LASTING_EPOCHS)
        if collapse is None:
            raise SystemExit(f"seed {options.seed} did not collapse; give another --seed")
        seen = {name: look(record.folder, config, collapse.epoch + shift) for name, shift in MOMENTS.items()}
    draw(seen, options.image)
    told = {
        "environment": machine,
        "config": config.to_dict(),
        "collapse_epoch": collapse.epoch,
        "robust_accuracy": dict(zip(("epoch", "value"), (epochs, robust), strict=True)),
        "moments": {name: numbers(*found) for name, found in seen.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(told, indent=1) + "\n")


def look(
    run: Path, config: RunConfig, until: float
) -> tuple[float, dict[str, float], dict[str, Eigenvectors]]:
    """Epoch, update signals and eigenvectors by row, of the last checkpoint kept up to that epoch."""
    examples = build_data(config)
    model = build_model(config, examples, torch.device("cpu"))
    for path in reversed(kept_checkpoints(run).values()):  # the first is the network before training
        at = load_weights(path, model)["extra"]["epoch"]
        if at <= until:
            break
    index = data.class_balanced(examples.train.labels, EXAMPLES, seed=config.seed)
    x, y = examples.train.x(index), examples.train.labels[index]
    attacks: dict[str, Attack] = {
        "fgsm": FGSM(config.eps),
        "pgd": PGD(config.eps, config.eps / 4, 10, random_start=False),
    }
    with modes.evaluation(model):
        crafted = {name: attack(model, x, y) for name, attack in attacks.items()}
        gradients = ascent(model, x, lambda logits: cross_entropies(logits, y)).gradient
    found = {
        name: eigenvectors(ntk(model, inputs, kind="trace"), inputs - inputs.mean(dim=0))
        for name, inputs in crafted.items()
    }
    lengths = gradients.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradients.dtype).tiny)
    directions = gradients / lengths[:, None, None, None]
    found["gradients"] = eigenvectors(directions.flatten(1) @ directions.flatten(1).T, directions)
    return at, update_signals(model, crafted["fgsm"], crafted["pgd"], y), found


def eigenvectors(kernel: Tensor, images: Tensor) -> Eigenvectors:
    """The kernel's [n, n] first ones, as combinations of the images [n, channels, height, width]."""
    spectrum = metrics.spectrum(kernel)
    vectors = torch.linalg.eigh(kernel.double()).eigenvectors.flip(1)[:, :TOP]
    combined = torch.einsum("nk,nchw->khw", vectors, images.double())
    return Eigenvectors(combined, spectrum.shares[:TOP].tolist(), float(spectrum.entropy_rank))


def numbers(epoch: float, updates: dict[str, float], found: dict[str, Eigenvectors]) -> dict[str, Any]:
    """What stands beside the images."""
    spectra = {name: {"shares": one.shares, "entropy_rank": one.entropy_rank} for name, one in found.items()}
    return {"epoch": epoch, **updates, **spectra}


def draw(seen: dict[str, tuple[float, dict[str, float], dict[str, Eigenvectors]]], path: Path) -> None:
    """A block of TOP columns for each moment, a row for each kind."""
    figure = plt.figure(figsize=(11, 3.6), layout="constrained")
    blocks: Any = figure.subfigures(1, len(seen))
    for block, (name, (epoch, _, found)) in zip(blocks, seen.items(), strict=True):
        block.suptitle(f"{name} (epoch {epoch:g})", fontsize=10)
        axes = block.subplots(len(ROWS), TOP)
        for row, (kind, label) in zip(axes, ROWS.items(), strict=True):
            one = found[kind]
            for axis, image, share in zip(row, one.images, one.shares, strict=True):
                limit = float(image.abs().max()) or 1.0
                axis.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
                axis.set(xticks=[], yticks=[])
                axis.set_xlabel(f"{100 * share:.0f} %", fontsize=7, labelpad=1)
            if name == next(iter(seen)):
                row[0].set_ylabel(label, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
