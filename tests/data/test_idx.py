import gzip
import struct

import numpy as np
import pytest
import torch

from tangentlab.data import load
from tangentlab.data.idx import read_idx
from tangentlab.errors import DataError


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("place", ["", "raw", "."])
@pytest.mark.parametrize("compress", [True, False])
def test_reads_the_four_files_wherever_they_are_kept(tmp_path, authors, name, place, compress):
    folder = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
    written = authors.write_idx(tmp_path if place == "." else tmp_path / folder / place, compress=compress)
    data = load(name, tmp_path, download=False)
    assert (data.name, data.num_classes, data.input_shape) == (name, 10, (1, 28, 28))
    for split in ("train", "test"):
        images, labels = written[split]
        assert np.array_equal(getattr(data, split).images[:, 0].numpy(), images)
        assert getattr(data, split).labels.tolist() == labels.tolist()
        assert getattr(data, split).scale == 255


def test_the_folder_of_the_other_set_is_not_taken_for_ours(tmp_path, authors):
    authors.write_idx(tmp_path / "FashionMNIST" / "raw")
    for root in (tmp_path / "FashionMNIST", tmp_path / "FashionMNIST" / "raw"):
        with pytest.raises(DataError, match="mnist: put train-images-idx3-ubyte"):
            load("mnist", root, download=False)
        assert len(load("fashion-mnist", root, download=False).train) == 30


VALUES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def test_any_shape_comes_back(tmp_path, authors):
    path = tmp_path / "a"
    path.write_bytes(authors.idx(VALUES))
    assert torch.equal(read_idx(path, 3), torch.from_numpy(VALUES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"\x00\x00\x0d\x03" + raw[4:], "starts with 00000d03"),  # floats
        (lambda raw: b"\x00\x00\x08\x01" + raw[4:], "starts with 00000801"),  # one dimension
        (lambda raw: b"", "starts with nothing"),
        (lambda raw: raw[:9], "truncated within its header"),
        (lambda raw: raw[:-1], r"only 23 values; its header \[2, 3, 4\] gives 24"),
        (lambda raw: raw + b"\x00", "holds more values"),
        (lambda raw: raw[:4] + struct.pack(">3I", *[2**32 - 1] * 3) + raw[16:], "only 24 values"),
        (lambda raw: raw[:4] + struct.pack(">3I", 0, 3, 4), "is empty"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_file_is_named(tmp_path, authors, change, message, suffix):
    path = tmp_path / f"images{suffix}"
    content = change(authors.idx(VALUES))
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, 3)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_gzip_file_is_named(tmp_path, authors):
    path = tmp_path / "images.gz"
    whole = gzip.compress(authors.idx(VALUES))
    flipped = bytearray(whole)
    flipped[-6] ^= 255  # the checksum
    garbled = whole[:12] + b"\xff" * 8 + whole[20:]
    for content in (whole[:-9], whole[:-1], whole[:15], bytes(flipped), garbled, authors.idx(VALUES)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"images\.gz is a damaged gzip file"):
            read_idx(path, 3)


def test_an_unreadable_path_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere cannot be read: No such file"):
        read_idx(tmp_path / "nowhere", 1)


def test_counts_of_images_and_labels_must_agree(tmp_path, authors):
    authors.write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(authors.idx(np.zeros(19))))
    with pytest.raises(DataError, match=r"t10k-images.* holds 20 images but .*t10k-labels.* 19 labels"):
        load("mnist", tmp_path, download=False)


def test_a_label_out_of_range_is_named(tmp_path, authors):
    authors.write_idx(tmp_path, compress=False)
    labels = np.zeros(30)
    labels[7] = 10
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(authors.idx(labels))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: label 10 at index 7 is not in 0\.\.9"):
        load("mnist", tmp_path, download=False)
