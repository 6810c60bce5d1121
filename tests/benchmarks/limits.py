"""How near `ckptavg average` comes to what the machine can read and write: a table with bars.

Whole processes, from interleaved runs. Each row makes its own inputs and takes them away again.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.benchmarks import measure
    from tests.benchmarks.measure import Run
else:
    import measure  # a script finds what is beside it, and knows of no package

HERE = Path(__file__).resolve().parent
AVERAGE = f"exec {shlex.quote(sys.executable)} -m ckptavg average --quiet"
Results = Mapping[str, list["Run"]]


class Bench:
    """Makes inputs, times commands on them, and holds the figures against the bars."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.runs, self.scale, self.scratch = options.runs, options.scale, scratch
        self.lines: list[str] = []

    def checkpoints(
        self,
        count: int,
        gigabytes: float,
        *,
        dtype: str = "float32",
        tensors: int = 300,
        extra: tuple[str, ...] = (),
    ) -> Path:
        """A folder of them."""
        folder = self.scratch / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        values = {
            "checkpoints": count,
            "gigabytes": gigabytes * self.scale,
            "dtype": dtype,
            "tensors": tensors,
        }
        words = [f"--{name}={value}" for name, value in values.items()]
        subprocess.run(
            [sys.executable, HERE / "checkpoints.py", folder, *words, *extra], check=True
        )
        return folder

    def time(
        self,
        folder: Path,
        commands: Mapping[str, str],
        *,
        cold: bool = False,
        runs: int | None = None,
    ) -> Results:
        """Run shell commands in turn; `{o}` stands for the output, which goes away in between."""
        environment = measure.environment(self.scratch)
        output = self.scratch / "output"
        files = sorted(path for path in folder.rglob("*") if path.is_file())

        def contender(command: str) -> Run:
            subprocess.run(["sync"], check=True)
            (measure.evict if cold else measure.warm)(files)
            output.mkdir()
            words = ["sh", "-c", command.replace("{o}", shlex.quote(str(output / "o.safetensors")))]
            result = measure.run(words, environment)
            shutil.rmtree(output)
            return result

        contenders: dict[str, Callable[[], Run]] = {
            name: partial(contender, command) for name, command in commands.items()
        }
        return measure.interleaved(contenders, runs or self.runs)

    def heading(self, text: str, results: Results) -> None:
        """What was timed."""
        print(f"\n{text}\n{measure.table(results, {})}", flush=True)

    def hold(self, what: str, value: float, bar: float, *, least: bool = False) -> None:
        """A figure beside its bar."""
        met = value >= bar if least else value <= bar
        word = "at least" if least else "at most"
        line = f"{what:74}{value:>8.2f}  {word} {bar:g}{'' if met else '  MISSED'}"
        self.lines.append(line)
        print(line, flush=True)

    def memory(self, what: str, runs: list[Run], bar: float = 64) -> None:
        """The highest peak, in MB."""
        self.hold(f"{what}: peak memory, MB", max(run.peak for run in runs) / 1e6, bar)


def ratio(results: Results, name: str, *parts: tuple[float, str]) -> float:
    """Median over the rounds of one's seconds by a sum of others'."""
    return statistics.median(
        run.seconds / sum(factor * results[other][number].seconds for factor, other in parts)
        for number, run in enumerate(results[name])
    )


def copying(folder: Path) -> str:
    """Read all of the inputs, and write as much as one of them."""
    files = sorted(map(str, folder.iterdir()))
    return f"cat {shlex.join(files)} > /dev/null && cp {shlex.quote(files[0])} {{o}}"


def average(folder: Path, *options: str) -> str:
    """The command."""
    return f"{AVERAGE} {shlex.quote(str(folder))} -o {{o}} {shlex.join(options)}"


