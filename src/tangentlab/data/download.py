"""Fetches the files of a data set: verified before they get their final name, whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tangentlab.data.sources import Remote, Source
from tangentlab.errors import DataError

_TIMEOUT = 10.0  # seconds without an answer
_CHUNK = 1 << 20
_log = logging.getLogger(__name__)


def fetch(source: Source, root: Path, *, advice: str) -> None:
    """Download the files that ``source`` puts below ``root`` and that are not there yet.

    Everything is written in a temporary folder beside the target and then renamed, so that processes that
    download at once only ever replace a verified file by the same one.

    Args:
        advice: what the user can do instead, for the error when no mirror answers.

    Raises:
        DataError: no mirror answers, a checksum differs, or the folder cannot be written.
    """
    target = root / source.folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Beside the final files: a rename across disks would not be atomic.
        beside = target if target.is_dir() and not source.unpack else root
        with tempfile.TemporaryDirectory(prefix=".download-", dir=beside) as temporary:
            for remote in source.remotes:
                if source.unpack:
                    _unpack(_download(remote, Path(temporary), advice), target)
                elif not (target / remote.file).is_file():
                    path = _download(remote, Path(temporary), advice)
                    target.mkdir(exist_ok=True)
                    os.replace(path, target / remote.file)
    except OSError as error:
        raise DataError(f"{root.absolute()} cannot be written: {_brief(error)}; {advice}") from error


def _download(remote: Remote, folder: Path, advice: str) -> Path:
    """The verified file in ``folder``, from the first mirror that gives it."""
    path = folder / remote.file
    refused, wrong = "", ""
    for url in remote.urls:
        _log.info("downloading %s", url)
        try:
            md5 = _stream(url, path)
        except (OSError, http.client.HTTPException) as error:
            refused = refused or f"{url} could not be downloaded ({_brief(error)}); {advice}"
            continue
        if md5 == remote.md5:
            return path
        wrong = wrong or f"{url} gave a file with MD5 {md5}, expected {remote.md5}; it was not kept"
    raise DataError(wrong or refused)


def _stream(url: str, path: Path) -> str:
    """Write what ``url`` gives to ``path`` and return its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, path.open("wb") as file:
        while chunk := response.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _unpack(archive: Path, target: Path) -> None:
    """Extract the tar file beside itself and put its folder ``target.name`` in place."""
    extracted = archive.parent / "extracted"
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(extracted, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive.name} is a damaged archive: {_brief(error)}") from error
    folder = extracted / target.name
    if not folder.is_dir():
        raise DataError(f"{archive.name} holds no folder {target.name}")
    try:
        os.rename(folder, target)
    except OSError:
        # The folder is there already: incomplete, or another process was faster.
        target.mkdir(exist_ok=True)
        for path in folder.iterdir():
            os.replace(path, target / path.name)


def _brief(error: Exception) -> str:
    # A URLError wraps the socket's error; its subclass HTTPError already says code and reason.
    reason = error.reason if type(error) is urllib.error.URLError else error
    return " ".join(str(reason).split()) or type(error).__name__
