"""Count what a reader has to follow: the functions that one `ckptavg average` calls.

Three tiny checkpoints of a network with BatchNorm are averaged by the command line: once to import
all modules, and once more under a profiler. It counts the package's functions that are called
(comprehensions and generator expressions too), the files that define them, and the changes of file:
calls into another file than the call before.

With `--list` it also prints the functions, file by file, in the order of their first calls.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Self

import numpy as np
from safetensors.numpy import save_file

import ckptavg
from ckptavg import cli

PACKAGE = Path(ckptavg.__file__).parent
SHAPES: dict[str, tuple[int, ...]] = {
    "conv.weight": (8, 3, 3, 3),
    "conv.bias": (8,),
    "bn.weight": (8,),
    "bn.bias": (8,),
    "bn.running_mean": (8,),
    "bn.running_var": (8,),
    "head.weight": (4, 8),
    "head.bias": (4,),
}


class Calls:
    """A profiler that records the code of each call of the package's functions, in all threads."""

    def __init__(self) -> None:
        self.codes: list[CodeType] = []

    def __enter__(self) -> Self:
        threading.setprofile(self._record)
        sys.setprofile(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _record(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            self.codes.append(frame.f_code)

    def numbers(self) -> tuple[int, int, int]:
        """Distinct functions, files, and changes of file."""
        files = [code.co_filename for code in self.codes]
        changes = sum(before != after for before, after in itertools.pairwise(files))
        return len(set(self.codes)), len(set(files)), changes

    def listing(self) -> str:
        """Names of the functions under their files, in the order of the first calls."""
        functions: dict[str, list[str]] = {}
        for code in dict.fromkeys(self.codes):
            functions.setdefault(code.co_filename, []).append(code.co_qualname)
        return "\n".join(
            f"{Path(file).relative_to(PACKAGE)}: {', '.join(names)}"
            for file, names in functions.items()
        )


def save_checkpoints(folder: Path) -> None:
    """Save three checkpoints."""
    random = np.random.default_rng(0)
    for step in range(3):
        state = {name: random.random(shape, np.float32) for name, shape in SHAPES.items()}
        counter = {"bn.num_batches_tracked": np.array(step)}
        save_file(state | counter, folder / f"step_{step}.safetensors")


def average(folder: Path, output: Path) -> None:
    """Run the command; what it prints goes nowhere."""
    with contextlib.redirect_stdout(io.StringIO()):
        cli.cli.main(["average", str(folder), "-o", str(output)], standalone_mode=False)


def main() -> None:
    """Print the numbers, and the functions if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the functions too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        save_checkpoints(checkpoints)
        average(checkpoints, Path(folder) / "first.safetensors")
        with Calls() as calls:
            average(checkpoints, Path(folder) / "second.safetensors")
    functions, files, changes = calls.numbers()
    print(f"{functions} functions, {files} files, {changes:,} changes of file")
    if options.list:
        print(calls.listing())


if __name__ == "__main__":
    main()
