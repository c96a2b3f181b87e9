import hashlib
import io
import os
import socket
import tarfile
import threading

import numpy as np
import pytest

from tangentlab.data import catalogue, load
from tangentlab.data.sources import SOURCES, Remote, Source
from tangentlab.errors import DataError


def md5(content):
    return hashlib.md5(content).hexdigest()


def everything(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.fixture
def mnist(site, authors, tmp_path, monkeypatch):
    """MNIST on the site, with a first mirror that has nothing."""
    authors.write_idx(tmp_path / "published")
    remotes = []
    for path in sorted((tmp_path / "published").iterdir()):
        site.files[f"/mnist/{path.name}"] = path.read_bytes()
        urls = (f"{site.url}/gone/{path.name}", f"{site.url}/mnist/{path.name}")
        remotes.append(Remote(path.name, md5(path.read_bytes()), urls))
    monkeypatch.setitem(catalogue.SOURCES, "mnist", Source("MNIST", tuple(remotes)))
    return site


@pytest.fixture
def cifar10(site, authors, tmp_path, monkeypatch):
    """CIFAR-10 on the site as one archive."""
    folder = tmp_path / "published" / "cifar-10-batches-py"
    site.rows, _ = authors.write_cifar10(folder)
    publish_archive(site, monkeypatch, lambda tar: tar.add(folder, folder.name))
    return site


def publish_archive(site, monkeypatch, fill):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        fill(tar)
    site.files["/c.tar.gz"] = buffer.getvalue()
    remote = Remote("c.tar.gz", md5(buffer.getvalue()), (f"{site.url}/c.tar.gz",))
    monkeypatch.setitem(catalogue.SOURCES, "cifar10", Source("cifar-10-batches-py", (remote,), unpack=True))


def test_the_table_is_complete():
    assert set(SOURCES) == set(catalogue.DATASETS) - {"digits", "breast-cancer"}
    for source in SOURCES.values():
        for remote in source.remotes:
            assert len(bytes.fromhex(remote.md5)) == 16
            assert all(url.startswith("http") and url.endswith(f"/{remote.file}") for url in remote.urls)


def test_missing_files_are_fetched_from_the_first_mirror_that_has_them(mnist, tmp_path):
    root = tmp_path / "new" / "root"
    assert len(load("mnist", root).train) == 30
    assert everything(root) == [
        "MNIST",
        *(f"MNIST/{name}" for name in sorted(os.listdir(tmp_path / "published"))),
    ]
    assert len(mnist.asked) == 8
    load("mnist", root)
    assert len(mnist.asked) == 8  # nothing is fetched twice


def test_only_what_is_missing_is_fetched(mnist, tmp_path):
    load("mnist", tmp_path / "root")
    (tmp_path / "root" / "MNIST" / "t10k-labels-idx1-ubyte.gz").unlink()
    mnist.asked.clear()
    load("mnist", tmp_path / "root")
    assert mnist.asked == [f"/{mirror}/t10k-labels-idx1-ubyte.gz" for mirror in ("gone", "mnist")]


def test_an_archive_is_unpacked_in_place(cifar10, tmp_path):
    root = tmp_path / "root"
    data = load("cifar10", root)
    assert np.array_equal(data.test.images.numpy(), cifar10.rows[20:].reshape(-1, 3, 32, 32))
    assert os.listdir(root) == ["cifar-10-batches-py"]


def test_an_incomplete_folder_is_completed(cifar10, tmp_path):
    root = tmp_path / "root"
    load("cifar10", root)
    (root / "cifar-10-batches-py" / "data_batch_5").unlink()
    (root / "cifar-10-batches-py" / "mine").touch()
    assert len(load("cifar10", root).train) == 20
    assert (root / "cifar-10-batches-py" / "mine").exists()
    assert os.listdir(root) == ["cifar-10-batches-py"]


def test_without_permission_nothing_is_asked(mnist, tmp_path):
    with pytest.raises(
        DataError, match=r"files are missing; mnist: put train-images-idx3-ubyte\.gz, .* into"
    ):
        load("mnist", tmp_path / "root", download=False)
    assert mnist.asked == []
    assert not (tmp_path / "root").exists()


def test_a_network_that_refuses_gives_one_line_with_files_and_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        remote = Remote("c.tar.gz", "0" * 32, (f"http://127.0.0.1:{port}/c.tar.gz",))
        source = Source("cifar-10-batches-py", (remote,), unpack=True)
        monkeypatch.setitem(catalogue.SOURCES, "cifar10", source)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError) as error:
            load("cifar10", "root")
    batches = ", ".join(f"data_batch_{k}" for k in range(1, 6))
    assert f"put {batches}, test_batch into {tmp_path}/root/cifar-10-batches-py" in str(error.value)
    assert f"http://127.0.0.1:{port}/c.tar.gz could not be downloaded ([Errno " in str(error.value)
    assert "\n" not in str(error.value)
    assert everything(tmp_path / "root") == []


def test_the_first_refusal_is_the_one_told(mnist, tmp_path):
    mnist.files.clear()
    with pytest.raises(DataError, match=r"/gone/.* \(HTTP Error 404: Not Found\); mnist: put"):
        load("mnist", tmp_path / "root")
    assert everything(tmp_path / "root") == []


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: b"\0" + content[1:]])
def test_a_wrong_checksum_leaves_nothing(mnist, cifar10, tmp_path, change):
    for name, path in (("mnist", "/mnist/t10k-images-idx3-ubyte.gz"), ("cifar10", "/c.tar.gz")):
        whole = mnist.files[path]
        mnist.files[path] = change(whole)
        expected = f"{path} gave a file with MD5 {md5(change(whole))}, expected {md5(whole)}; it was not kept"
        with pytest.raises(DataError) as error:
            load(name, tmp_path / name)
        assert str(error.value) == mnist.url + expected
        assert everything(tmp_path / name) == []


def test_a_wrong_file_on_one_mirror_is_passed_over(mnist, tmp_path):
    for path in list(mnist.files):
        mnist.files[path.replace("/mnist", "/gone")] = b"an error page"
    assert len(load("mnist", tmp_path / "root").train) == 30


def test_an_archive_that_reaches_outside_is_refused(site, tmp_path, monkeypatch):
    def fill(tar):
        member = tarfile.TarInfo("../../../outside")
        tar.addfile(member, io.BytesIO())

    publish_archive(site, monkeypatch, fill)
    with pytest.raises(DataError, match=r"c\.tar\.gz is a damaged archive: .*outside"):
        load("cifar10", tmp_path / "a" / "b")
    assert everything(tmp_path) == ["a", "a/b"]


def test_an_archive_without_the_folder_is_refused(site, tmp_path, monkeypatch):
    publish_archive(site, monkeypatch, lambda tar: tar.addfile(tarfile.TarInfo("else"), io.BytesIO()))
    with pytest.raises(DataError, match=r"holds no folder cifar-10-batches-py"):
        load("cifar10", tmp_path / "root")
    assert everything(tmp_path / "root") == []


def test_a_root_that_cannot_be_written_is_named(mnist, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/root cannot be written: .*Not a directory"):
        load("mnist", tmp_path / "file" / "root")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_downloads_at_once_agree(mnist, cifar10, tmp_path, name):
    root, failures = tmp_path / "root", []
    start = threading.Barrier(4)

    def one():
        start.wait()
        try:
            load(name, root)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(os.listdir(root)) == 1
    assert not [path for path in everything(root) if ".download-" in path]
