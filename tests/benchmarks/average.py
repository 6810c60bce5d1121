"""Time `ckptavg average` beside `cat` and `cp`, and beside a plain torch loop.

Whole processes, from interleaved runs, with the inputs in the page cache.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.benchmarks import measure
    from tests.benchmarks.measure import Command, Run
else:
    import measure  # a script finds what is beside it, and knows of no package

HERE = Path(__file__).resolve().parent
SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt"}
_START_UPS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "ckptavg --help": [sys.executable, "-m", "ckptavg", "--help"],
    "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    """Make the checkpoints, time the contenders, clean up."""
    options = arguments()
    scratch = Path(tempfile.mkdtemp(dir=options.folder, prefix="ckptavg-benchmark-"))
    try:
        inputs = scratch / "checkpoints"
        inputs.mkdir()
        refuse_small_disk(scratch, options)
        make(inputs, options)
        report(sorted(inputs.iterdir(), key=_step), scratch, options)
    finally:
        if options.keep:
            print(f"\nkept {scratch}")
        else:
            shutil.rmtree(scratch)


def _step(path: Path) -> int:
    return int(path.stem.split("_")[1])


def report(paths: list[Path], scratch: Path, options: argparse.Namespace) -> None:
    """Time everything, and print it."""
    print(measure.machine())
    print(f"\n{describe(paths, options)}")
    print(measure.table(averages(paths, scratch, options), {"ratio": "cat, cp"}))
    print(f"\nstart-up, {options.start_ups} runs")
    print(measure.table(start_ups(scratch, options), {"ratio": "python -c pass"}))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=6)
    parser.add_argument("--gigabytes", type=float, default=1.3, help="of each checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--container", choices=SUFFIXES, default="safetensors")
    parser.add_argument("--output-container", choices=SUFFIXES, help="default: as the inputs")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--start-ups", type=int, default=10, help="runs of `ckptavg --help`")
    parser.add_argument("--folder", type=Path, help="where the files go, on the disk in question")
    parser.add_argument("--no-fsync", action="store_true", help="nobody waits for the disk")
    parser.add_argument("--no-torch", action="store_true", help="leave out the torch loop")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints behind")
    return parser.parse_args()


def refuse_small_disk(folder: Path, options: argparse.Namespace) -> None:
    """Stop before the disk is full: the inputs, an output, and one more while `.pt` is made.

    Raises:
        SystemExit: there is too little room.
    """
    need, free = (options.checkpoints + 2) * options.gigabytes * 1e9, shutil.disk_usage(folder).free
    if need > free:
        raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} are needed")


def make(folder: Path, options: argparse.Namespace) -> None:
    """Make the checkpoints in a process of its own, so that this one stays small."""
    names = ("checkpoints", "gigabytes", "dtype", "tensors", "container")
    values = [f"--{name}={getattr(options, name)}" for name in names]
    subprocess.run([sys.executable, HERE / "checkpoints.py", folder, *values], check=True)


def describe(paths: list[Path], options: argparse.Namespace) -> str:
    """The heading of the table."""
    size = paths[0].stat().st_size / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cache = "warm" if (len(paths) + 2) * size < memory else "too small a page cache to be warm"
    return (
        f"{len(paths)} checkpoints of {size:.2f} GB, {options.tensors} tensors, {options.dtype}, "
        f"{options.container} to {options.output_container or options.container}, {cache}, "
        f"{'not fsynced' if options.no_fsync else 'fsynced'}; {options.runs} runs"
    )


def averages(paths: list[Path], scratch: Path, options: argparse.Namespace) -> dict[str, list[Run]]:
    """Runs of each contender, which all write the same file."""
    output = scratch / f"output{SUFFIXES[options.output_container or options.container]}"
    files = [str(path) for path in paths]
    commands: dict[str, Command] = {
        "cat, cp": ["sh", "-c", copying(files, str(output), sync=not options.no_fsync)],
        "ckptavg average": [
            *(sys.executable, "-m", "ckptavg", "average", "--quiet"),
            *(str(paths[0].parent), "-o", str(output)),
            *(["--no-fsync"] if options.no_fsync else []),
        ],
        "torch loop": [
            *(sys.executable, str(HERE / "torch_loop.py"), *files, str(output)),
            *([] if options.no_fsync else ["--fsync"]),
        ],
    }
    if options.no_torch:
        del commands["torch loop"]
    environment = measure.environment(scratch)

    def contender(command: Command) -> Run:
        os.sync()
        measure.warm(paths)
        result = measure.run(command, environment)
        if output.stat().st_size < paths[0].stat().st_size * 0.99:
            raise SystemExit(f"{command[0]} did not write everything")
        output.unlink()
        return result

    contenders = {name: partial(contender, command) for name, command in commands.items()}
    return measure.interleaved(contenders, options.runs)


def copying(files: list[str], output: str, *, sync: bool) -> str:
    """Shell commands that read all of the inputs and write as much as one of them."""
    one, target = shlex.quote(files[0]), shlex.quote(output)
    line = f"cat {shlex.join(files)} > /dev/null && cp {one} {target}"
    return f"{line} && sync {target}" if sync else line


def start_ups(scratch: Path, options: argparse.Namespace) -> dict[str, list[Run]]:
    """Runs of what does nothing but start."""
    environment = measure.environment(scratch)
    contenders = {
        name: partial(measure.run, command, environment)
        for name, command in _START_UPS.items()
        if not (options.no_torch and "torch" in name)
    }
    return measure.interleaved(contenders, options.start_ups)


if __name__ == "__main__":
    main()
