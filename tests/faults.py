"""Runs of the real command in which the n-th call of the system fails, stops or is the last.

`tests/faults.c` stands between Python and the C library. A warm process, in which everything is
imported already, forks for each run, so that a run takes hundredths of a second and every call of
a small one can be tried. `python -m tests.faults` is that process.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import importlib
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ckptavg

HERE = Path(__file__).parent

KINDS = {
    "create": 1, "allocate": 2, "write": 4, "sync": 8, "sync folder": 16, "link": 32,
    "rename": 64, "remove": 128, "mkdir": 256, "chmod": 512, "read": 1024, "open": 2048,
}  # fmt: skip
CHANGES = tuple(kind for kind in KINDS if kind not in ("read", "open"))
"""Calls after which the disk is another one."""
_NAMES = {bit: kind for kind, bit in KINDS.items()}
_ACTS = {"nothing": 0, "fail": 1, "before": 2, "after": 3, "short": 4}
_REFUSALS = {"exchange": 1, "link": 2}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens at which call.

    Attributes:
        kinds: the calls that are counted.
        number: which of them, from 1.
        act: `fail`; `before` and `after`: a signal comes then; `short`: fewer bytes are done.
        value: the error's or the signal's number.
        sticky: so do all later ones.
        refused: what the file system cannot do: `exchange`, `link`.
    """

    kinds: Sequence[str] = CHANGES
    number: int = 0
    act: str = "nothing"
    value: int = 0
    sticky: bool = False
    refused: Sequence[str] = ()

    def words(self) -> tuple[Any, ...]:
        """The arguments of `faults_arm`, but for the directory."""
        kinds = sum(KINDS[kind] for kind in self.kinds)
        refused = sum(_REFUSALS[name] for name in self.refused)
        return kinds, self.number, _ACTS[self.act], self.value, int(self.sticky), refused


