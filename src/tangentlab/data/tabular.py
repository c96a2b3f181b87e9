"""Data that is no image: the breast-cancer table that scikit-learn brings along, no download.

Source: Street, Wolberg & Mangasarian, "Nuclear feature extraction for breast tumor diagnosis" (UCI, 1993).
"""

from __future__ import annotations

import torch

from tangentlab.data.dataset import Dataset, Split
from tangentlab.data.splits import train_validation

_SCALE = 255
_TEST_SIZE = 114  # a fifth


def load_breast_cancer() -> Dataset:
    """455 training and 114 test rows of 30 features, [n, 1, 1, 30], the same split on every machine.

    A feature is its share of the way from the least to the largest value among the training rows, clipped to
    [0, 1] and rounded to 1/255; eps is in that unit.
    """
    from sklearn.datasets import load_breast_cancer as load_bunch  # heavy: keeps `import tangentlab` light

    bunch = load_bunch()
    features, labels = torch.from_numpy(bunch.data), torch.from_numpy(bunch.target).long()
    train, test = train_validation(labels, train_size=None, validation_size=_TEST_SIZE, seed=0)
    low, high = features[train].amin(dim=0), features[train].amax(dim=0)
    shares = ((features - low) / (high - low)).clamp(0, 1)
    everything = Split((_SCALE * shares).round().to(torch.uint8)[:, None, None], labels, _SCALE)
    return Dataset(
        "breast-cancer",
        everything.select(train),
        everything.select(test),
        tuple(map(str, bunch.target_names)),
    )
