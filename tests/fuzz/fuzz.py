"""Fuzz the readers, led by coverage: `python tests/fuzz/fuzz.py [TARGET...] --seconds 20 --jobs 2`.

Wants atheris (`pip install 'ckptavg[fuzz]'`). Each target runs in a process of its own, from
`corpus/<target>/`, and ends with the first failure; the input that made it fail stays in
`failures/`. Put it into the corpus once that is mended: `tests/formats/test_fuzz_corpus.py`
replays it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CORPUS, FAILURES = HERE / "corpus", HERE / "failures"
_LONGEST = {
    "safetensors": 4096,
    "zip": 8192,
    "pickle": 4096,
    "legacy": 8192,
    "dcp": 16384,
    "shards": 8192,
    "ranks": 16384,
    "zero": 8192,
}
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
_RUNS = re.compile(r"stat::number_of_executed_units: *(\d+)")
_BESIDE = 200  # MB of the fuzzer's own
_KEPT = 12_000  # characters of a failure's report


def main() -> int:
    """Fuzz each target, and say what came of it; 1 if one failed."""
    targets = sorted(path.name for path in CORPUS.iterdir())
    parser = argparse.ArgumentParser(description="Fuzz the readers of checkpoints.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(targets)}")
    parser.add_argument("--seconds", type=int, default=20, help="for each (default 20)")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time (default 1)")
    parser.add_argument("--keep", type=Path, help="folder for all inputs that covered more")
    asked = parser.parse_args()
    if not set(asked.targets) <= set(targets):
        parser.error(f"the targets are {', '.join(targets)}")
    print(f"{'target':12} {'runs':>10} {'seconds':>8} {'runs/s':>7} {'coverage':>8} {'corpus':>7}")
    with ThreadPoolExecutor(asked.jobs) as pool:
        wanted = asked.targets or targets
        passed = pool.map(lambda name: _run(name, asked.seconds, asked.keep), wanted)
        return 0 if all([*passed]) else 1


def _run(name: str, seconds: int, keep: Path | None) -> bool:
    """Fuzz one target in a process of its own; whether nothing failed."""
    FAILURES.mkdir(exist_ok=True)
    before = {*FAILURES.iterdir()}
    with _folder() as scratch:
        found = (keep or scratch) / f"{name}.found"
        found.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "tests.fuzz.fuzz", "--child", name),
            *(f"-max_total_time={seconds}", f"-max_len={_LONGEST.get(name, 4096)}"),
            *("-timeout=5", "-print_final_stats=1", "-reload=0", "-close_fd_mask=0"),
            *(f"-artifact_prefix={FAILURES}/{name}-", str(found), str(CORPUS / name)),
        ]
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(scratch), "PYTHONWARNINGS": "error"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    _report(name, seconds, ended.stdout)
    failures = [path for path in FAILURES.iterdir() if path not in before]
    own = [path for path in failures if path.name.startswith(f"{name}-")]
    if ended.returncode or own:
        print(ended.stdout[-_KEPT:])
        print(f"{name}: FAILED, with what is in {', '.join(map(str, own)) or 'no file'}")
    return not (ended.returncode or own)


def _report(name: str, seconds: int, output: str) -> None:
    coverage = [*_COVERAGE.finditer(output)]
    runs = _RUNS.search(output)
    done = int(runs[1]) if runs else 0
    covered, corpus = (coverage[-1][1], coverage[-1][3]) if coverage else ("?", "?")
    print(
        f"{name:12} {done:10} {seconds:8} {done // seconds:7} {covered:>8} {corpus:>7}", flush=True
    )


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder in memory where there is one, as each input is written to a file."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own in it
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def _fuzz(name: str, *arguments: str) -> int:
    """The child: never returns, as libFuzzer ends the process."""
    import atheris

    atheris.enabled_hooks.add("str")
    with atheris.instrument_imports(include=["ckptavg", "json", "pickle", "zipfile"]):
        from tests.fuzz import mutators, targets, words

    folder = Path(tempfile.mkdtemp())
    dictionary = folder / "words"
    dictionary.write_text("".join(f'"{_quoted(word)}"\n' for word in words.WORDS[name]))
    room = (targets._peak() >> 20) + (targets.MEMORY >> 20) + _BESIDE
    mutator = mutators.MUTATORS[name]

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        return mutator(data, most, random.Random(seed), atheris.Mutate)[:most]  # noqa: S311

    def one(data: bytes) -> None:
        targets.run(name, data, folder)

    flags = [f"-dict={dictionary}", f"-rss_limit_mb={room}"]
    atheris.Setup([sys.argv[0], *flags, *arguments], one, custom_mutator=mutated)
    atheris.Fuzz()
    return 0


def _quoted(word: bytes) -> str:
    """As a dictionary of libFuzzer spells bytes."""
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    sys.exit(_fuzz(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
