"""Where each data set is published, with the MD5 sums that torchvision's ``datasets`` package lists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Remote:
    """One published file; ``urls`` are its mirrors, in the order in which they are tried."""

    file: str
    md5: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """The files of one data set; they belong in ``folder`` below the root.

    With ``unpack`` each file is a tar archive that holds ``folder``.
    """

    folder: str
    remotes: tuple[Remote, ...]
    unpack: bool = False


def _idx(folder: str, mirrors: tuple[str, ...], sums: dict[str, str]) -> Source:
    return Source(
        folder,
        tuple(Remote(file, md5, tuple(mirror + file for mirror in mirrors)) for file, md5 in sums.items()),
    )


def _cifar(folder: str, file: str, md5: str) -> Source:
    return Source(folder, (Remote(file, md5, (f"https://www.cs.toronto.edu/~kriz/{file}",)),), unpack=True)


SOURCES = {
    # The authors' own server has been off and on since 2020, so it comes last.
    "mnist": _idx(
        "MNIST",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": _idx(
        "FashionMNIST",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": _cifar("cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": _cifar("cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
}
