"""Index sets drawn by class: a validation split of the training set, a balanced probe."""

from __future__ import annotations

import torch
from torch import Tensor

from tangentlab.errors import ConfigError
from tangentlab.randomness import generator


def train_validation(
    labels: Tensor, *, train_size: int | None, validation_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Disjoint training and validation indices with the class proportions of ``labels``.

    Each class gives its share of each set, rounded up or down (largest remainders, so that the sizes are
    exact). The sets depend on ``seed`` alone; the validation set does not depend on ``train_size``.

    Args:
        labels: int64 [n].
        train_size: number of training examples; None takes all that are left.
        validation_size: number of validation examples; 0 gives an empty set.

    Returns:
        Training and validation indices into ``labels``, int64, ascending, on its device.

    Raises:
        ConfigError: a size is out of range, or they do not fit into n together.

    >>> labels = torch.arange(100) % 10
    >>> train, validation = train_validation(labels, train_size=None, validation_size=20, seed=0)
    >>> len(train), labels[validation].bincount().tolist()
    (80, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    n = len(labels)
    if not 0 <= validation_size < n:
        raise ConfigError(f"validation_size={validation_size} is out of range; choose 0..{n - 1}")
    left = n - validation_size
    if train_size is None:
        train_size = left
    if not 1 <= train_size <= left:
        raise ConfigError(
            f"train_size={train_size} is out of range; choose 1..{left} of {n} examples, "
            f"{validation_size} of them for validation"
        )
    members = _members(labels, generator(seed, "validation-split"))
    counts = [len(index) for index in members]
    validation = _shares(counts, validation_size)
    train = _shares([count - taken for count, taken in zip(counts, validation, strict=True)], train_size)
    parts = list(zip(members, validation, train, strict=True))
    train_index = torch.cat([index[v : v + t] for index, v, t in parts])
    validation_index = torch.cat([index[:v] for index, v, _ in parts])
    return train_index.sort().values.to(labels.device), validation_index.sort().values.to(labels.device)


def class_balanced(labels: Tensor, size: int, *, seed: int, name: str = "probe") -> Tensor:
    """Indices of ``size`` examples with equally many of each class, up to one, in shuffled order.

    Where ``size`` does not divide, the classes with one more are drawn too.

    Args:
        labels: int64 [n]; the classes are those that occur.
        name: the random stream; other names give other examples for the same seed.

    Returns:
        Indices into ``labels``, int64 [size], on its device.

    Raises:
        ConfigError: ``size`` is below 1, or a class has too few examples.
    """
    if not 1 <= size <= len(labels):
        raise ConfigError(f"size={size} is out of range; choose 1..{len(labels)}")
    random = generator(seed, name)
    members = _members(labels, random)
    base, extra = divmod(size, len(members))
    counts = torch.tensor([len(index) for index in members])
    order = torch.randperm(len(members), generator=random)
    roomy = order[counts[order] > base][:extra]
    if len(roomy) < extra or bool((counts < base).any()):
        raise ConfigError(
            f"size={size} is impossible with equally many of {len(members)} classes; "
            f"the smallest of them has {int(counts.min())} examples"
        )
    take = torch.full_like(counts, base)
    take[roomy] += 1
    chosen = torch.cat([index[:k] for index, k in zip(members, take.tolist(), strict=True)])
    return chosen[torch.randperm(size, generator=random)].to(labels.device)


def _members(labels: Tensor, random: torch.Generator) -> list[Tensor]:
    """The indices of each class that occurs, by ascending class, each in random order."""
    shuffled = torch.randperm(len(labels), generator=random)
    drawn = labels.cpu()[shuffled]
    return [shuffled[drawn == label] for label in labels.unique().tolist()]


def _shares(counts: list[int], size: int) -> list[int]:
    """``size`` in proportion to ``counts``, in whole numbers: largest remainders, ties to the lower class."""
    total = sum(counts)
    shares = [size * count // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda c: -(size * counts[c] % total))
    for c in by_remainder[: size - sum(shares)]:
        shares[c] += 1
    return shares
