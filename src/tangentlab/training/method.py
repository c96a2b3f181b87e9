"""What a training method is: settings that turn a batch into the loss that the step minimises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangentlab import modes
from tangentlab.attacks import Attack, Passes
from tangentlab.attacks.threat import check_eps
from tangentlab.errors import ConfigError, unknown_choice

FORWARDS = ("crafting", "loss", "clean")
"""The forwards of a step that may update BatchNorm's buffers."""


class Network(NamedTuple):
    """The network as a step sees it.

    Args:
        bare: the module itself, for crafting: no data-parallel wrapper, no hooks.
        trained: what the loss goes through; under data-parallel training the wrapper around ``bare``. It is
            called once a step: a wrapper that synchronises buffers at every forward would change what the
            first forward saved for its backward. Further terms go through ``bare``, whose gradients the
            wrapper reduces all the same.
    """

    bare: nn.Module
    trained: nn.Module


class View(Protocol):
    """Where in their stored canvases the augmentation found the batch's pixels."""

    def canvas(self, x: Tensor) -> torch.Size:
        """The shape [...] of one example's canvas for a batch x [n, ...]."""
        ...

    def take(self, canvas: Tensor) -> Tensor:
        """The batch's part of the canvases [n, ...]."""
        ...

    def put(self, canvas: Tensor, values: Tensor) -> None:
        """Write the batch's part back."""
        ...


@dataclass(frozen=True)
class Share:
    """The part of each batch that this process holds: one of ``world_size`` equal, contiguous parts.

    Args:
        rank: the part's place in the batch, from 0.
        world_size: processes that share the batch.
        gather: each process's rows [n, ...] -> those of the whole batch [world_size·n, ...], on every
            process. All of them call it, in the same order.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda rows: rows

    def of(self, whole: Tensor) -> Tensor:
        """This process's rows [n, ...] of the whole batch's."""
        n = len(whole) // self.world_size
        return whole[self.rank * n : (self.rank + 1) * n]

    def sum(self, value: Tensor) -> Tensor:
        """Σ over the processes of each one's scalar; all of them call it."""
        return self.gather(value.reshape(1)).sum()


@dataclass(frozen=True, eq=False)
class Batch:
    """A training batch, or this process's share of it.

    Args:
        x: [n, ...] in [0, 1], augmented.
        y: [n], the labels.
        index: [n], positions in the training set, of ``total`` examples; empty where they are unknown.
        total: examples of the training set.
        epoch: counted from 0.
        view: makes the batch's :class:`View`; None where nothing augments.
        share: which part of the step's batch this is.
    """

    x: Tensor
    y: Tensor
    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    total: int = 0
    epoch: int = 0
    view: Callable[[], View] | None = None
    share: Share = field(default_factory=Share)


@dataclass
class Memory:
    """What a method keeps from step to step: tensors by name; a checkpoint holds them.

    On every process they are what a single process would keep. A method reads and writes the rows of its own
    share alone; the loop exchanges what was written once the step is done, and only then it is read.

    Args:
        tensors: of each example [total, ...] or of the batch [batch size, ...].
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    _written: list[tuple[str, Batch, Tensor, bool]] = field(default_factory=list, repr=False)

    def of_examples(
        self,
        name: str,
        batch: Batch,
        shape: torch.Size,
        start: Callable[[Tensor], object],
        *,
        epochs: int | None = None,
    ) -> Tensor:
        """The rows [n, *shape] kept of the batch's examples; ``start`` fills the tensor [total, *shape] in
        place at first and, of what was kept before, again every so many epochs; it draws the same on every
        process.

        Raises:
            ConfigError: the batch does not say which examples it holds.
        """
        if len(batch.index) != len(batch.x):
            raise ConfigError(
                "the method stores something of each example; its batches need an index and a total"
            )
        due = name not in self.tensors
        if due:
            self.tensors[name] = torch.empty(batch.total, *shape, device=batch.x.device)
        elif epochs is not None:
            due = int(self.tensors[f"{name}/epoch"]) // epochs != batch.epoch // epochs
        if due:
            start(self.tensors[name])
            self.tensors[f"{name}/epoch"] = torch.tensor(batch.epoch)
        return self.tensors[name][batch.index]

    def keep_of_examples(self, name: str, batch: Batch, rows: Tensor) -> None:
        """Keep the rows [n, ...] of the batch's examples."""
        self._written.append((name, batch, rows, True))

    def of_batch(self, name: str, batch: Batch) -> Tensor | None:
        """The rows [n, ...] of this share that the last step kept; None where there are none of this size."""
        whole = self.tensors.get(name)
        if whole is None or len(whole) != len(batch.x) * batch.share.world_size:
            return None
        return batch.share.of(whole)

    def keep_of_batch(self, name: str, batch: Batch, rows: Tensor) -> None:
        """Keep the rows [n, ...] for the next step, whatever its examples."""
        self._written.append((name, batch, rows, False))

    def exchange(self) -> None:
        """Store what was written, by all processes; the loop calls it at the end of each step."""
        for name, batch, rows, by_example in self._written:
            whole = batch.share.gather(rows.detach())
            if by_example:
                self.tensors[name][batch.share.gather(batch.index)] = whole
                self.tensors[f"{name}/epoch"] = torch.tensor(batch.epoch)
            else:
                self.tensors[name] = whole
        self._written.clear()


