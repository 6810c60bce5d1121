"""Time the pass of `ckptavg bn-refresh` beside `update_bn` and a bare eval forward.

The same batches for each, in memory, in processes of their own; from interleaved runs. The wall
time is that of the pass alone, after one batch that does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.benchmarks import measure
    from tests.benchmarks.measure import Run
else:
    import measure  # a script finds what is beside it, and knows of no package

HERE = Path(__file__).resolve().parent
# Names of both are those of models.py and refresh_pass.py, which import torch; this must not.
_MODELS = {"resnet18": 64, "resnet18_small": 16, "mobilenet": 64, "resnet3d": 16}
_CONTENDERS = (
    "update_bn",
    "refresh_norm",
    "refresh_norm, weights too",
    "refresh_norm, exact",
    "refresh_norm, contiguous",
    "eval forward",
    "eval forward, channels_last",
    "norm training, channels_last",
)


def main() -> None:
    """Time each model."""
    options = arguments()
    print(measure.machine())
    with tempfile.TemporaryDirectory() as scratch:
        environment = measure.environment(Path(scratch))
        for model in options.models:
            size = options.batch_size or _MODELS[model]
            given = [f"--model={model}", f"--batches={options.batches}", f"--batch-size={size}"]
            print(f"\n{model}: {options.batches} batches of {size}; {options.runs} runs")
            contenders = {
                name: partial(one_pass, [name, *given], environment) for name in _CONTENDERS
            }
            results = measure.interleaved(contenders, options.runs)
            baselines = {"/ update_bn": "update_bn", "/ eval c.last": _CONTENDERS[-2]}
            print(measure.table(results, baselines))
            found = json.loads(one_run(["differences", *given], environment).output)
            print("largest difference from update_bn, in running standard deviations: ", end="")
            print(", ".join(f"{name} {value:.1e}" for name, value in found.items()))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=_MODELS, default=list(_MODELS))
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--batch-size", type=int, help=f"default: {_MODELS}")
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


def one_pass(given: list[str], environment: dict[str, str]) -> Run:
    """A contender's pass: the peak of its process, and the wall time of the pass in it."""
    whole = one_run(given, environment)
    return dataclasses.replace(whole, seconds=float(json.loads(whole.output)))


def one_run(given: list[str], environment: dict[str, str]) -> Run:
    """A process of refresh_pass.py."""
    return measure.run([sys.executable, str(HERE / "refresh_pass.py"), *given], environment)


if __name__ == "__main__":
    main()
