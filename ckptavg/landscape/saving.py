"""A landscape as JSON, as CSV and as pictures, in the directory that has the points."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ckptavg import __version__
from ckptavg.errors import OutputError, printable
from ckptavg.evaluation.swept import to_csv
from ckptavg.formats.jsontext import to_text
from ckptavg.write.temporary import temporary_beside

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.landscape.result import Landscape


log = logging.getLogger("ckptavg")


def save(landscape: Landscape, folder: Path, *, plots: bool) -> list[Path]:
    """Write a landscape, each file whole or not at all.

    Args:
        landscape: the landscape, whose kind is the files' name.
        folder: where it goes.
        plots: draw it as well, which needs matplotlib.

    Returns:
        The files.

    Raises:
        OutputError: they cannot be written.
    """
    kind = landscape.kind
    with temporary_beside(folder / kind, folder=True) as made:
        try:
            as_json = {"ckptavg": __version__, **landscape.as_dict()}
            (made / f"{kind}.json").write_text(to_text(as_json) + "\n", encoding="utf-8")
            (made / f"{kind}.csv").write_text(to_csv(landscape.rows()), encoding="utf-8")
            saved = [file.replace(folder / file.name) for file in sorted(made.iterdir())]
            if plots:
                _draw(landscape, made / kind)
            return saved + [file.replace(folder / file.name) for file in sorted(made.iterdir())]
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", path=folder) from error


def _draw(landscape: Landscape, path: Path) -> None:
    """Draw it; the numbers are there if that fails."""
    from ckptavg.landscape.plots import draw  # noqa: PLC0415 - an extra

    try:
        draw(landscape, path)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever values can make matplotlib trip over
        log.warning("cannot be drawn: %s", printable(error))
        for file in path.parent.iterdir():
            file.unlink()
