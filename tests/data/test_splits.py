import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tangentlab.data import class_balanced, train_validation
from tangentlab.errors import ConfigError

UNEVEN = torch.tensor([0] * 50 + [1] * 30 + [2] * 17 + [5] * 3)[
    torch.randperm(100, generator=torch.manual_seed(0))
]


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60).map(torch.tensor),
    sizes=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 3),
)
def test_splits_are_disjoint_exact_and_stratified(labels, sizes, seed):
    n = len(labels)
    validation_size = int(sizes[0] * (n - 1))
    train_size = 1 + int(sizes[1] * (n - validation_size - 1))
    train, validation = train_validation(
        labels, train_size=train_size, validation_size=validation_size, seed=seed
    )
    assert (len(train), len(validation)) == (train_size, validation_size)
    both = torch.cat([train, validation])
    assert len(both.unique()) == len(both)
    for index in (train, validation):
        assert index.dtype == torch.int64
        assert index.tolist() == sorted(index.tolist())
    counts = labels.bincount(minlength=5)
    share = labels[validation].bincount(minlength=5)
    assert ((share - counts * validation_size / n).abs() < 1).all()
    left = counts - share
    assert ((labels[train].bincount(minlength=5) - left * train_size / left.sum()).abs() < 1).all()


def test_none_takes_the_rest_and_seeds_differ():
    train, validation = train_validation(UNEVEN, train_size=None, validation_size=20, seed=0)
    assert sorted(torch.cat([train, validation]).tolist()) == list(range(100))
    assert UNEVEN[validation].bincount().tolist() == [10, 6, 3, 0, 0, 1]
    small, again = train_validation(UNEVEN, train_size=10, validation_size=20, seed=0)
    assert torch.equal(validation, again)
    assert set(small.tolist()) < set(train.tolist())
    assert not torch.equal(
        validation, train_validation(UNEVEN, train_size=None, validation_size=20, seed=1)[1]
    )
    assert len(train_validation(UNEVEN, train_size=None, validation_size=0, seed=0)[1]) == 0


@pytest.mark.parametrize(
    ("train_size", "validation_size", "message"),
    [
        (None, 100, r"validation_size=100 is out of range; choose 0\.\.99"),
        (None, -1, "validation_size=-1"),
        (81, 20, r"train_size=81 is out of range; choose 1\.\.80 of 100 examples, 20 of them for validation"),
        (0, 20, "train_size=0"),
    ],
)
def test_impossible_sizes_are_refused(train_size, validation_size, message):
    with pytest.raises(ConfigError, match=message):
        train_validation(UNEVEN, train_size=train_size, validation_size=validation_size, seed=0)


@pytest.mark.parametrize("size", [1, 3, 4, 8, 12, 14, 15])
def test_balanced_counts_differ_by_one_at_most(size):
    index = class_balanced(UNEVEN, size, seed=0)
    assert len(index.unique()) == len(index) == size
    counts = torch.stack([(UNEVEN[index] == label).sum() for label in (0, 1, 2, 5)])
    assert counts.max() - counts.min() <= 1


def test_the_order_is_shuffled_and_named():
    labels = torch.arange(1000) % 10
    index = class_balanced(labels, 100, seed=0)
    assert torch.equal(index, class_balanced(labels, 100, seed=0, name="probe"))
    assert not torch.equal(index, class_balanced(labels, 100, seed=0, name="alarm"))
    assert not torch.equal(index, class_balanced(labels, 100, seed=1))
    assert len(labels[index[:20]].unique()) > 4
    assert index.tolist() != sorted(index.tolist())
    state = torch.get_rng_state()
    class_balanced(labels, 5, seed=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("size", [0, 16, 100, 101])
def test_impossible_balance_is_refused(size):
    with pytest.raises(ConfigError, match=f"size={size} is"):
        class_balanced(UNEVEN, size, seed=0)


def test_everything_can_be_asked_for_when_it_is_balanced():
    labels = torch.tensor([0, 1, 1, 0, 1])
    assert sorted(class_balanced(labels, 5, seed=0).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="the smallest of them has 2 examples"):
        class_balanced(torch.tensor([0, 1, 1, 0, 1, 1]), 6, seed=0)
    with pytest.raises(ConfigError, match=r"choose 1\.\.0"):
        class_balanced(torch.empty(0).long(), 1, seed=0)
