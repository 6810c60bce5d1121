"""What was found, as JSON and CSV and as pictures, in the directory that has the points."""

from __future__ import annotations

import csv
import io
import logging
from typing import TYPE_CHECKING, Any

from ckptavg import __version__
from ckptavg.errors import OutputError, printable
from ckptavg.formats.jsontext import to_text
from ckptavg.write.temporary import temporary_beside

if TYPE_CHECKING:
    from pathlib import Path

    from ckptavg.landscape.plane import PlaneResult
    from ckptavg.landscape.rays import Rays
    from ckptavg.landscape.segment import Segment


log = logging.getLogger("ckptavg")


def save(
    result: Rays | Segment | PlaneResult, folder: Path, kind: str, *, plots: bool
) -> list[Path]:
    """Write it, each file whole or not at all.

    Args:
        result: what was found.
        folder: where it goes.
        kind: the files' name, before their endings.
        plots: draw it as well, which needs matplotlib.

    Returns:
        The files.

    Raises:
        OutputError: they cannot be written.
    """
    with temporary_beside(folder / kind, folder=True) as made:
        try:
            as_json = {"ckptavg": __version__, "kind": kind, **vars(result)}
            (made / f"{kind}.json").write_text(to_text(as_json) + "\n", encoding="utf-8")
            (made / f"{kind}.csv").write_text(_csv(result.rows()), encoding="utf-8")
            saved = [file.replace(folder / file.name) for file in sorted(made.iterdir())]
            if plots:
                _draw(result, made / kind, _title(result, kind))
            return saved + [file.replace(folder / file.name) for file in sorted(made.iterdir())]
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", path=folder) from error


def _draw(result: Rays | Segment | PlaneResult, path: Path, title: str) -> None:
    """Draw it; the numbers are there if that fails."""
    from ckptavg.landscape.plots import draw  # noqa: PLC0415 - an extra

    try:
        draw(result, path, title)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever values can make matplotlib trip over
        log.warning("cannot be drawn: %s", printable(error))
        for file in path.parent.iterdir():
            file.unlink()


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _title(result: Rays | Segment | PlaneResult, kind: str) -> str:
    statistics = "refreshed at each point" if result.refreshed else "not refreshed"
    return f"{kind}, {result.dimension:,} parameters, norm statistics {statistics}"
