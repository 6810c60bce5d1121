"""Time the pass of `ckptavg bn-refresh` beside `update_bn` and a bare eval forward.

The same batches for each, in memory, in processes of their own; from interleaved runs. The wall
time is that of the pass alone, after one batch that does not count. `--ranks` times a pass that two
processes share, and `--tol` says how near a pass comes that ends by a tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.benchmarks import measure
    from tests.benchmarks.measure import Run
else:
    import measure  # a script finds what is beside it, and knows of no package

HERE = Path(__file__).resolve().parent
# Of torchvision, with the shape of a batch.
_MODELS = {
    "resnet18": (32, 3, 224, 224),
    "resnet50": (16, 3, 224, 224),
    "mobilenet_v3_large": (32, 3, 224, 224),
    "densenet121": (16, 3, 224, 224),
    "r3d_18": (4, 3, 8, 112, 112),
}
# Names are those of refresh_pass.py, which imports torch; this must not.
_OURS, _TORCH, _FORWARD = "refresh_norm", "update_bn", "eval forward, channels_last"
_BARS = (_TORCH, _OURS, _FORWARD)
_ALL = (
    *_BARS,
    "refresh_norm, weights too",
    "refresh_norm, exact",
    "refresh_norm, contiguous",
    "refresh_norm, bf16",
    "eval forward",
    "norm training, channels_last",
)
# Those that are to find update_bn's statistics: `exact` has others, by definition.
_COMPARED = (_OURS, "refresh_norm, contiguous", "refresh_norm, bf16")
_TINY = 1e-12  # in the geometric mean of differences, for none


@dataclass(frozen=True)
class Outcome:
    """What counts of a model's runs.

    Attributes:
        speed_up: how many times as fast as `update_bn` the refresh is.
        to_forward: its time, in that of the eval forward.
        difference: of the statistics, the largest; in running standard deviations.
    """

    speed_up: float
    to_forward: float
    difference: float


def main() -> None:
    """Time each model, or do another part."""
    options = arguments()
    if options.tol:
        print(measure.machine())
        print_tolerances(options.runs)
        return
    print(f"{measure.machine()}; torchvision {torchvision()}")
    with tempfile.TemporaryDirectory() as scratch:
        environment = measure.environment(Path(scratch))
        if options.ranks:
            for model in options.models or ("resnet18",):
                time_ranks(model, options, environment)
            return
        outcomes = {
            model: time_model(model, options, environment) for model in options.models or _MODELS
        }
        print(f"\n{summary(outcomes)}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--all", action="store_true", help="contenders that have no bar, too")
    part.add_argument("--ranks", action="store_true", help="two processes against one, instead")
    part.add_argument("--tol", action="store_true", help="passes that end early, instead")
    parser.add_argument(
        "--models", nargs="+", choices=_MODELS, help="default: all, and resnet18 for --ranks"
    )
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, help="default: depends on the model")
    parser.add_argument("--image-size", type=int, help="default: depends on the model")
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


def torchvision() -> str:
    """Its version.

    Raises:
        SystemExit: it is missing.
    """
    try:
        return version("torchvision")
    except PackageNotFoundError:
        raise SystemExit(
            "torchvision, which has the models, is missing: pip install torchvision"
        ) from None


def time_model(model: str, options: argparse.Namespace, environment: Mapping[str, str]) -> Outcome:
    """Have the contenders take turns, and print what they took."""
    given = work(model, options)
    contenders = {
        name: partial(one_pass, [name, *given], environment)
        for name in (_ALL if options.all else _BARS)
    }
    results = measure.interleaved(contenders, options.runs)
    print(measure.table(results, {"/ update_bn": _TORCH, "/ eval c.last": _FORWARD}), flush=True)
    found = {
        name: float(json.loads(one_run([name, "--difference", *given], environment).output))
        for name in contenders
        if name in _COMPARED
    }
    print("largest difference from update_bn, in running standard deviations: ", end="")
    print(", ".join(f"{name} {value:.1e}" for name, value in found.items()), flush=True)
    return Outcome(
        measure.ratio(results, _TORCH, _OURS),
        measure.ratio(results, _OURS, _FORWARD),
        found[_OURS],
    )


def work(model: str, options: argparse.Namespace) -> list[str]:
    """What each process is told of model and batches; prints it, too."""
    size, *channels, height, width = _MODELS[model]
    size = options.batch_size or size
    sides = [options.image_size] * 2 if options.image_size else [height, width]
    image = [str(number) for number in (*channels, *sides)]
    print(f"\n{model}: {options.batches} batches of {size} x {'x'.join(image)}; ", end="")
    print(f"{options.runs} runs", flush=True)
    return [f"--model={model}", f"--batches={options.batches}", "--shape", str(size), *image]


def one_pass(given: Sequence[str], environment: Mapping[str, str]) -> Run:
    """A contender's pass: the peak of its process, and the wall time of the pass in it."""
    whole = one_run(given, environment)
    return dataclasses.replace(whole, seconds=float(json.loads(whole.output)))


