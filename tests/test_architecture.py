"""The package's rooms: imports run in one direction and in no circle; files stay readable."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import ckptavg

PACKAGE = Path(ckptavg.__file__).parent
# From the top to the bottom. A room imports from those below it, and from none on its own floor.
FLOORS = (
    {"cli"},
    {"demo"},
    {"landscape"},
    {"norm"},
    {"average"},  # and verify, which averages again
    {"write"},
    {"merge"},
    {"select"},
    {"formats", "distributed"},
    {"errors"},
)
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES = 400
# Imports that run upwards or in a circle, and are still to be turned around.
UNSETTLED = {
    ("formats.remote", "formats.parts"),
    ("norm.files", "norm.judging"),
}


def modules() -> dict[str, Path]:
    """The files of the package by the names of their modules, without the package's own."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return files


def room(module: str) -> str:
    first = module.partition(".")[0]
    return "average" if first == "verify" else first


def imports(path: Path) -> Iterator[str]:
    """The package's modules that a file imports anywhere: in functions and for type checks, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE.name:
                yield rest


def imported_modules() -> dict[str, set[str]]:
    """For each module of the package those that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        found = set()
        for name in imports(path):
            candidates = (name, name.rpartition(".")[0])
            found.add(next((one for one in candidates if one in known), "__init__"))
        graph[module] = found - {module}
    graph["__init__"] = set()  # it names what the package offers, and imports that when asked for
    return graph


def settled_imports() -> dict[str, set[str]]:
    """The imports without those that are still to be turned around."""
    return {
        module: {other for other in others if (module, other) not in UNSETTLED}
        for module, others in imported_modules().items()
    }


def test_imports_run_one_way():
    wrong = [
        f"{module} imports {other}"
        for module, others in settled_imports().items()
        for other in others
        if {room(module), room(other)} <= LEVELS.keys() and room(module) != room(other)
        if LEVELS[room(module)] >= LEVELS[room(other)]
    ]
    assert wrong == []


def test_imports_run_in_no_circle():
    graphlib.TopologicalSorter(settled_imports()).prepare()


def test_no_file_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in modules().values()}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}
