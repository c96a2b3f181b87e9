"""What a checkpoint holds: weights, buffers, the optimizer's tensors, and where training stands.

Plain tensors and JSON in one safetensors file, nothing that could execute code. Names: ``model/<name>``,
``averaged/<name>``, ``optimizer/<parameter index>/<name>``, ``memory/<name>``, ``loop/loss_sum``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab.attacks import Passes
from tangentlab.errors import CheckpointError, ModelError
from tangentlab.files import read_tensors, under, write_tensors
from tangentlab.training.loop import TrainingState
from tangentlab.training.method import Memory

FORMAT = 2
"""Of what training goes on from; its names and their meaning."""


def save_checkpoint(
    path: Path, state: TrainingState, extra: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write the state atomically; ``extra`` (JSON-able) and ``tensors`` come back when it is loaded."""
    held = all_weights(state)
    held |= {f"extra/{name}": value for name, value in tensors.items()}
    held |= {f"memory/{name}": value for name, value in state.memory.tensors.items()}
    scalars: dict[str, Any] = {}
    for index, entries in state.optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                held[f"optimizer/{index}/{name}"] = value
            else:
                scalars[f"{index}/{name}"] = value
    held["loop/loss_sum"] = state.loss_sum
    metadata = {
        "format": FORMAT,
        "step": state.step,
        "passes": list(state.passes),
        "steering": state.steering,
        "summed_learning_rate": state.summed_learning_rate,
        "loss_count": state.loss_count,
        "seconds": state.seconds,
        "optimizer": scalars,
        "extra": dict(extra),
    }
    write_tensors(path, held, metadata)


def save_weights(path: Path, state: TrainingState, extra: Mapping[str, Any]) -> None:
    """Write the judged network's weights and buffers alone, atomically, with the step and ``extra``."""
    write_weights(path, judged_weights(state), state.step, extra)


def all_weights(state: TrainingState) -> dict[str, Tensor]:
    """The weights and buffers of the network and of its average, by a checkpoint's names."""
    averaged = {} if state.averaged is None else _weights(state.averaged.module, "averaged/")
    return {**_weights(state.model), **averaged}


def load_all_weights(state: TrainingState, weights: Mapping[str, Tensor]) -> None:
    """Put what :func:`all_weights` gave, or copies of it, back into the network and its average."""
    state.model.load_state_dict(under(weights, "model/"))
    if state.averaged is not None:
        state.averaged.module.load_state_dict(under(weights, "averaged/"))


def judged_weights(state: TrainingState) -> dict[str, Tensor]:
    """The judged network's weights and buffers, as they lie in it, by the names of a checkpoint."""
    return _weights(state.evaluated)


def write_weights(path: Path, weights: Mapping[str, Tensor], step: int, extra: Mapping[str, Any]) -> None:
    """Write what :func:`judged_weights` gave, or copies of it, as :func:`save_weights` does."""
    write_tensors(path, weights, {"step": step, "extra": dict(extra)})


def load_checkpoint(path: Path, state: TrainingState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put the saved state into ``state``, bit for bit; returns ``extra`` and the extra tensors.

    Raises:
        CheckpointError: unreadable, or of another model.
    """
    tensors, metadata = read_tensors(path)
    if "optimizer" in metadata and metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is another version's; training cannot go on from it")
    _load_weights(path, tensors, state.model)
    if state.averaged is not None:
        _load_weights(path, tensors, state.averaged.module, "averaged/")
        state.averaged.n_averaged.fill_(metadata.get("step", 0))
    device = state.loss_sum.device
    # Counters are looked at in every step: they stay on the CPU.
    memory = under(tensors, "memory/")
    state.memory = Memory({key: value.to(device) if value.dim() else value for key, value in memory.items()})
    try:
        entries: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/", 2)
                entries.setdefault(int(index), {})[name] = value
        for key, value in metadata["optimizer"].items():
            index, name = key.split("/", 1)
            entries.setdefault(int(index), {})[name] = value
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        _lay_out(state.optimizer)
        state.loss_sum = tensors["loop/loss_sum"].to(state.loss_sum.device)
        state.step = metadata["step"]
        state.passes = Passes(*metadata["passes"])
        state.steering = metadata["steering"]
        state.summed_learning_rate = metadata["summed_learning_rate"]
        state.loss_count = metadata["loss_count"]
        state.seconds = metadata["seconds"]
        extra: dict[str, Any] = metadata["extra"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold a training state: {error!r}") from error
    return extra, under(tensors, "extra/")


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Put the saved weights and buffers, averaged where they are, into ``model``; returns {"step", "extra"}.

    Raises:
        CheckpointError: unreadable, or of another model.
    """
    tensors, metadata = read_tensors(path)
    averaged = any(key.startswith("averaged/") for key in tensors)
    _load_weights(path, tensors, model, "averaged/" if averaged else "model/")
    return {"step": metadata.get("step"), "extra": metadata.get("extra", {})}


def _weights(model: nn.Module, prefix: str = "model/") -> dict[str, Tensor]:
    """The state dict under the prefix; raises ModelError for what is no tensor: nothing safe can hold it."""
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the model's state {name!r} is a {type(value).__name__}; checkpoints hold tensors"
            )
    return {f"{prefix}{name}": value for name, value in state.items()}


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Momenta in their parameters' memory layout: a fused optimizer pairs them as they lie there."""
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _load_weights(
    path: Path, tensors: Mapping[str, Tensor], model: nn.Module, prefix: str = "model/"
) -> None:
    saved = under(tensors, prefix)
    own = model.state_dict()
    differences = [f"{name} is missing" for name in own if name not in saved]
    differences += [f"{name} is not in the model" for name in saved if name not in own]
    differences += [
        f"{name} has shape {tuple(saved[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise CheckpointError(f"{path} is a checkpoint of another model: {differences[0]}{more}")
    with torch.no_grad():
        model.load_state_dict(saved)