@runtime_checkable
class Method(Protocol):
    """Settings are frozen fields; what lasts from step to step lies in the step's ``memory``.

    The network comes in training mode. What a method's crafting and its loss do to BatchNorm's buffers is
    part of the method, and its settings say it.
    """

    @property
    def passes(self) -> Passes:
        """Passes per example and step, the update's own included."""
        ...

    @property
    def replays(self) -> int:
        """Steps in a row that take the same batch."""
        ...

    def loss(self, network: Network, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The scalar loss of the batch; random draws from ``generator`` alone."""
        ...

    def finish(self, network: Network, batch: Batch) -> None:
        """What follows the update of the step."""
        ...


class Perturbations:
    """δ of the batch's examples as memory keeps them: on their canvases, before the augmentation.

    Each crop and flip takes its part of the canvas and writes it back (Zheng et al. 2020, section 4.2).
    ``start`` and ``epochs`` are those of :meth:`Memory.of_examples`. One name for all methods, so that one
    starts from what another left.
    """

    def __init__(
        self, memory: Memory, batch: Batch, start: Callable[[Tensor], object], *, epochs: int | None = None
    ) -> None:
        self._memory, self._batch = memory, batch
        self._view = batch.view() if batch.view is not None else None
        shape = batch.x.shape[1:] if self._view is None else self._view.canvas(batch.x)
        self._canvas = memory.of_examples("perturbation", batch, shape, start, epochs=epochs)

    def read(self) -> Tensor:
        """[n, ...] of the batch's shape."""
        return self._canvas if self._view is None else self._view.take(self._canvas)

    def keep(self, delta: Tensor) -> None:
        """Keep δ [n, ...]."""
        canvas = delta
        if self._view is not None:
            canvas = self._canvas
            self._view.put(canvas, delta)
        self._memory.keep_of_examples("perturbation", self._batch, canvas)


UPDATE = Passes(forwards=1, full_backwards=1)
"""The passes of one plain step: a forward and a full backward."""


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """What adversarial methods share: L(θ) = (1 − w) CE(f(x*), y) + w CE(f(x), y), x* the crafted batch.

    Args:
        label_smoothing: s in [0, 1): the loss's targets are (1 − s) one-hot + s/C.
        clean_weight: w in [0, 1); above 0 each step takes a second forward and backward, of the clean batch.
        crafting_statistics: what BatchNorm normalizes with while crafting, batch or running.
        buffer_updates: the forwards that update BatchNorm's buffers: crafting (each of the attack's), loss,
            and clean, an extra forward of the clean batch without a gradient: at the end of the step, after
            the update, or at its beginning if it is named before another.
        keep_perturbations: keep each example's x* − x for a method that starts from it.
    """

    label_smoothing: float = 0.0
    clean_weight: float = 0.0
    crafting_statistics: str = "batch"
    buffer_updates: tuple[str, ...] = ("crafting", "loss")
    keep_perturbations: bool = False

    @property
    def replays(self) -> int:
        """One step a batch."""
        return 1

    def __post_init__(self) -> None:
        check_share("label_smoothing", self.label_smoothing)
        check_share("clean_weight", self.clean_weight)
        if self.crafting_statistics not in modes.STATISTICS:
            raise ConfigError(
                unknown_choice("crafting_statistics", self.crafting_statistics, modes.STATISTICS)
            )
        for name in self.buffer_updates:
            if name not in FORWARDS:
                raise ConfigError(unknown_choice("buffer_updates", name, FORWARDS))
        if len(set(self.buffer_updates)) < len(self.buffer_updates):
            raise ConfigError(f"buffer_updates={list(self.buffer_updates)} names a forward twice")
        if self.crafting_statistics == "running" and "crafting" in self.buffer_updates:
            raise ConfigError(
                "buffer_updates names crafting, but crafting_statistics='running': "
                "only batch statistics can update buffers"
            )

    @property
    def crafting_passes(self) -> Passes:
        """Passes per example before the loss."""
        raise NotImplementedError

    @property
    def passes(self) -> Passes:
        """Those of crafting, of the loss and its update, and of a clean forward where there is one."""
        total = self.crafting_passes.plus(UPDATE)
        if self.clean_weight:
            total = total.plus(UPDATE)
        return total.plus(Passes(forwards=1)) if "clean" in self.buffer_updates else total

    def craft(self, model: nn.Module, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The crafted batch [n, ...] in [0, 1]."""
        raise NotImplementedError

    def loss(self, network: Network, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """The loss of the crafted batch."""
        x_adv = self.crafted(network, batch, memory=memory, generator=generator)
        return self.objective(network, batch, self.logits(network, x_adv))

    def crafted(
        self, network: Network, batch: Batch, *, memory: Memory, generator: torch.Generator
    ) -> Tensor:
        """The batch that is crafted from the bare network as it stands; what comes before is done."""
        self.begin(network, batch)
        with self.crafting(network.bare):
            x_adv = self.craft(network.bare, batch, memory=memory, generator=generator)
        self.keep(x_adv, batch, memory)
        return x_adv

    def keep(self, x_adv: Tensor, batch: Batch, memory: Memory) -> None:
        """Keep what the crafted batch adds to the clean one, where that is asked for."""
        if self.keep_perturbations:
            Perturbations(memory, batch, Tensor.zero_).keep(x_adv.detach() - batch.x)

    def logits(self, network: Network, x_adv: Tensor) -> Tensor:
        """What the loss is taken of."""
        with self.updating(network.bare, "loss"):
            result: Tensor = network.trained(x_adv)
        return result

    def objective(self, network: Network, batch: Batch, logits: Tensor) -> Tensor:
        """The mixed, smoothed cross-entropy."""
        loss = self.cross_entropy(logits, batch.y)
        if not self.clean_weight:
            return loss
        with self.updating(network.bare, "loss", branch="clean"):
            clean = self.cross_entropy(network.bare(batch.x), batch.y)
        return (1 - self.clean_weight) * loss + self.clean_weight * clean

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch, smoothed."""
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)

    @contextmanager
    def crafting(self, model: nn.Module) -> Iterator[None]:
        """BatchNorm as crafting has it."""
        update = "crafting" in self.buffer_updates
        statistics = modes.batchnorm(model, statistics=self.crafting_statistics, update=update)
        with statistics, modes.branch(model, "crafted"):
            yield

    @contextmanager
    def updating(self, model: nn.Module, forward: str, *, branch: str = "crafted") -> Iterator[None]:
        """Batch statistics; buffers move if ``forward`` is one of ``buffer_updates``."""
        statistics = modes.batchnorm(model, statistics="batch", update=forward in self.buffer_updates)
        with statistics, modes.branch(model, branch):
            yield

    def begin(self, network: Network, batch: Batch) -> None:
        """What comes before crafting."""
        if "clean" in self.buffer_updates[:-1]:
            self._clean_forward(network, batch)

    def finish(self, network: Network, batch: Batch) -> None:
        """What follows the update."""
        if self.buffer_updates[-1:] == ("clean",):
            self._clean_forward(network, batch)

    @torch.no_grad()
    def _clean_forward(self, network: Network, batch: Batch) -> None:
        with self.updating(network.bare, "clean", branch="clean"):
            network.bare(batch.x)


@dataclass(frozen=True, kw_only=True)
class Attacked(Adversarial):
    """Methods whose crafting is one of the attacks."""

    @property
    def attack(self) -> Attack:
        """What crafts the batch; raises ConfigError where a setting is out of range."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.attack

    @property
    def crafting_passes(self) -> Passes:
        """The attack's."""
        return self.attack.passes

    def craft(self, model: nn.Module, batch: Batch, *, memory: Memory, generator: torch.Generator) -> Tensor:
        """What the attack makes of the batch."""
        return self.attack(model, batch.x, batch.y, generator=generator)


def check_sizes(eps: float, step_size: float | None = None) -> None:
    """Raise ConfigError unless eps, and the step size where there is one, are in (0, 1]."""
    check_eps(eps)
    if step_size is not None:
        check_eps(step_size, "step_size")


def check_share(name: str, value: float) -> None:
    """Raise ConfigError unless value is in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value} is out of range [0, 1)")


def check_weight(name: str, value: float) -> None:
    """Raise ConfigError unless value, of a penalty, is in (0, ∞)."""
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name}={value} is out of range; above 0")
