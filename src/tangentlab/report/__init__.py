"""The report: run folders in, one self-contained HTML page and its figures as SVG and PDF out.

A data function a figure (``figures/``) says what is drawn; ``interactive`` and ``paper`` draw it with plotly
and matplotlib; ``page`` puts the HTML together. Nothing heavy is loaded before a report is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_report"]


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report on ``runs`` as one HTML file, and each figure beside it in figures/.

    Args:
        runs: run folders, finished or not; their order is the order of colours and of the table.
        out: the HTML file to write; figures/NAME.svg and figures/NAME.pdf go into its folder.

    Returns:
        ``out``.

    Raises:
        RunFolderError: no run given, a folder that is not a run, or an ``out`` that is a folder.
        CheckpointError: a kernel file cannot be read.
        StorageError: the disk refused.
    """
    from tangentlab.report.page import write_page  # plotly and matplotlib load here, not with the package

    return write_page([Path(run) for run in runs], Path(out))
