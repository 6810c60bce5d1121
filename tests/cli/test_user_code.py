"""What the user's code raises, in every command that runs it: printable, bounded, and one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.helpers import outcome, process

pytestmark = pytest.mark.usefixtures("no_fsync")

USER = r"""
import warnings
import torch

RED = "\x1b[31m\u202ered\u2066\x9b"
RAISES = {}

class Mute(Exception):
    def __str__(self):
        raise SystemExit(3)

class Notes(Exception):
    __notes__ = 5

Odd = type("\x1b[31mOdd\u202e", (Exception,), {"__module__": "m\x1b[31m"})

def chain(count=3_000):
    error = None
    for number in range(count):
        error, error.__cause__ = ValueError(f"{number} {RED}"), error
    return error

ERRORS = {
    "escape codes": lambda: ValueError(RED),
    "10 MB": lambda: ValueError("x\x1b" * 5_000_000),
    "no text": ValueError,
    "no str()": Mute,
    "half a character": lambda: ValueError("a\ud800b"),
    "many lines": lambda: ValueError("line\r\x0b\u2028\n" * 100_000),
    "an odd class": lambda: Odd(RED),
    "odd notes": Notes,
    "a group": lambda: ExceptionGroup(RED, [ValueError(RED), Mute()]),
    "an end": lambda: SystemExit(RED),
    "an end without an error": lambda: SystemExit(0),
    "an end of a generator": lambda: GeneratorExit(RED),
    "no member": lambda: AttributeError(RED),
    "no file": lambda: FileNotFoundError(2, RED, RED),
}

def at(place):
    if place in RAISES:
        raise ERRORS[RAISES[place]]()

class Norm(torch.nn.BatchNorm1d):
    def forward(self, values):
        at("layer")
        return super().forward(values)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        at("model")
        self.norm = Norm(4)

    def forward(self, values):
        if "warning" in RAISES:
            warnings.warn(RED)
        return self.norm(values)

    def named_modules(self, *args, **keywords):
        at("names")
        return super().named_modules(*args, **keywords)

class Loader:
    def __iter__(self):
        at("loader")
        for _ in range(2):
            yield torch.randn(8, 4), torch.arange(8) % 4

    def __len__(self):
        at("length")
        return 2

loader = Loader()

def forward(model, batch):
    at("forward")
    return model(batch[0])

def metric(model, batches):
    at("metric")
    return sum(float(model(batch[0]).mean()) for batch in batches)

def of_batch(batch): pass
def of_nothing(): pass
"""
SPECS = ("--model", "user.py:Net", "--loader", "user.py:loader", "--forward", "user.py:forward")
OUT = ("-o", "out.pt", "--force")
COMMANDS = {
    "bn-refresh": ("bn-refresh", "1.pt", *OUT, "--keep-better", "--eval-loader", "user.py:loader"),
    "average": ("average", "1.pt", "2.pt", *OUT),
    "evaluate": ("evaluate", "1.pt", "2.pt", "--refresh-loader", "user.py:loader"),
    "soup": ("soup", "1.pt", "2.pt", *OUT, "--metric", "loss"),
    "sweep": ("sweep", "1.pt", "2.pt", "--refresh-loader", "user.py:loader", "--last", "1,2"),
    "rays": ("landscape", "rays", "1.pt", "-o", "out", "--directions", "1", "--distances", "0,1"),
    "segment": ("landscape", "segment", "1.pt", "2.pt", "-o", "out", "--positions", "0,1"),
    "plane": ("landscape", "plane", "1.pt", "2.pt", "3.pt", "-o", "out", "--size", "2"),
}
PLACES = ("model", "loader", "forward", "layer", "metric", "names", "length")
ERRORS = re.findall(r'^    "(.+?)": ', USER, re.MULTILINE)


@pytest.fixture
def user(user_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What the user's code raises by place, in a folder with checkpoints of its model."""
    import importlib

    (user_folder / "user.py").write_text(USER)
    module = importlib.import_module("user")
    for number in (1, 2, 3):
        net = module.Net()
        torch.nn.init.normal_(net.norm.weight)
        net(torch.randn(8, 4))
        torch.save(net.state_dict(), f"{number}.pt")
    return module


def said_by(command: str, place: str = "", *options: str) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    name, *inputs = COMMANDS[command]
    if place == "metric":
        options = ("--metric", "user.py:metric", *options)
        if name in ("bn-refresh", "soup", "sweep"):
            options = ("--mode", "max", *options)
    code, out, said = outcome(name, *inputs, *SPECS, *options, is_expected=False)
    assert all(line.isprintable() for line in [*out.split("\n"), *said.split("\n")])
    assert len(said) < 60_000
    return code, said


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (command, place)
        for command in COMMANDS
        for place in PLACES
        if command != "average" or place != "metric"
    ],
)
def test_what_it_raises_is_printable_and_ends_with_an_error(command, place, user):
    number = [*COMMANDS].index(command) + len(COMMANDS) * PLACES.index(place)
    for kind in (ERRORS[number % len(ERRORS)], "an end"):
        user.RAISES.clear()
        user.RAISES[place] = kind
        code, said = said_by(command, place)
        if place == "length" and code == 0:
            continue  # the command has no need of it
        assert code == 1, said
        assert "\nckptavg: error: " in f"\n{said}"


@pytest.mark.parametrize("place", ["loader", "names"])
@pytest.mark.parametrize("kind", ERRORS)
def test_of_every_kind(kind, place, user):
    user.RAISES[place] = kind
    code, said = said_by("bn-refresh")
    assert code == 1
    assert "\nckptavg: error: " in f"\n{said}"


def test_its_warnings_are_printable(user):
    Path("noisy.py").write_text("from user import *\nRAISES['warning'] = 'escape codes'\n")
    name, *inputs = COMMANDS["evaluate"]
    done = process(name, *inputs, *SPECS, "--model", "noisy.py:Net")
    assert done.returncode == 0
    assert "UserWarning: \\x1b[31m\\u202ered\\u2066\\x9b\n" in done.stderr


@pytest.mark.parametrize(
    ("option", "function", "message"),
    [
        ("--forward", "of_batch", "of_batch is called with model and batch, and takes batch"),
        ("--forward", "of_nothing", "of_nothing is called with model and batch, and takes nothing"),
        ("--metric", "of_batch", "of_batch is called with model and batches, and takes batch"),
        ("--forward", "RED", "user.py:RED is a str, not a function"),
        ("--metric", "RED", "user.py:RED is a str, not a function"),
    ],
)
@pytest.mark.parametrize("command", [each for each in COMMANDS if each != "average"])
def test_a_function_with_other_arguments_is_told_what_it_is_called_with(
    command, option, function, message, user
):
    code, said = said_by(command, option[2:], option, f"user.py:{function}")
    assert code == 1
    assert f"ckptavg: error: {message}" in said
    assert "Traceback" not in said


def test_wrong_usage_is_printable(user):
    code, _, said = outcome("average", "1.pt", "--\x1b[31m\u202ered")
    assert code == 2
    assert "No such option '--\\x1b[31m\\u202ered'" in said
