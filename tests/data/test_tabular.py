import numpy as np
import torch
from sklearn import datasets

from tangentlab.data import load


def test_the_table_is_scikit_learns_scaled_by_its_training_rows():
    data = load("breast-cancer")
    assert (len(data.train), len(data.test), data.input_shape) == (455, 114, (1, 1, 30))
    assert data.classes == ("malignant", "benign")
    # the proportions of 212 and 357
    assert data.train.labels.bincount().tolist() == [170, 285]
    assert data.test.labels.bincount().tolist() == [42, 72]
    x = data.train.x().flatten(1)
    assert x.amin(dim=0).tolist() == [0.0] * 30
    assert x.amax(dim=0).tolist() == [1.0] * 30
    # Feature by feature an affine map of the source's values, up to the rounding to bytes and the clipping.
    shares = np.sort(torch.cat([data.train.x(), data.test.x()]).flatten(1).double().numpy(), axis=0)
    source = np.sort(datasets.load_breast_cancer().data, axis=0)
    for share, original in zip(shares.T, source.T, strict=True):
        inside = (share > 0) & (share < 1)
        line = np.polyfit(original[inside], share[inside], 1)
        assert np.abs(np.polyval(line, original[inside]) - share[inside]).max() < 1 / 255


def test_the_split_does_not_depend_on_global_seeds():
    first = load("breast-cancer")
    torch.manual_seed(1)
    assert torch.equal(load("breast-cancer").test.images, first.test.images)