def fp32(bench: Bench) -> None:
    """Large files in float32."""
    folder = bench.checkpoints(6, 1.3)
    found = bench.time(
        folder,
        {
            "cat, cp, sync": f"{copying(folder)} && sync {{o}}",
            "average": average(folder),
            "cat, cp": copying(folder),
            "average --no-fsync": average(folder, "--no-fsync"),
        },
    )
    bench.heading("6 x 1.3 GB float32", found)
    bench.hold(
        "float32, on the disk: x (cat, cp, sync)",
        ratio(found, "average", (1, "cat, cp, sync")),
        0.80,
    )
    bench.hold(
        "float32, --no-fsync: x (cat, cp)", ratio(found, "average --no-fsync", (1, "cat, cp")), 1.05
    )
    bench.memory("float32", found["average"])


def narrow(bench: Bench) -> None:
    """Large files in 16 and 8 bits, with one core and with two."""
    for dtype, bar in (("bfloat16", 1.8), ("float16", 1.8), ("float8_e4m3fn", 2.0)):
        folder = bench.checkpoints(6, 1.3, dtype=dtype)
        command = average(folder, "--no-fsync")
        found = bench.time(
            folder,
            {
                "cat, cp": copying(folder),
                "one core": command.replace("exec ", "exec taskset -c 0 "),
                "all cores": command,
            },
            runs=max(1, bench.runs - 2),
        )
        bench.heading(f"6 x 1.3 GB {dtype}, --no-fsync", found)
        bench.hold(
            f"{dtype}, --no-fsync: x (cat, cp)", ratio(found, "all cores", (1, "cat, cp")), bar
        )
        bench.hold(
            f"{dtype}: two cores x one core", ratio(found, "all cores", (1, "one core")), 0.65
        )
        bench.memory(dtype, found["all cores"])


def resnets(bench: Bench) -> None:
    """Small files, where starting counts."""
    folder = bench.checkpoints(10, 0.1, tensors=320)
    found = bench.time(
        folder,
        {
            "import torch": f"exec {shlex.quote(sys.executable)} -c 'import torch'",
            "cat, cp": copying(folder),
            "average --no-fsync": average(folder, "--no-fsync"),
        },
    )
    bench.heading("10 x 0.1 GB float32 of 320 tensors", found)
    value = ratio(found, "average --no-fsync", (0.5, "import torch"), (1, "cat, cp"))
    bench.hold("ten of a ResNet-50: x (0.5 import torch + cat, cp)", value, 1.0)
    bench.memory("ten of a ResNet-50", found["average --no-fsync"])


def counts(bench: Bench) -> None:
    """Very many checkpoints, and few descriptors."""
    folder = bench.checkpoints(200, 0.05, tensors=100)
    files = sorted(folder.iterdir(), key=lambda path: int(path.stem.split("_")[1]))
    commands = {}
    for count in (50, 100, 200):
        part = bench.scratch / f"first{count}"
        part.mkdir()
        for path in files[:count]:
            (part / path.name).hardlink_to(path)
        commands[str(count)] = f"ulimit -n 128; {average(part, '--no-fsync')}"
    found = bench.time(folder, commands)
    bench.heading("50, 100, 200 x 50 MB float32, ulimit -n 128", found)
    t50, t100, t200 = (statistics.median(run.seconds for run in found[name]) for name in commands)
    # Seconds for each further checkpoint: of the second fifty, and of the second hundred.
    apart = (t200 - t100) / 100 / ((t100 - t50) / 50)
    bench.hold("200 checkpoints: a later one's time x an earlier one's", apart, 1.1)
    more = (max(run.peak for run in found["200"]) - max(run.peak for run in found["50"])) / 1e6
    bench.hold("200 checkpoints: MB of memory more than for 50", more, 2)
    bench.memory("200 checkpoints", found["200"])
    for count in (50, 100, 200):
        shutil.rmtree(bench.scratch / f"first{count}")


