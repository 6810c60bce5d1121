"""Run processes, and say what they took. The standard library only.

The kernel counts what a process held before `exec` in its peak memory: whoever starts the measured
ones must be small itself, so neither numpy nor torch may be imported here.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

Command = Sequence[str]
_PIECE = 1 << 20


@dataclass(frozen=True)
class Run:
    """What one process took.

    Attributes:
        seconds: wall time, from before the start until it was gone.
        cpu: seconds of all processors, user and system.
        peak: bytes of resident memory at the peak; of a shell, its largest child's.
        output: what it wrote on stdout.
    """

    seconds: float
    cpu: float
    peak: int
    output: str


def run(command: Command, environment: Mapping[str, str]) -> Run:
    """Run a command.

    Raises:
        SystemExit: it failed.
    """
    begin = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, output)


def interleaved(contenders: Mapping[str, Callable[[], Run]], runs: int) -> dict[str, list[Run]]:
    """Run the contenders in turn, A B C A B C, so that a slow minute strikes all of them.

    A round before those does not count: it compiles what is imported, and fetches libraries.
    """
    results: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(runs + 1):
        for name, contender in contenders.items():
            if sys.stderr.isatty():
                print(f"\r\033[K{number}/{runs} {name}", end="\r", file=sys.stderr, flush=True)
            result = contender()
            if number:
                results[name].append(result)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return results


def ratio(results: Mapping[str, Sequence[Run]], name: str, baseline: str) -> float:
    """Median of the rounds' ratios of wall time."""
    pairs = zip(results[name], results[baseline], strict=True)
    return statistics.median(one.seconds / other.seconds for one, other in pairs)


def table(results: Mapping[str, Sequence[Run]], baselines: Mapping[str, str]) -> str:
    """Median, range and processor seconds, the highest peak, and ratios to some of them.

    Args:
        results: runs by contender.
        baselines: heading of a column of ratios to the contender that it relates to.
    """
    heads = "".join(f"  {head:>12}" for head in baselines)
    lines = [f"{'':32}{'median s':>10}{'min-max s':>16}{'cpu s':>9}{'peak MB':>9}{heads}"]
    for name, runs in results.items():
        seconds = [one.seconds for one in runs]
        span = f"{min(seconds):.2f}-{max(seconds):.2f}"
        cpu = statistics.median(one.cpu for one in runs)
        peak = max(one.peak for one in runs) / 1e6
        ratios = "".join(f"  {ratio(results, name, other):>12.2f}" for other in baselines.values())
        lines.append(
            f"{name:32}{statistics.median(seconds):>10.3f}{span:>16}{cpu:>9.2f}{peak:>9.0f}{ratios}"
        )
    return "\n".join(lines)


def warm(paths: Sequence[Path]) -> None:
    """Read files, so that the page cache has them; it may forget them within minutes."""
    buffer = bytearray(_PIECE)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def evict(paths: Sequence[Path]) -> None:
    """Have the page cache forget files, which must be on the disk already. Linux."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def environment(scratch: Path) -> dict[str, str]:
    """Ours for the measured processes, with a place for the byte code of what they import.

    An installed package has its byte code; a working tree must not wait for the compiler.
    """
    own = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return own | {"PYTHONPYCACHEPREFIX": str(scratch / "pycache")}


def machine() -> str:
    """What this is running on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    packages = ", ".join(f"{name} {_version(name)}" for name in ("numpy", "ml_dtypes", "torch"))
    return (
        f"{_processor()}, {os.cpu_count()} processors, {memory:.0f} GB; {platform.platform()}; "
        f"Python {platform.python_version()}, {packages}; load {os.getloadavg()[0]:.2f}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    return " ".join(facts.get(key, "").strip() for key in ("model name", "model")).strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
