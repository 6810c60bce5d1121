"""Time `ckptavg average` of objects on an S3 server that answers late, by requests in flight.

The server is moto, in a process of its own, on this machine; it sleeps before each answer. The
package's `layouts` extra has it. Beside: `aws s3 cp` and an average of the copies, and fsspec's
`cat_ranges` of all bytes, which averages nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.benchmarks import measure
    from tests.benchmarks.measure import Run
else:
    import measure  # a script finds what is beside it, and knows of no package

HERE = Path(__file__).resolve().parent
_FOLDER = "s3://runs/run"
_CAT_RANGES = f"""
import s3fs
files = s3fs.S3FileSystem()
places = [
    (file["name"], start, min(start + (4 << 20), file["size"]))
    for file in files.ls("{_FOLDER}", detail=True)
    for start in range(0, file["size"], 4 << 20)
]
files.cat_ranges(*map(list, zip(*places)))
"""


def main() -> None:
    """Start the server, fill it, time the contenders."""
    options = arguments()
    if options.serve:
        serve(*options.serve)
        return
    with tempfile.TemporaryDirectory(prefix="ckptavg-benchmark-") as name:
        scratch = Path(name)
        inputs = scratch / "run"
        inputs.mkdir()
        sizes = [f"--checkpoints={options.checkpoints}", f"--gigabytes={options.megabytes / 1e3}"]
        subprocess.run([sys.executable, HERE / "checkpoints.py", inputs, *sizes], check=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = ["--serve", str(port), str(options.latency)]
        server = subprocess.Popen([sys.executable, __file__, *given], stderr=subprocess.DEVNULL)
        try:
            environment = measure.environment(scratch) | of_server(port)
            fill(inputs, port, environment)
            print(measure.machine())
            print(
                f"{options.checkpoints} x {options.megabytes} MB float32, "
                f"{options.latency * 1e3:.0f} ms before each answer; {options.runs} runs"
            )
            results = measure.interleaved(contenders(scratch, environment, options), options.runs)
            print(measure.table(results, {"/ 8 threads": "ckptavg, 8 threads"}))
        finally:
            server.kill()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--megabytes", type=float, default=32, help="of each checkpoint")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--aws", help="the command of the AWS client; left out without it")
    parser.add_argument("--serve", nargs=2, type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def serve(port: float, latency: float) -> None:
    """Run the server."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    server = DomainDispatcherApplication(create_backend_app)

    def late(environ: dict[str, Any], start: Any) -> Any:
        time.sleep(latency)
        return server(environ, start)

    run_simple("127.0.0.1", int(port), late, threaded=True)


def of_server(port: int) -> dict[str, str]:
    """What AWS' clients find it by."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def fill(folder: Path, port: int, environment: dict[str, str]) -> None:
    """Wait for the server, and upload the checkpoints."""
    for _ in range(200):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    upload = (
        "import boto3, pathlib, sys\ns3 = boto3.client('s3')\ns3.create_bucket(Bucket='runs')\n"
    )
    upload += "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
    upload += "    s3.upload_file(str(path), 'runs', 'run/' + path.name)\n"
    subprocess.run([sys.executable, "-c", upload, folder], check=True, env=environment)


def contenders(
    scratch: Path, environment: dict[str, str], options: argparse.Namespace
) -> dict[str, Callable[[], Run]]:
    """The commands by name."""
    output, copies = scratch / "o.safetensors", scratch / "copies"
    python = shlex.quote(sys.executable)
    average = f"{python} -m ckptavg average --quiet --no-fsync -o {output}"
    commands = {
        f"ckptavg, {threads} thread{'' if threads == 1 else 's'}": (
            f"exec {average} {_FOLDER} --threads {threads}"
        )
        for threads in (1, 4, 8, 16)
    }
    commands["s3fs cat_ranges, no average"] = f"exec {python} -c {shlex.quote(_CAT_RANGES)}"
    if options.aws:
        copy = f"{options.aws} s3 cp --quiet --recursive {_FOLDER} {copies}"
        commands["aws s3 cp, then average"] = f"{copy} && {average} {copies}"

    def contender(command: str) -> Run:
        result = measure.run(["sh", "-c", command], environment)
        output.unlink(missing_ok=True)
        shutil.rmtree(copies, ignore_errors=True)
        os.sync()
        return result

    return {name: partial(contender, command) for name, command in commands.items()}


if __name__ == "__main__":
    main()
