"""Small data sets written in their authors' layouts."""

import gzip
import struct

import numpy as np


def idx(array):
    """An idx file of unsigned bytes."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder, *, train=30, test=20, compress=True, seed=0):
    """The four files of MNIST; returns the images and labels by split."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    written = {}
    for split, prefix, n in (("train", "train", train), ("test", "t10k", test)):
        images, labels = random.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n) % 10
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
        written[split] = images, labels
    return written


def opcodes(value):
    """``value`` in Python 2's pickle opcodes (protocol 2, byte strings), as the CIFAR files have them."""
    match value:
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case int():
            return b"J" + struct.pack("<i", value)
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case dict():
            return b"}(" + b"".join(opcodes(key) + opcodes(entry) for key, entry in value.items()) + b"u"
        case Raw():
            return value.code
        case np.ndarray():
            dtype = (
                b"cnumpy\ndtype\n"
                + opcodes(value.dtype.str[1:].encode())
                + opcodes(0)
                + opcodes(1)
                + b"\x87R"
            )
            dtype += (
                b"(" + opcodes(3) + opcodes(b"|") + b"NNN" + opcodes(-1) + opcodes(-1) + opcodes(0) + b"tb"
            )
            made = (
                b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
                + opcodes(0)
                + b"\x85"
                + opcodes(b"b")
            )
            shape = b"(" + b"".join(map(opcodes, value.shape)) + b"t"
            return made + b"\x87R(" + opcodes(1) + shape + dtype + b"\x89" + opcodes(value.tobytes()) + b"tb"


class Raw:
    """Opcodes to be put in as they are."""

    def __init__(self, code):
        self.code = code


def pickled(value):
    return b"\x80\x02" + opcodes(value) + b"."


def rows(n, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), np.uint8)


def write_cifar10(folder, *, n=4):
    """CIFAR-10 as Python 2 pickles; returns rows [5n + n, 3072] and labels, the test batch last."""
    folder.mkdir(parents=True)
    data, labels = rows(6 * n, 1), [k % 10 for k in range(6 * n)]
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    for k, name in enumerate(names):
        part = slice(k * n, k * n + n)
        batch = {b"batch_label": name.encode(), b"labels": labels[part], b"data": data[part]}
        (folder / name).write_bytes(pickled(batch))
    classes = [b"class %d" % k for k in range(10)]
    (folder / "batches.meta").write_bytes(pickled({b"num_vis": 3072, b"label_names": classes}))
    return data, labels


def write_cifar10_binary(folder, *, n=4):
    folder.mkdir(parents=True)
    data, labels = rows(6 * n, 2), np.arange(6 * n) % 10
    names = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
    for k, name in enumerate(names):
        part = slice(k * n, k * n + n)
        (folder / name).write_bytes(np.c_[labels[part], data[part]].astype(np.uint8).tobytes())
    return data, labels


def write_cifar100(folder, *, n=5):
    folder.mkdir(parents=True)
    written = {}
    for seed, split in enumerate(("train", "test")):
        data, fine = rows(n, seed), [(7 * k + 3) % 100 for k in range(n)]
        batch = {b"data": data, b"coarse_labels": [0] * n, b"fine_labels": fine}
        (folder / split).write_bytes(pickled(batch))
        written[split] = data, fine
    names = [b"fine %d" % k for k in range(100)]
    (folder / "meta").write_bytes(pickled({b"fine_label_names": names, b"coarse_label_names": [b"c"] * 20}))
    return written
