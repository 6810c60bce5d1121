"""The package's rooms: imports run in one direction and in no circle; files stay readable."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import ckptavg

PACKAGE = Path(ckptavg.__file__).parent
# From the top to the bottom. A room imports from those below it; those on its own floor are named.
FLOORS = (
    {"cli"},
    {"demo"},
    {"landscape"},
    {"evaluation"},
    {"batchnorm", "model"},
    {"average", "convert", "verify"},
    {"write"},
    {"merge", "select"},
    {"formats", "distributed", "options"},
    {"errors"},
)
BESIDE = {
    ("batchnorm", "model"),
    ("verify", "average"),
    ("convert", "average"),
    ("merge", "select"),
}
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# The package itself, which imports what it offers when asked for it; and `python -m ckptavg`.
ENTRANCES = {"__init__", "__main__"}
MOST_LINES = 400


def modules() -> dict[str, Path]:
    """The files of the rooms by the names of their modules."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name not in ENTRANCES:
            files[name.removesuffix(".__init__")] = path
    return files


def room(module: str) -> str:
    """The folder of a module, or the module itself where it stands at the root."""
    return module.partition(".")[0]


def imported_names(path: Path) -> Iterator[str]:
    """Names that a file imports, in functions and for type checks too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def imports() -> dict[str, set[str]]:
    """For each module of the package, the others that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {module: set() for module in known}
    for module, path in known.items():
        for name in imported_names(path):
            inner = name.removeprefix(f"{PACKAGE.name}.")
            candidates = {inner, inner.rpartition(".")[0]} & known.keys()
            graph[module] |= {max(candidates, key=len)} if candidates and inner != name else set()
        graph[module].discard(module)
    return graph


def test_imports_run_one_way():
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room(module) != room(other) and LEVELS[room(module)] >= LEVELS[room(other)]
        if (room(module), room(other)) not in BESIDE
    ]
    assert wrong == []


def test_imports_run_in_no_circle():
    graphlib.TopologicalSorter(imports()).prepare()


def test_the_rooms_are_those_of_the_map():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")} - ENTRANCES
    assert rooms | files == LEVELS.keys()
    assert files == {"average", "convert", "verify", "distributed", "options", "errors"}
    assert len(FLOORS) <= 10


def test_no_file_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in modules().values()}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_test_module_imports_another():
    tests = Path(__file__).parent
    wrong = [
        f"{path.relative_to(tests)}: {line}"
        for path in tests.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(from|import) tests\b.*\btest_", line)
    ]
    assert wrong == []
