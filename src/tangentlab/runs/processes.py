"""Several processes: who started them, how they meet, and what they agree on at every step.

Lightning Fabric makes the devices, the precision and the data-parallel wrapper. The processes are started by
its launcher, by torchrun, or by srun.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from tangentlab.errors import ConfigError, OtherProcessError, TangentlabError
from tangentlab.runs.build import resolve_device
from tangentlab.runs.config import RunConfig
from tangentlab.runs.hooks import Interruption
from tangentlab.training import Share


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Args:
        by: torchrun, srun, or tangentlab itself.
        rank: of this process, from 0.
        world_size: processes in all; None where tangentlab starts as many as the configuration says.
        nodes: machines that they run on.
        alone: this process starts the others.
    """

    by: str
    rank: int = 0
    world_size: int | None = None
    nodes: int = 1
    alone: bool = False


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """What the launcher's variables say."""

    def number(name: str) -> int:
        return int(environment.get(name, 1))

    if "RANK" in environment:
        size = number("WORLD_SIZE")
        return Launch(
            "torchrun", number("RANK"), size, size // int(environment.get("LOCAL_WORLD_SIZE", size))
        )
    if "LOCAL_RANK" in environment:
        return Launch("tangentlab", number("LOCAL_RANK"))
    # A batch script is no step, an interactive shell one of a single task: neither started other processes.
    if number("SLURM_STEP_NUM_TASKS") > 1:
        size, nodes = number("SLURM_STEP_NUM_TASKS"), number("SLURM_STEP_NUM_NODES")
        return Launch("srun", number("SLURM_PROCID"), size, nodes)
    return Launch("tangentlab", alone=True)


def check_size(config: RunConfig, launched: Launch) -> None:
    """Raise ConfigError unless the launcher started as many processes as the configuration says."""
    size, by = launched.world_size, launched.by
    if size is not None and size != config.processes:
        raise ConfigError(f"processes={config.processes}, but {by} started {size}; give --processes {size}")
    if config.processes % launched.nodes:
        raise ConfigError(
            f"processes={config.processes} are not spread evenly over {by}'s {launched.nodes} nodes"
        )


def is_first_process() -> bool:
    """Whether this process, of those that a run is started in, is the one that writes and speaks."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return launch().rank == 0


def connect(config: RunConfig, launched: Launch) -> Any:
    """The launched Fabric of the run's device, precision and processes; starts those that do not run yet."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # else it repeats the configuration
    device = resolve_device(config.device)
    several = config.processes > 1
    if launched.by == "srun":
        _name_as_torchrun(launched)
    fabric = Fabric(
        accelerator=device.type,
        devices=config.processes // launched.nodes,
        num_nodes=launched.nodes,
        # The others wait for the first process's evaluations and probes, however long those take.
        # Buffers agree once a step: broadcast at each forward, they would change under a loss of two.
        strategy=DDPStrategy(timeout=timedelta(days=1), broadcast_buffers=False) if several else "auto",
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[config.precision],  # type: ignore[arg-type]
        # Named, for Fabric's own guess takes a SLURM batch script for one of srun's tasks.
        plugins=[LightningEnvironment() if launched.by == "tangentlab" else TorchElasticEnvironment()],
    )
    fabric.launch()
    if torch.distributed.is_initialized():
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    # Its threads must end before the interpreter does, or the process aborts; Fabric sees to NCCL's only.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _name_as_torchrun(launched: Launch) -> None:
    """Set torchrun's variables from srun's."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    given, size = os.environ, launched.world_size or 1
    root = SLURMEnvironment.resolve_root_node_address(given["SLURM_STEP_NODELIST"])
    step = 100 * int(given["SLURM_JOB_ID"]) + int(given["SLURM_STEP_ID"])
    given.setdefault("MASTER_ADDR", root if launched.nodes > 1 else "127.0.0.1")
    given.setdefault("MASTER_PORT", str(15000 + step % 15000))  # the same to all; below those given at random
    given |= {
        "RANK": str(launched.rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(size // launched.nodes),
        "GROUP_RANK": given["SLURM_NODEID"],
    }


def meet(fabric: Any, error: TangentlabError | None) -> None:
    """Every process comes here once, when it is ready to train or with the error that it is not.

    Raises:
        TangentlabError: on the first process its own error.
        OtherProcessError: elsewhere, or where the first has none: the error of one that has.
    """
    if fabric.world_size == 1:
        if error is not None:
            raise error
        return
    errors: list[str | None] = [None] * fabric.world_size
    torch.distributed.all_gather_object(errors, None if error is None else str(error))
    if error is not None and fabric.global_rank == 0:
        raise error
    for rank, text in enumerate(errors):
        if text is not None:
            raise OtherProcessError(f"process {rank}: {text}") from error


def wrap(fabric: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """What the loss goes through."""
    with warnings.catch_warnings():
        # Its new name is not known to every PyTorch that we run on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated")
        wrapped: nn.Module
        wrapped, _ = fabric.setup(model, optimizer)
    return wrapped


def is_lost_connection(error: RuntimeError | ValueError) -> bool:
    """Whether the error is that another process is gone; that one tells why."""
    lost = ("closed by peer", "reset by peer", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(text in str(error) for text in lost)


def share(fabric: Any) -> Share:
    """This process's share of every batch."""
    if fabric.world_size == 1:
        return Share()

    def gather(rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(fabric.world_size)]
        torch.distributed.all_gather(parts, rows)
        return torch.cat(parts)

    return Share(fabric.global_rank, fabric.world_size, gather)


def agree(fabric: Any, interruption: Interruption, loss: Tensor, model: nn.Module) -> Tensor:
    """The mean of the processes' losses; their floating-point buffers become equal, their mean too.

    A stop that one of them was asked for is one for all, at this step.
    """
    if fabric.world_size == 1:
        interruption.asked = interruption.heard
        return loss
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    heard = loss.new_full((1,), float(interruption.heard), dtype=torch.float64)
    flat = torch.cat([loss.double().reshape(1), heard, *(buffer.double().flatten() for buffer in buffers)])
    mean = fabric.all_reduce(flat, reduce_op="mean")
    interruption.asked = bool(mean[1] > 0)
    with torch.no_grad():
        for buffer, values in zip(buffers, mean[2:].split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))
    first: Tensor = mean[0]
    return first
