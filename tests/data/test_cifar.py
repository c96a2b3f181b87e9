import pickle

import numpy as np
import pytest

from tangentlab.data import load
from tangentlab.errors import DataError


def test_reads_cifar10_of_python_2(tmp_path, authors):
    rows, labels = authors.write_cifar10(tmp_path / "cifar-10-batches-py")
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        data = load("cifar10", root, download=False)
        assert (len(data.train), len(data.test), data.input_shape) == (20, 4, (3, 32, 32))
        assert np.array_equal(data.train.images.numpy(), rows[:20].reshape(-1, 3, 32, 32))
        assert np.array_equal(data.test.images.numpy(), rows[20:].reshape(-1, 3, 32, 32))
        assert data.train.labels.tolist() == labels[:20]
        assert data.test.labels.tolist() == labels[20:]
        assert data.classes[3] == "class 3"


def test_reads_cifar10_binary_and_prefers_python(tmp_path, authors):
    rows, labels = authors.write_cifar10_binary(tmp_path / "cifar-10-batches-bin")
    data = load("cifar10", tmp_path, download=False)
    assert np.array_equal(data.train.images.numpy(), rows[:20].reshape(-1, 3, 32, 32))
    assert data.test.labels.tolist() == labels[20:].tolist()
    assert data.classes[:2] == ("airplane", "automobile")
    (tmp_path / "cifar-10-batches-bin" / "batches.meta.txt").write_text("a b c d e f g h i j\n\n")
    assert load("cifar10", tmp_path, download=False).classes == tuple("abcdefghij")
    rows, _ = authors.write_cifar10(tmp_path / "cifar-10-batches-py")
    data = load("cifar10", tmp_path, download=False)
    assert np.array_equal(data.test.images.numpy(), rows[20:].reshape(-1, 3, 32, 32))


def test_reads_the_fine_labels_of_cifar100(tmp_path, authors):
    written = authors.write_cifar100(tmp_path / "cifar-100-python")
    data = load("cifar100", tmp_path, download=False)
    for split in ("train", "test"):
        rows, fine = written[split]
        assert np.array_equal(getattr(data, split).images.numpy(), rows.reshape(-1, 3, 32, 32))
        assert getattr(data, split).labels.tolist() == fine
    assert data.classes[99] == "fine 99"
    (tmp_path / "cifar-100-python" / "meta").unlink()
    assert load("cifar100", tmp_path, download=False).classes == tuple(map(str, range(100)))


def test_reads_cifar100_binary(tmp_path, authors):
    rows, fine = authors.rows(3, 0), np.array([99, 0, 50])
    content = np.c_[[1, 2, 3], fine, rows].astype(np.uint8).tobytes()
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "fine_label_names.txt").write_text("".join(f"n{k}\n" for k in range(100)))
    data = load("cifar100", tmp_path, download=False)
    assert data.train.labels.tolist() == fine.tolist()
    assert np.array_equal(data.test.images.numpy(), rows.reshape(-1, 3, 32, 32))
    assert data.classes[50] == "n50"


def test_missing_batches_are_listed_with_their_folder(tmp_path, authors):
    folder = tmp_path / "cifar-10-batches-py"
    authors.write_cifar10(folder)
    (folder / "data_batch_3").unlink()
    (folder / "test_batch").unlink()
    with pytest.raises(DataError) as error:
        load("cifar10", tmp_path, download=False)
    assert str(error.value) == f"files are missing; cifar10: put data_batch_3, test_batch into {folder}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"labels": [1, 2, 10, 0]}, r"data_batch_2: label 10 at index 2 is not in 0\.\.9"),
        ({b"labels": [1, -1, 2, 0]}, r"data_batch_2: label -1 at index 1"),
        ({b"labels": [1, 2, 3, b"x"]}, r"data_batch_2: label b'x' at index 3"),
        ({b"labels": [1, 2, 3]}, "data_batch_2 holds 4 images but 3 labels"),
        ({b"labels": b"abcd"}, "data_batch_2 holds labels as a bytes; expected a list"),
        ({b"data": np.zeros((4, 3071), np.uint8)}, r"shape \[4, 3071\]; expected \[n, 3072\]"),
        ({b"data": np.zeros((0, 3072), np.uint8)}, r"shape \[0, 3072\]"),
        ({b"data": np.zeros(3072, np.uint8)}, r"shape \[3072\]"),
        ({b"data": [1, 2]}, "data_batch_2 holds a damaged array: a list stands where"),
    ],
)
def test_damaged_batches_are_named(tmp_path, authors, change, message):
    authors.write_cifar10(tmp_path / "c")
    batch = {b"labels": [1, 2, 3, 4], b"data": authors.rows(4, 0)} | change
    (tmp_path / "c" / "data_batch_2").write_bytes(authors.pickled(batch))
    with pytest.raises(DataError, match=message) as error:
        load("cifar10", tmp_path / "c", download=False)
    assert "\n" not in str(error.value)


def test_a_batch_without_its_entries_lists_what_it_holds(tmp_path, authors):
    authors.write_cifar100(tmp_path / "c")
    (tmp_path / "c" / "train").write_bytes(authors.pickled({b"labels": [1], b"x": 1}))
    with pytest.raises(DataError, match="lacks the entry 'data' and 'fine_labels'; it holds 'labels', 'x'"):
        load("cifar100", tmp_path / "c", download=False)


def test_wrong_class_names_are_refused(tmp_path, authors):
    folder = tmp_path / "cifar-10-batches-py"
    authors.write_cifar10(folder)
    for names in ([b"a", b"b"], b"abcdefghij"):
        (folder / "batches.meta").write_bytes(authors.pickled({b"label_names": names}))
        with pytest.raises(DataError, match=r"batches\.meta names \d classes; expected 10"):
            load("cifar10", tmp_path, download=False)


def test_batches_pickled_again_by_python_3_are_read(tmp_path, authors):
    folder = tmp_path / "cifar-10-batches-py"
    rows, labels = authors.write_cifar10(folder)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": rows[:2], "labels": labels[:2]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    data = load("cifar10", tmp_path, download=False)
    assert np.array_equal(data.test.images.numpy(), rows[:2].reshape(-1, 3, 32, 32))
    assert data.classes == tuple("abcdefghij")


def test_binary_files_of_a_wrong_length_or_label_are_named(tmp_path, authors):
    folder = tmp_path / "cifar-10-batches-bin"
    authors.write_cifar10_binary(folder)
    path = folder / "data_batch_4.bin"
    whole = path.read_bytes()
    for content in (whole[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"batch_4\.bin has {len(content)} bytes; .* multiple of 3073"):
            load("cifar10", tmp_path, download=False)
    path.write_bytes(whole[:3073] + b"\x0b" + whole[3074:])
    with pytest.raises(DataError, match=r"batch_4\.bin: label 11 at index 1"):
        load("cifar10", tmp_path, download=False)
