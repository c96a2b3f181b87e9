import pytest
import torch
from torch.nn import functional as F

from tangentlab.data import Augmentation
from tangentlab.errors import ConfigError
from tangentlab.randomness import generator

X = torch.rand(7, 3, 5, 6, generator=generator(0, "x"))


def one_by_one(x, augmentation, random):
    """Slow and obvious: the same draws, each example on its own."""
    n, _, height, width = x.shape
    crop, mode = augmentation.crop, {"zero": "constant", "reflect": "reflect"}[augmentation.padding]
    tops = torch.randint(2 * crop + 1, (n,), generator=random) if crop else torch.zeros(n).long()
    lefts = torch.randint(2 * crop + 1, (n,), generator=random) if crop else torch.zeros(n).long()
    flips = torch.randint(2, (n,), generator=random) if augmentation.flip else torch.zeros(n).long()
    out = []
    for image, top, left, flip in zip(x, tops.tolist(), lefts.tolist(), flips.tolist(), strict=True):
        padded = F.pad(image[None], (crop,) * 4, mode=mode)[0]
        window = padded[:, top : top + height, left : left + width]
        out.append(window.flip(-1) if flip else window)
    return torch.stack(out)


@pytest.mark.parametrize("crop", [0, 1, 4])
@pytest.mark.parametrize("padding", ["zero", "reflect"])
@pytest.mark.parametrize("flip", [False, True])
def test_equals_the_slow_reference(crop, padding, flip):
    augmentation = Augmentation(crop=crop, padding=padding, flip=flip)
    for step in range(5):
        before = X.clone()
        out = augmentation(X, generator=generator(0, "augment", step))
        assert torch.equal(out, one_by_one(X, augmentation, generator(0, "augment", step)))
        assert torch.equal(X, before)
        assert out.is_contiguous()
        assert out.dtype == X.dtype


def test_nothing_to_do_returns_x_and_draws_nothing():
    random = generator(0, "augment")
    state = random.get_state()
    assert Augmentation()(X, generator=random) is X
    assert torch.equal(random.get_state(), state)


def test_every_shift_and_both_directions_occur_equally_often():
    x = torch.zeros(9000, 1, 3, 3)
    x[:, :, 1, 1] = 1
    out = Augmentation(crop=1)(x, generator=generator(0, "augment"))
    assert (out.mean(0) * 9 - 1).abs().max() < 0.15
    x[:, :, 1, 0], x[:, :, 1, 1] = 1, 0
    out = Augmentation(flip=True)(x, generator=generator(0, "augment"))
    assert (out.mean(0)[0, 1] - torch.tensor([0.5, 0, 0.5])).abs().max() < 0.02


def test_global_randomness_is_untouched():
    state = torch.get_rng_state()
    Augmentation(crop=2, flip=True)(X, generator=generator(0, "augment"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generator_on_the_cpu_gives_the_same_on_every_device():
    augmentation = Augmentation(crop=2, padding="reflect", flip=True)
    here = augmentation(X, generator=generator(0, "augment"))
    there = augmentation(X.cuda(), generator=generator(0, "augment"))
    assert there.is_cuda
    assert torch.equal(there.cpu(), here)
    own = augmentation(X.cuda(), generator=generator(0, "augment", device="cuda"))
    assert own.shape == X.shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": -1}, "crop=-1"),
        ({"crop": 1.5}, r"crop=1\.5"),
        ({"crop": True}, "crop=True"),
        ({"padding": "zeros"}, "padding 'zeros' is unknown; did you mean 'zero'"),
        ({"flip": "yes"}, "flip='yes'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**settings)


def test_bad_inputs_are_refused():
    with pytest.raises(ConfigError, match=r"x of shape \[3, 5, 6\]"):
        Augmentation(flip=True)(X[0], generator=generator(0, "augment"))
    with pytest.raises(ConfigError, match="crop=5 cannot be reflected in images of 5×6; choose at most 4"):
        Augmentation(crop=5, padding="reflect")(X, generator=generator(0, "augment"))