def cold(bench: Bench) -> None:
    """Nothing in the page cache."""
    folder = bench.checkpoints(6, 1.3)
    files = shlex.join(sorted(map(str, folder.iterdir())))
    found = bench.time(
        folder,
        {
            "cat": f"cat {files} > /dev/null",
            "average --no-fsync": average(folder, "--no-fsync"),
            "average": average(folder),
        },
        cold=True, runs=max(1, bench.runs - 2),
    )  # fmt: skip
    bench.heading("6 x 1.3 GB float32, cold", found)
    bench.hold(
        "cold, reading and writing: x cat alone",
        ratio(found, "average --no-fsync", (1, "cat")),
        1.0,
    )
    bench.hold("cold, on the disk as well: x cat alone", ratio(found, "average", (1, "cat")), 1.5)
    bench.memory("cold", found["average"])


def adam(bench: Bench) -> None:
    """Training checkpoints whose optimizer state is twice the weights."""
    folder = bench.checkpoints(6, 0.4, extra=("--container=torch", "--adam"))
    files = shlex.join(sorted(map(str, folder.iterdir())))
    load = "import sys, torch\nfor path in sys.argv[1:]: torch.load(path)"
    commands = {
        "cat": f"cat {files} > /dev/null",
        "torch.load": f"exec {shlex.quote(sys.executable)} -c {shlex.quote(load)} {files}",
        "average --no-fsync": average(folder, "--no-fsync"),
    }
    for state in ("cold", "warm"):
        found = bench.time(folder, commands, cold=state == "cold", runs=max(1, bench.runs - 2))
        bench.heading(f"6 x 1.2 GB .pt with Adam state, {state}", found)
        # In the page cache, `cat` costs less than the rest of the work.
        for other in ("cat", "torch.load") if state == "cold" else ("torch.load",):
            value = 1 / ratio(found, "average --no-fsync", (1, other))
            what = f".pt with Adam state, {state}: times as fast as {other} of the files"
            bench.hold(what, value, 2.5, least=True)
        bench.memory(f".pt with Adam state, {state}", found["average --no-fsync"])


def peers(bench: Bench) -> None:
    """The ways of others, and a progress bar."""
    python = f"exec {shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'peers.py'))}"
    for ways, extra in ((("fairseq",), ("--container=torch",)), (("timm", "mergekit"), ())):
        folder = bench.checkpoints(6, 1.3, extra=extra)
        files = shlex.join(sorted(map(str, folder.iterdir())))
        commands = {way: f"{python} {way} {files} {{o}}" for way in ways}
        commands["average"] = average(folder, "--no-fsync")
        found = bench.time(folder, commands, runs=max(1, bench.runs - 2))
        bench.heading(f"6 x 1.3 GB float32, {' '.join(extra)} the ways of others", found)
        for way in ways:
            value = 1 / ratio(found, "average", (1, way))
            bench.hold(f"times as fast as {way}'s way", value, 8, least=True)
    command = average(folder, "--no-fsync").replace(" --quiet", "")
    terminal = shlex.quote(command)
    found = bench.time(
        folder,
        {
            "no terminal": f"script -qec {shlex.quote(command + ' 2> /dev/null')} /dev/null",
            "a bar": f"script -qec {terminal} /dev/null",
        },
    )
    bench.heading("a progress bar", found)
    bench.hold("with a progress bar: x without", ratio(found, "a bar", (1, "no terminal")), 1.01)


ROWS = {row.__name__: row for row in (fp32, narrow, resnets, counts, cold, adam, peers)}


def main() -> None:
    """Time the rows, and print all figures with their bars at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="default: all of them")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the inputs' sizes")
    parser.add_argument("--folder", type=Path, help="where the files go, on the disk in question")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=options.folder, prefix="ckptavg-benchmark-"))
    try:
        bench = Bench(options, scratch)
        print(measure.machine())
        for name in options.rows or ROWS:
            ROWS[name](bench)
    finally:
        shutil.rmtree(scratch)
    print("\n" + "\n".join(bench.lines))


if __name__ == "__main__":
    main()