def one_run(given: Sequence[str], environment: Mapping[str, str]) -> Run:
    """A process of refresh_pass.py."""
    return measure.run([sys.executable, str(HERE / "refresh_pass.py"), *given], environment)


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """What has a bar, by model and over all of them."""
    lines = [f"{'':24}{'update_bn / ours':>20}{'ours / eval c.last':>20}{'difference':>14}"]
    lines += [
        f"{name:24}{one.speed_up:>20.2f}{one.to_forward:>20.2f}{one.difference:>14.1e}"
        for name, one in outcomes.items()
    ]
    speed_up = statistics.geometric_mean(one.speed_up for one in outcomes.values())
    to_forward = statistics.geometric_mean(one.to_forward for one in outcomes.values())
    differences = [max(one.difference, _TINY) for one in outcomes.values()]
    lines.append(
        f"geometric means: {speed_up:.3f} times as fast as update_bn (bar: >= 1.3); "
        f"{to_forward:.3f} of the eval forward (bar: <= 1.10); "
        f"difference {statistics.geometric_mean(differences):.1e}, "
        f"at most {max(differences):.1e} (bar: <= 1e-3)"
    )
    return "\n".join(lines)


def time_ranks(model: str, options: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """A pass of one process with one thread, beside that of two that share it."""
    given = ["shared", *work(model, options)]
    one, two = "one process, one thread", "two processes, one thread each"
    contenders = {
        one: partial(shared_pass, given, environment, 1),
        two: partial(shared_pass, given, environment, 2),
    }
    results = measure.interleaved(contenders, options.runs)
    print(measure.table(results, {"/ one": one}))
    print(f"two processes take {measure.ratio(results, two, one):.3f} of one's time ", end="")
    print("(bar: <= 0.6)", flush=True)


def shared_pass(given: Sequence[str], environment: Mapping[str, str], size: int) -> Run:
    """The pass by so many processes: the first one's time, and what they take together."""
    together = {
        **environment,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": "1",
    }
    with ThreadPoolExecutor(size) as pool:
        each = [
            pool.submit(one_pass, given, {**together, "RANK": str(rank)}) for rank in range(size)
        ]
        runs = [one.result() for one in each]
    cpu, peak = sum(one.cpu for one in runs), sum(one.peak for one in runs)
    return dataclasses.replace(runs[0], cpu=cpu, peak=peak)


def free_port() -> int:
    """One that nobody listens on, now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def print_tolerances(runs: int) -> None:
    """In this process, whose memory does not count here."""
    if TYPE_CHECKING:
        from tests.benchmarks import refresh_pass
    else:
        import refresh_pass
    print(refresh_pass.tolerances(runs))


if __name__ == "__main__":
    main()
