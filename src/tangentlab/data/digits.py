"""The 8×8 digits that scikit-learn brings along: 1,797 images, no download.

Source: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998), its test part.
"""

from __future__ import annotations

import torch

from tangentlab.data.dataset import Dataset, Split
from tangentlab.data.splits import class_balanced

_TEST_SIZE = 360  # 36 a class


def load_digits() -> Dataset:
    """1,437 training and 360 test images [n, 1, 8, 8], values 0..16, the same split on every machine.

    scikit-learn does not keep the authors' split by writer; ours is drawn once, balanced by class.
    """
    from sklearn.datasets import load_digits as load_bunch  # heavy: keeps `import tangentlab` light

    bunch = load_bunch()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    everything = Split(images, torch.from_numpy(bunch.target).long(), 16)
    test = class_balanced(everything.labels, _TEST_SIZE, seed=0, name="digits-split")
    in_train = torch.ones(len(everything), dtype=torch.bool)
    in_train[test] = False
    return Dataset("digits", everything.select(in_train), everything.select(test), tuple("0123456789"))
