import pytest
import torch

from tangentlab.data import Augmentation, Batches, Split
from tangentlab.errors import ConfigError
from tangentlab.randomness import generator

N = 23
SPLIT = Split(
    torch.randint(0, 256, (N, 3, 6, 6), generator=generator(0, "images")).to(torch.uint8),
    torch.arange(N) % 4,
    255,
)
STRONG = Augmentation(crop=2, flip=True)


def batches(**changes):
    settings = {"batch_size": 6, "seed": 0, "augmentation": STRONG, "device": "cpu"} | changes
    return Batches(SPLIT, **settings)


def same(a, b):
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


def test_a_fresh_object_continues_as_the_running_one():
    running = batches()
    seen = [running.batch(step) for step in range(10)]
    for step in (9, 4, 0, 3):
        assert same(batches().batch(step), seen[step])
        assert same(running.batch(step), seen[step])


def test_an_epoch_has_every_example_at_most_once_and_the_next_another_order():
    data = batches()
    assert data.steps_per_epoch == 3
    epochs = [torch.cat([data.batch(3 * epoch + k)[2] for k in range(3)]) for epoch in range(2)]
    for index in epochs:
        assert len(index.unique()) == 18
    assert not torch.equal(*epochs)
    whole = batches(batch_size=N)
    assert sorted(whole.batch(5)[2].tolist()) == list(range(N))


def test_x_y_and_index_belong_together():
    x, y, index = batches(augmentation=Augmentation()).batch(7)
    assert torch.equal(x, SPLIT.x(index))
    assert torch.equal(y, SPLIT.labels[index])
    assert (x.dtype, y.dtype, index.dtype) == (torch.float32, torch.int64, torch.int64)
    x, _, index = batches().batch(7)
    assert torch.equal(x, STRONG(SPLIT.x(index), generator=generator(0, "augment", 7)))
    assert x.is_contiguous()
    assert 0 <= x.min() <= x.max() <= 1


def test_ranks_partition_the_batch_in_order():
    ranks = [batches(rank=rank, world_size=3) for rank in range(3)]
    for step in (0, 2, 5):
        parts = [data.batch(step) for data in ranks]
        _, y, index = batches().batch(step)
        assert torch.equal(torch.cat([part[2] for part in parts]), index)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
        assert [len(part[0]) for part in parts] == [2, 2, 2]


def test_ranks_share_the_augmentation_of_the_whole_batch():
    parts = [batches(rank=rank, world_size=3).batch(4)[0] for rank in range(3)]
    assert torch.equal(torch.cat(parts), batches().batch(4)[0])


def test_the_placement_finds_the_batch_on_the_padded_images():
    data = batches()
    x, _, index = data.batch(4)
    placement = data.placement(4, x)
    padded = torch.nn.functional.pad(SPLIT.x(index), (placement.margin,) * 4)
    assert padded.shape[1:] == placement.canvas(x)
    assert torch.equal(placement.take(padded), x)
    canvas = torch.zeros_like(padded)
    placement.put(canvas, x + 1)
    assert torch.equal(placement.take(canvas), x + 1)
    assert (canvas != 0).sum() == x.numel()


def test_seeds_differ_and_global_randomness_is_untouched():
    state = torch.get_rng_state()
    assert not torch.equal(batches(seed=1).batch(0)[2], batches().batch(0)[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_sees_the_same_batches():
    x, y, index = batches(device="cuda").batch(4)
    assert x.is_cuda
    assert same((x.cpu(), y.cpu(), index.cpu()), batches().batch(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 24}, r"batch_size=24 is out of range; choose 1\.\.23"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"world_size": 4}, "batch_size=6 does not divide by world_size=4"),
        ({"world_size": 0}, "world_size=0"),
        ({"world_size": 2, "rank": 2}, r"rank=2 is out of range; choose 0\.\.1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        batches(**changes)


def test_steps_count_from_zero():
    with pytest.raises(ConfigError, match="step=-1"):
        batches().batch(-1)
