"""Where the authors of a data set put its files, and which of them are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Files of one data set in one folder.

    ``folders`` are relative to the root, in the order in which they are tried; "." is the root itself.
    ``suffixes`` are endings that a file may have on disk. ``foreign`` names folders of another data set
    with the same file names: a root of that name is not taken for our own folder.
    """

    folders: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    suffixes: tuple[str, ...] = ("",)
    foreign: tuple[str, ...] = ()

    def path(self, folder: Path, file: str) -> Path | None:
        """The file on disk, under the first suffix that exists."""
        candidates = (folder / f"{file}{suffix}" for suffix in self.suffixes)
        return next((path for path in candidates if path.is_file()), None)

    def missing(self, folder: Path) -> list[str]:
        """Names of the files that ``folder`` lacks, as the authors publish them."""
        return [
            f"{file}{self.suffixes[-1]}" for file in self.train + self.test if self.path(folder, file) is None
        ]

    def locate(self, root: Path) -> Path | None:
        """The first folder that holds every file, or None."""
        return next((folder for folder in self._candidates(root) if not self.missing(folder)), None)

    def advice(self, root: Path) -> str:
        """Which files to put where: completes a folder that holds some, else names the first choice."""
        folders = self._candidates(root)
        everything = len(self.train + self.test)
        begun = [folder for folder in folders if len(self.missing(folder)) < everything]
        folder = (begun or folders)[0]
        return f"put {', '.join(self.missing(folder))} into {folder.absolute()}"

    def _candidates(self, root: Path) -> list[Path]:
        alien = root.name in self.foreign or root.parent.name in self.foreign
        return [root / folder for folder in self.folders if not (folder in (".", "raw") and alien)]
