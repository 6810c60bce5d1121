"""The report of a refresh as a JSON file, with the statistics of each layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ckptavg.errors import OutputError, printable
from ckptavg.formats.jsontext import to_text
from ckptavg.write.temporary import temporary_beside
from ckptavg.write.writing import check_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptavg.batchnorm.report import RefreshReport


class ReportFile:
    """Where a report goes, found to be possible before there is any.

    Args:
        path: of the file; None for none.
        force: replace what is there.
        others: what it must not be.

    Raises:
        OutputError: it exists, or its directory does not, or it is one of the others.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        force: bool,
        others: Iterable[str | os.PathLike[str] | None],
    ) -> None:
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        own = Path(os.path.realpath(self._path))
        for other in others:
            whole = None if other is None else Path(os.path.realpath(other))
            if whole is not None and (whole == own or whole in own.parents):
                raise OutputError(
                    "is the checkpoint or the output, and not for a report", path=self._path
                )
        check_file(self._path, force=force)

    def write(
        self,
        checkpoint: Path,
        output: str | os.PathLike[str] | None,
        report: RefreshReport,
    ) -> None:
        """Write it, whole or not at all.

        Raises:
            OutputError: that did not work.
        """
        if self._path is None:
            return
        where = {"checkpoint": printable(checkpoint), "output": printable(output or checkpoint)}
        text = to_text(where | report.as_dict(statistics=True)) + "\n"
        try:
            with temporary_beside(self._path, folder=True) as folder:
                made = folder / self._path.name
                made.write_text(text, encoding="utf-8")
                made.replace(self._path)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", path=self._path) from error
