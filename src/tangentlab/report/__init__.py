"""The report: run folders or a study's in, one self-contained HTML page and its figures as SVG and PDF out.

A data function a figure (``figures/``) says what is drawn; ``interactive`` and ``paper`` draw it with plotly
and matplotlib; ``page`` puts the HTML together. Nothing heavy is loaded before a report is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["write_ledger", "write_report"]


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report on ``runs``, or on one study, as one HTML file, and each figure beside it in figures/.

    Args:
        runs: run folders, finished or not, whose order is that of colours and of the table; or the folder of
            one study that was judged.
        out: the HTML file to write; figures/NAME.svg and figures/NAME.pdf go into its folder.

    Returns:
        ``out``.

    Raises:
        RunFolderError: no run given, a folder that is not a run, a study that was not judged or that is not
            alone, or an ``out`` that is a folder.
        CheckpointError: a kernel file cannot be read.
        StorageError: the disk refused.
    """
    from tangentlab.report.page import write_page  # plotly and matplotlib load here, not with the package

    return write_page([Path(run) for run in runs], Path(out))


def write_ledger(studies: Sequence[Mapping[str, Any]], out: str | Path) -> Path:
    """Write the claims of several studies, each as its study.json, as one HTML file.

    Returns:
        ``out``.

    Raises:
        RunFolderError: claims that cannot be read, or an ``out`` that is a folder.
        StorageError: the disk refused.
    """
    from tangentlab.report.page import write_ledger

    return write_ledger(studies, Path(out))
