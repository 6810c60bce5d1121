"""Points that have been evaluated, kept in a database: a run that was killed goes on from there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ckptavg import __version__
from ckptavg.errors import OutputError
from ckptavg.evaluation.evaluate import EvaluationOptions
from ckptavg.model.factories import name_of
from ckptavg.write.temporary import wait_for_lock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ckptavg.distributed import Ranks

Values = dict[str, float]
"""Metrics by name, `train loss` and so on."""

POINTS = "points.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS task (facts TEXT);
CREATE TABLE IF NOT EXISTS points (place TEXT PRIMARY KEY, metrics TEXT);
"""


class Journal:
    """The points of a landscape or of a sweep.

    Attributes:
        done: the values of each point, by its name.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._path = connection, path
        rows = connection.execute("SELECT place, metrics FROM points")
        self.done: dict[str, Values] = {place: json.loads(metrics) for place, metrics in rows}

    def add(self, place: str, values: Values) -> None:
        """Keep a point's values, on the disk before the next point begins."""
        with _as_output_errors(self._path), self._connection:
            row = place, json.dumps(values)
            self._connection.execute("INSERT OR REPLACE INTO points VALUES (?, ?)", row)
        self.done[place] = values


@contextlib.contextmanager
def journal(
    folder: Path | None,
    task: dict[str, Any],
    ranks: Ranks,
    *,
    force: bool = False,
    results: Sequence[str] = (),
) -> Iterator[Journal]:
    """The points in a directory, in which no other run works meanwhile.

    Args:
        folder: the directory, which is made; None to keep the points in memory alone.
        task: what is evaluated: points of another task do not count.
        ranks: the processes, all of which call this.
        force: forget all points that are there.
        results: names of files that must not be there without points.

    Raises:
        OutputError: the directory cannot be made, has points of another task, or files under the
            names of the results; or another run is at work in it.
    """
    if folder is None:
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(_TABLES)
            yield Journal(connection, Path(POINTS))
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror}", path=folder) from error
    path = folder / POINTS
    with contextlib.ExitStack() as stack:
        with _as_output_errors(path):
            if ranks.rank == 0:
                _lock(folder, stack)
                _prepare(path, task, force=force, results=results)
        ranks.gather(None)
        with _as_output_errors(path):
            connection = stack.enter_context(contextlib.closing(_connect(path)))
            kept = Journal(connection, path)
        ranks.gather(None)  # all have read the points
        yield kept


@contextlib.contextmanager
def _as_output_errors(path: Path) -> Iterator[None]:
    """Raise an error of the database as one of this package, with the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise OutputError(f"cannot be used: {error}", path=path) from error
    except OSError as error:
        raise OutputError(f"cannot be used: {error.strerror}", path=path) from error


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Lock a directory until the stack unwinds.

    The loader's workers have the lock of a run that was killed, and end some seconds later.

    Raises:
        OutputError: another run has locked it.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    if not wait_for_lock(fd):
        raise OutputError("another run is using it", path=folder)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=600)  # seconds that it waits for another process


def _prepare(path: Path, task: dict[str, Any], *, force: bool, results: Sequence[str]) -> None:
    """Make the database, or see that its points are of this task.

    Raises:
        OutputError: they are of another task; or there is none, but a file that has the name of a
            result.
    """
    if force:
        for old in (path, path.with_name(f"{path.name}-journal")):
            old.unlink(missing_ok=True)
    elif not path.exists():
        for result in map(path.with_name, results):
            if os.path.lexists(result):
                raise OutputError("exists already", path=result, remedy="`force` replaces it")
    facts = json.dumps(task, sort_keys=True)
    with contextlib.closing(_connect(path)) as connection, connection:
        connection.executescript(_TABLES)
        known = [row[0] for row in connection.execute("SELECT facts FROM task")]
        if not known:
            connection.execute("INSERT INTO task VALUES (?)", (facts,))
        elif known != [facts]:
            raise OutputError(
                "has points of other checkpoints, options or code",
                path=path.parent,
                remedy="name another directory" + ", or replace them with `force`" * bool(results),
            )


def task_of(kind: str, evaluation: EvaluationOptions, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    """What the values of points depend on, beside the point.

    Args:
        kind: of landscape, or `sweep`.
        evaluation: how points are evaluated.
        more: further options and facts.
    """
    refresh = evaluation.refresh
    options = {
        **{each.name: getattr(evaluation, each.name) for each in fields(EvaluationOptions)},
        "refresh": None if refresh is None else refresh.keywords,
        "refresh_loader": None if refresh is None else refresh.loader,
        "refresh_loader_args": None if refresh is None else refresh.loader_args,
        **more,
    }
    del options["device"]
    facts = {name: _identity(value) for name, value in options.items()}
    return {"ckptavg": __version__, "kind": kind, **facts, "code": _code_of(options.values())}


def _identity(value: object) -> object:
    """What tells an option's value from others: for an object, a name that nothing else has."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return repr(sorted(value.items()))
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return list(value)
    return f"{name_of(value)} {uuid4()}"


def _code_of(options: Iterable[object]) -> list[str]:
    """Digests of the files that specs name: other code may give other values."""
    specs = [value for value in options if isinstance(value, str) and ".py:" in value]
    paths = [Path(spec.rpartition(":")[0]) for spec in specs]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]