@dataclass(frozen=True)
class Call:
    """A call that touched a file."""

    kind: str
    name: str
    path: str


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code, or the number of the signal that ended it, negative."""

    code: int
    out: str
    err: str
    calls: Sequence[Call] = field(repr=False)

    def count(self, kinds: Sequence[str]) -> int:
        """How many calls of these kinds it made."""
        return sum(call.kind in kinds for call in self.calls)


def why_not() -> str | None:
    """Why faults cannot be made here; None if they can."""
    if not sys.platform.startswith("linux"):
        return "the calls are those of Linux"
    return None if shutil.which("cc") else "there is no C compiler"


def build(folder: Path) -> Path:
    """Compile the library that is preloaded."""
    library = folder / "faults.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"], check=True
    )
    return library


class Server:
    """The warm process.

    Args:
        library: what `build` made.
        torch: import it as well, for commands that run a model: each run then takes longer.
    """

    def __init__(self, library: Path, *, torch: bool = False) -> None:
        ours = {
            "LD_PRELOAD": str(library), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "400",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults", *(["torch"] if torch else [])],
            cwd=HERE.parent, env=os.environ | ours, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def run(self, root: Path, arguments: Sequence[object], fault: Fault | None = None) -> Outcome:
        """Run a command in a directory to its end; only calls that touch files in it count."""
        return Run(self, root, arguments, fault or Fault()).to_end()

    def hold(self, root: Path, arguments: Sequence[object], fault: Fault) -> Run:
        """Run a command until it is held."""
        run = Run(self, root, arguments, fault)
        assert run.go_on() is None, "it ended, and was to be held"
        return run


class Run:
    """A run that may be held at an instant: with SIGSTOP for the fault's signal.

    Args:
        server: forks for it. One run at a time.
        root: its working directory, absolute.
        arguments: of the command.
        fault: what happens in it.
    """

    def __init__(
        self, server: Server, root: Path, arguments: Sequence[object], fault: Fault
    ) -> None:
        self._server = server
        self._begun = False
        self._question = {
            "root": str(root.resolve()),
            "arguments": [str(argument) for argument in arguments],
            "fault": fault.words(),
        }

    def go_on(self, number: int = 0) -> Outcome | None:
        """Let it run until it ends, or is held (None); a signal may come first."""
        question = {"signal": number} if self._begun else self._question
        self._begun = True
        answer = self._server._ask(question)
        if answer["held"]:
            return None
        calls = [Call(_NAMES[int(kind)], *rest) for kind, *rest in answer["calls"]]
        return Outcome(answer["code"], answer["out"], answer["err"], calls)

    def to_end(self) -> Outcome:
        """Let it run to its end."""
        outcome = self.go_on()
        assert outcome is not None, "it was held, and is not to be"
        return outcome


def environment(library: Path, root: Path, fault: Fault) -> dict[str, str]:
    """What a process that is started anew finds, to have the fault from its first call."""
    words = " ".join(map(str, fault.words()))
    return os.environ | {"LD_PRELOAD": str(library), "FAULTS": words, "FAULTS_ROOT": str(root)}


def tree(path: Path) -> dict[str, bytes | None] | None:
    """A file's or a directory's content; None if there is none."""
    if not os.path.lexists(path):
        return None
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        found.relative_to(path).as_posix(): found.read_bytes() if found.is_file() else None
        for found in path.rglob("*")
    }


def _import_all(*, torch: bool) -> None:
    """Import what the commands need, so that no run has to."""
    rooms = {"average", "cli", "distributed", "formats", "select", "merge", "write"}
    rooms |= {"batchnorm", "model"} if torch else set()
    assert rooms <= {module.name for module in pkgutil.iter_modules(ckptavg.__path__)}
    for module in pkgutil.walk_packages(ckptavg.__path__, "ckptavg."):
        if module.name.split(".")[1] in rooms:
            importlib.import_module(module.name)
    if torch:
        importlib.import_module("numpy.random")  # whose generator a refresh seeds


def _serve() -> None:
    _import_all(torch="torch" in sys.argv)
    library = ctypes.CDLL(None)
    library.faults_log.restype = ctypes.c_char_p
    library.faults_arm.argtypes = [
        ctypes.c_char_p, ctypes.c_uint, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int,
        ctypes.c_uint,
    ]  # fmt: skip
    gc.freeze()
    for line in sys.stdin:
        question = json.loads(line)
        if "signal" in question:
            _go_on(question["signal"])
        else:
            _start(library, question)
        print(json.dumps(_answer(library)), flush=True)


_child: tuple[int, Path] | None = None


def _start(library: Any, question: dict[str, Any]) -> None:
    global _child  # noqa: PLW0603 - the one that is held, or about to be waited for
    said = Path(tempfile.mkdtemp())
    root = question["root"]
    pid = os.fork()
    if pid:
        _child = pid, said
        return
    for number, name in ((1, "out"), (2, "err")):
        fd = os.open(said / name, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(root)
    # As in a shell's foreground, whatever this process itself ignores.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["ckptavg", *question["arguments"]]
    cli = importlib.import_module("ckptavg.cli")
    library.faults_arm(os.fsencode(root), *question["fault"])
    try:
        cli.main()
    except SystemExit as end:
        # As the interpreter ends, but for taking all modules apart, which takes most of the time.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def _go_on(number: int) -> None:
    assert _child is not None
    for one in (number, signal.SIGCONT):
        os.kill(_child[0], one)


def _answer(library: Any) -> dict[str, Any]:
    assert _child is not None
    pid, said = _child
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return {"held": True}
    out, err = ((said / name).read_text() for name in ("out", "err"))
    shutil.rmtree(said)
    lines = library.faults_log().decode(errors="replace").splitlines()
    return {
        "held": False,
        "code": os.waitstatus_to_exitcode(status),
        "out": out,
        "err": err,
        "calls": [line.split(" ", 2) for line in lines],
    }


ENOSPC, EIO = errno.ENOSPC, errno.EIO

if __name__ == "__main__":
    _serve()
