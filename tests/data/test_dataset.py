import pytest
import torch

from tangentlab.data import Dataset, Split
from tangentlab.errors import DataError


def split(n=5, scale=255, size=2):
    images = torch.arange(n * size * size).reshape(n, 1, size, size).to(torch.uint8)
    return Split(images, torch.arange(n), scale)


def test_x_is_the_images_over_the_scale():
    data = split(scale=16)
    assert data.x().dtype == torch.float32
    assert torch.equal(data.x(), data.images.float() / 16)
    index = torch.tensor([3, 0, 3])
    assert torch.equal(data.x(index, device="cpu"), data.x()[index])
    assert data.x(2).shape == (1, 2, 2)
    assert data.x(slice(1, 3)).shape == (2, 1, 2, 2)
    data.x().zero_()
    assert data.images.max() > 0


def test_full_scale_is_exactly_one():
    assert Split(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), torch.zeros(1).long(), 255).x().item() == 1


def test_select_and_len():
    data = split()
    part = data.select(torch.tensor([4, 1]))
    assert (len(data), len(part), part.labels.tolist(), part.scale) == (5, 2, [4, 1], 255)
    assert torch.equal(part.images, data.images[[4, 1]])
    assert data.select(data.labels > 2).labels.tolist() == [3, 4]


def test_to_moves_and_shares():
    assert split().to("meta").images.device.type == "meta"
    data = split()
    assert data.to("cpu").images.data_ptr() == data.images.data_ptr()


@pytest.mark.parametrize(
    ("images", "labels", "scale", "message"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2).long(), 255, r"torch\.float32 \[2, 1, 3, 3\]"),
        (torch.zeros(2, 3, 3).byte(), torch.zeros(2).long(), 255, r"expected torch\.uint8 \[n, ch, h, w\]"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.zeros(2), 255, r"labels are torch\.float32 \[2\]"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.zeros(3).long(), 255, "2 images but 3 labels"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.zeros(2).long(), 0, "scale=0"),
    ],
)
def test_wrong_tensors_are_refused(images, labels, scale, message):
    with pytest.raises(DataError, match=message):
        Split(images, labels, scale)


def test_a_data_set_has_one_shape():
    data = Dataset("d", split(), split(3), ("a", "b"))
    assert (data.num_classes, data.input_shape) == (2, (1, 2, 2))
    with pytest.raises(DataError, match=r"d: training images are \[1, 2, 2\], test images \[1, 3, 3\]"):
        Dataset("d", split(), split(size=3), ())
