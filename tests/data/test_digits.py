import torch
from sklearn import datasets

from tangentlab.data import load


def test_digits_are_those_of_scikit_learn_split_once():
    data = load("digits")
    assert (len(data.train), len(data.test), data.input_shape, data.num_classes) == (1437, 360, (1, 8, 8), 10)
    assert data.test.labels.bincount().tolist() == [36] * 10
    assert (data.train.x().min(), data.train.x().max()) == (0, 1)
    source = datasets.load_digits()
    expected = sorted(zip(map(bytes, source.images.astype("uint8")), source.target.tolist(), strict=True))
    images = torch.cat([data.train.images, data.test.images]).numpy()
    labels = torch.cat([data.train.labels, data.test.labels]).tolist()
    assert sorted(zip(map(bytes, images), labels, strict=True)) == expected


def test_the_split_does_not_depend_on_global_seeds():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load("digits")
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(load("digits").test.images, first.test.images)
