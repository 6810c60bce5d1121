"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg import cli
from ckptavg.cli.console import plural, size
from ckptavg.cli.options import DTYPES
from ckptavg.formats import unpickler
from tests.helpers import outcome, process, run
from tests.oracle import random_state_dicts, save_run

STALE = (
    "The BatchNorm statistics are stale: no data have passed through these weights. Refresh them:"
)


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    states = random_state_dicts(3)
    for state in states:
        state["bn.running_mean"] = torch.randn(4)
    save_run(tmp_path / "ckpts", states)
    return tmp_path / "ckpts"


class TestAverage:
    def test_says_what_it_did_and_what_comes_next(self, ckpts, tmp_path):
        out = tmp_path / "my swa.safetensors"
        result = run("average", ckpts, "-o", out)
        assert result.stderr == ""
        assert result.stdout.splitlines() == [
            "averaged 3 checkpoints: step_0.safetensors to step_2.safetensors",
            "  9 tensors: 7 averaged, 1 the same in all, 1 copied from the last checkpoint",
            f"  wrote {out} ({size(out.stat().st_size)})",
            STALE,
            f"  ckptavg bn-refresh '{out}' --model FILE.py:MODEL --loader FILE.py:LOADER",
        ]

    def test_json_is_all_there_is_on_stdout(self, ckpts, tmp_path):
        os.link(ckpts / "step_2.safetensors", ckpts / "last.safetensors")
        result = run("average", ckpts, "-o", tmp_path / "o.safetensors", "--json")
        document = json.loads(result.stdout)
        assert [source["name"] for source in document["sources"]] == [
            f"step_{step}.safetensors" for step in range(3)
        ]
        assert document["written"] is True
        assert document["bytes_written"] == (tmp_path / "o.safetensors").stat().st_size
        assert len(document["notices"]) == 1
        assert "counted once" in document["notices"][0]
        assert "counted once" in result.stderr

    def test_quiet_says_nothing(self, ckpts, tmp_path):
        os.link(ckpts / "step_2.safetensors", ckpts / "last.safetensors")
        result = run("average", ckpts, "-o", tmp_path / "o.safetensors", "-q")
        assert result.output == ""

    def test_quiet_does_not_hide_warnings(self, ckpts, tmp_path):
        result = run("average", ckpts / "step_1.safetensors", "-o", tmp_path / "o.pt", "-q")
        assert result.stderr.startswith("ckptavg: warning: only one checkpoint")

    def test_dry_run_lists_the_files_in_order(self, ckpts, tmp_path):
        result = run("average", ckpts, "-o", tmp_path / "o.safetensors", "--dry-run")
        lines = result.stdout.splitlines()
        assert [line.split()[0] for line in lines[:3]] == [
            f"step_{step}.safetensors" for step in range(3)
        ]
        assert "would average 3 checkpoints" in lines[3]
        assert "would read 3.6 MB, write 1.2 MB" in lines[5]
        assert "of memory" in lines[5]
        assert not (tmp_path / "o.safetensors").exists()

    def test_takes_every_option(self, ckpts, tmp_path):
        out = tmp_path / "o.safetensors"
        run(
            *("average", ckpts, "-o", out, "--dtype", "bfloat16", "--ints", "last"),
            *("--norm-stats", "last", "--allow-nonfinite", "--expect", 3, "--no-fsync"),
            *("--keep-prefix", "--drop-aliases", "-j", 1, "--force"),
        )
        assert load_file(out)["scalar"].dtype == torch.bfloat16

    def test_the_dtypes_offered_are_those_known(self):
        from ckptavg.formats.tensors import BY_NAME
        from ckptavg.options import SHORT_DTYPES

        assert all(BY_NAME[SHORT_DTYPES.get(name, name)].kind == "float" for name in DTYPES)


def test_messages_of_the_library_speak_of_options_here(tmp_path):
    save_run(tmp_path / "ckpts", random_state_dicts(2))
    words = ["average", str(tmp_path / "ckpts"), "-o", str(tmp_path / "o.safetensors")]
    assert outcome(*words)[0] == 0
    code, _, said = outcome(*words)
    assert code == 1
    assert said.strip().endswith("o.safetensors: exists already; --force replaces it")


class TestExitCodes:
    def test_a_fault_of_the_data_is_one_line_and_1(self, ckpts, tmp_path):
        (ckpts / "step_3.safetensors").write_bytes(b"\xff" * 100)
        done = process("average", ckpts, "-o", tmp_path / "o.safetensors")
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"ckptavg: error: {ckpts / 'step_3.safetensors'}: ")
        assert os.listdir(tmp_path) == ["ckpts"]

    def test_differences_are_listed_a_line_each(self, tmp_path):
        save_run(tmp_path / "run", [{"a": torch.ones(1)}, {"b": torch.ones(1)}])
        code, _, said = outcome("average", tmp_path / "run", "-o", tmp_path / "o.safetensors")
        assert code == 1
        assert len(said.splitlines()) == 4  # what is wrong, how much of it, and two differences

    @pytest.mark.parametrize(
        "arguments",
        [
            ["average"],
            ["average", "x"],
            ["average", "x", "-o", "y.pt", "--dtype", "int8"],
            ["average", "x", "-o", "y.pt", "-j", "0"],
            ["average", "x", "-o", "y.pt", "--model", "nocolon", "--loader", "a:b"],
            ["average", "x", "-o", "y.pt", "--model", "a:b"],
            ["bn-refresh", "x"],
            ["bn-refresh", "x", "--model", "a:b", "--loader", "a:b", "--model-arg", "novalue"],
            ["inspect"],
            ["nonsense"],
            ["average", "", "-o", "y.pt"],
            ["average", "x", "-o", ""],
            ["average", "x", "-o", "y.pt", "--config", "missing.toml"],
        ],
    )
    def test_wrong_usage_is_2(self, arguments):
        run(*arguments, code=2)

    def test_help_and_version_are_0(self):
        for arguments in (["--help"], ["average", "-h"], ["--version"]):
            run(*arguments)

    @pytest.mark.parametrize(
        ("number", "code", "word"),
        [
            (signal.SIGINT, 130, "interrupted"),
            (signal.SIGTERM, 143, "terminated"),
            (signal.SIGHUP, 129, "terminated"),
        ],
    )
    def test_signals_leave_nothing_behind(self, tmp_path, number, code, word):
        returned, errors = self.signalled(tmp_path, signal.SIG_DFL, number)
        assert returned == code
        assert errors.strip() == f"ckptavg: {word}"
        assert os.listdir(tmp_path) == ["ckpts"]

    @pytest.mark.parametrize("second", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_changes_nothing(self, tmp_path, second):
        returned, errors = self.signalled(tmp_path, signal.SIG_DFL, signal.SIGHUP, second)
        assert (returned, errors) == (129, "ckptavg: terminated\n")
        assert os.listdir(tmp_path) == ["ckpts"]

    def test_under_nohup_a_run_goes_on_when_the_terminal_is_closed(self, tmp_path):
        returned, errors = self.signalled(tmp_path, signal.SIG_IGN, signal.SIGHUP)
        assert (returned, errors) == (0, "")
        assert sorted(os.listdir(tmp_path)) == ["ckpts", "o.safetensors"]

    @staticmethod
    def signalled(tmp_path, hangup, *numbers):
        """Hold a run at its threads' first write until signals have come, all at once.

        Args:
            tmp_path: where it runs.
            hangup: what the run begins with for SIGHUP, whatever the tests were started with.
            numbers: the signals.

        Returns:
            Its exit code and what it said.
        """
        save_run(tmp_path / "ckpts", [{"w": torch.randn(1000)} for _ in range(2)])
        script = (
            "import os, signal, sys\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whatever ours is
            f"signal.signal(signal.SIGHUP, signal.{hangup.name})\n"
            "from ckptavg.write.output import Output\n"
            "import threading\n"
            "def hold(self, offset, data):\n"
            "    if threading.current_thread() is not threading.main_thread():\n"
            "        print('writing', flush=True)\n"
            "        os.read(0, 1)\n"
            "Output.write = hold\n"
            "sys.argv = ['ckptavg', 'average', 'ckpts', '-o', 'o.safetensors']\n"
            "from ckptavg.cli import main\n"
            "main()\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        for number in (signal.SIGSTOP, *numbers, signal.SIGCONT):
            child.send_signal(number)
        _, errors = child.communicate("x", timeout=60)
        return child.returncode, errors


class TestInspect:
    def test_one_checkpoint(self, tmp_path):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
        path = tmp_path / "c.ckpt"
        torch.save(
            {
                "state_dict": model.state_dict(),
                "state_dict_ema": model.state_dict(),
                "optimizer_states": [optimizer.state_dict()],
                "global_step": 70,
                "epoch": 3,
            },
            path,
        )
        lines = run("inspect", path).stdout.splitlines()
        assert lines == [
            str(path),
            f"  container    torch, {size(path.stat().st_size)}",
            "  state dict   state_dict",
            "  others       state_dict_ema (choose one with --key)",
            "  tensors      7, with 22 elements, 92 B",
            "  dtypes       float32 (6), int64 (1)",
            "  training     global_step 70, epoch 3, learning_rate 0.125",
            "  norm layers  1 with running statistics",
        ]
        [document] = json.loads(run("inspect", path, "--json").stdout)["checkpoints"]
        assert document["facts"] == {"global_step": 70, "epoch": 3, "learning_rate": 0.125}
        assert document["other_state_dicts"] == ["state_dict_ema"]
        assert document["elements"] == 22

    def test_our_own_output_tells_its_provenance(self, ckpts, tmp_path):
        run("average", ckpts, "-o", tmp_path / "o.safetensors")
        text = run("inspect", tmp_path / "o.safetensors").stdout
        made = f"ckptavg {ckptavg.__version__}: uniform average of 3 checkpoints"
        assert f"{made}, norm statistics stale" in text

    def test_a_copy_of_one_checkpoint_needs_no_refresh(self, ckpts, tmp_path):
        output = tmp_path / "o.safetensors"
        assert "bn-refresh" not in run("average", ckpts / "step_1.safetensors", "-o", output).stdout
        made = f"ckptavg {ckptavg.__version__}: uniform average of 1 checkpoint"
        assert f"{made}, norm statistics kept" in run("inspect", output).stdout

    @pytest.mark.parametrize(
        ("entry", "text"),
        [
            (
                {"scheme": "none", "norm_stats": {"state": "refreshed"}},
                "ckptavg 1: norm statistics refreshed",
            ),
            (
                {"scheme": "\x1b[2J", "norm_stats": {"state": "a\nb"}},
                r"ckptavg 1: \x1b[2J average of 0 checkpoints, norm statistics a\nb",
            ),
        ],
        ids=["refreshed alone", "control characters"],
    )
    def test_a_provenance_is_one_safe_line(self, entry, text, tmp_path):
        metadata = {"ckptavg": json.dumps({"version": "1", **entry})}
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata=metadata)
        lines = run("inspect", tmp_path / "a.safetensors").stdout.splitlines()
        assert lines[-1] == f"  made by      {text}"

    def test_a_directory_is_an_aligned_table(self, ckpts):
        lines = run("inspect", ckpts).stdout.split("\n\n")[1].splitlines()
        assert len(lines) == 4
        column = lines[0].index("tensors")
        assert all(line[column - 1] == " " and line[column] == "9" for line in lines[1:])

    def test_what_is_left_out_for_one_reason_is_one_line(self, ckpts):
        names = ["optim_1.pt", "optim_2.pt", "rng_state.pt", "scheduler.pt", "training_args.bin"]
        for name in names:
            torch.save([1], ckpts / name)
        code, told, said = outcome("inspect", ckpts)
        assert (code, said) == (0, "")
        [row] = [line for line in told.splitlines() if "no weights" in line]
        assert row.split() == [
            *("optim_#.pt,", "rng_state.pt", "and", "2", "more", "5", "-", "no", "weights", "no"),
            *("the", "state", "of", "the", "training,", "by", "its", "name"),
        ]
        series = json.loads(run("inspect", ckpts, "--json").stdout)["series"]
        left_out = [row["name"] for row in series if not row["selected"]]
        assert left_out == ["optim_#.pt", *names[2:]]

    def test_of_many_damaged_files_the_first_are_named(self, ckpts):
        for number in range(100, 200):
            (ckpts / f"step_{number}.safetensors").write_bytes(b"damaged")
        code, _, said = outcome("inspect", ckpts)
        assert code == 1
        *first, rest, last = said.splitlines()
        assert all(f"step_{number}.safetensors" in line for number, line in enumerate(first, 100))
        assert len(first) == 20
        assert rest == "ckptavg: error: 79 more files cannot be read"
        assert "step_199.safetensors" in last

    def test_a_damaged_file_does_not_hide_the_others(self, ckpts):
        (ckpts / "step_1.safetensors").write_bytes(b"\xff" * 100)
        code, told, said = outcome("inspect", ckpts)
        assert code == 1
        series, _, members = told.partition("\n\n")
        assert len(series.splitlines()) == len(members.splitlines()) == 3
        assert "step_1.safetensors" in said

    def test_an_unclear_choice_shows_each_state_dict(self, tmp_path):
        content = {"generator": {"w": torch.ones(1)}, "discriminator": {"w": torch.ones(2)}}
        torch.save(content, tmp_path / "gan.pt")
        found = json.loads(run("inspect", tmp_path / "gan.pt", "--json").stdout)["checkpoints"]
        assert [one["state_dict"] for one in found] == ["generator", "discriminator"]

    def test_an_unclear_choice_shows_what_each_choice_shows(self, tmp_path):
        shared = torch.ones(3, dtype=torch.float64)
        content = {
            "ema": {"b/w": torch.ones(2), "w": shared, "bn.running_mean": torch.ones(1)},
            "nets": {"a": {"w": shared, "n": torch.ones(5)[2:]}, "b": {"w": torch.ones(1).half()}},
            "top": torch.ones(4, 4),
            "epoch": 3,
        }
        torch.save(content, tmp_path / "x.pt")

        def shown(*key):
            arguments = [part for name in key for part in ("--key", name)]
            return json.loads(run("inspect", tmp_path / "x.pt", *arguments, "--json").stdout)

        each = shown()["checkpoints"]
        assert {one["state_dict"] for one in each} == {"", "ema", "nets.a", "nets.b"}
        assert each == [shown(one["state_dict"])["checkpoints"][0] for one in each]

    def test_a_file_of_many_state_dicts_is_not_read_once_for_each(self, tmp_path):
        torch.save(
            {f"net{number}": {"w": torch.ones(1)} for number in range(50)}, tmp_path / "x.pt"
        )
        with mock.patch.object(unpickler, "load", wraps=unpickler.load) as load:
            found = json.loads(run("inspect", tmp_path / "x.pt", "--json").stdout)["checkpoints"]
        assert len(found) == 50
        assert load.call_count <= 2

    def test_terminal_codes_in_names_are_not_printed(self, tmp_path):
        path = tmp_path / "a\x1b[31m.pt"
        torch.save({"w": torch.ones(1)}, path)
        assert "\x1b" not in run("inspect", path).output


class TestConfiguration:
    def test_an_option_that_may_be_repeated_can_be_one_string(self, ckpts, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        self.write(tmp_path, "[tool.ckptavg]\nmodel-arg = 'width=3'\n")
        run("average", ckpts, "-o", "o.safetensors")

    def test_a_named_file_without_the_table_is_a_mistake(self, ckpts, tmp_path):
        other = self.write(tmp_path, "expect = 7\n", "my.toml")
        run("average", ckpts, "-o", tmp_path / "o.safetensors", "--config", other, code=2)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[tool.ckptavg]\nx = " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
            ("[tool.ckptavg]\nexpect = " + "9" * 5000, "limit"),
            ("#" * (1 << 20) + "\n", "is not a file of at most 1048576 bytes"),
            ("[tool.ckptavg]\nexpect = {a = 1}\n", "Invalid value for '--expect'"),
            ("[tool.ckptavg]\nforce = 'maybe'\n", "Invalid value"),
        ],
        ids=["deep", "long number", "large", "a table", "a text"],
    )
    def test_that_cannot_be_is_wrong_usage(self, tmp_path, text, message):
        file = self.write(tmp_path, text, "odd.toml")
        output = tmp_path / "o.safetensors"
        code, _, error = outcome("average", tmp_path, "-o", output, "--config", file)
        assert code == 2
        assert message in error

    def test_in_what_is_no_file_is_not_read(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        for path in (tmp_path / "fifo", "/dev/zero"):
            code, _, error = outcome("average", tmp_path, "-o", "o.pt", "--config", path)
            assert code == 2
            assert f"configuration: {path}: is not a file of at most" in error

    def write(self, folder: Path, text: str, name: str = "pyproject.toml") -> Path:
        (folder / name).write_text(text)
        return folder / name

    def test_pyproject_supplies_defaults(self, ckpts, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        self.write(
            tmp_path,
            "[tool.ckptavg]\nno-fsync = true\n"
            "[tool.ckptavg.average]\noutput = 'o.safetensors'\ndtype = 'float16'\n",
        )
        run("average", ckpts)
        assert load_file("o.safetensors")["scalar"].dtype == torch.float16
        run("average", ckpts, "--dtype", "float64", "-f")
        assert load_file("o.safetensors")["scalar"].dtype == torch.float64

    def test_another_file_on_request(self, ckpts, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        self.write(tmp_path, "[tool.ckptavg.average]\nexpect = 99\n")
        other = self.write(tmp_path, "[tool.ckptavg.average]\nexpect = 3\n", "other.toml")
        run("average", ckpts, "-o", "o.safetensors", "--config", other)
        run("average", ckpts, "-o", "p.safetensors", code=1)

    def test_model_and_loader_for_all_commands_do_not_make_average_refresh(
        self, ckpts, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        self.write(tmp_path, "[tool.ckptavg]\nmodel = 'nowhere:m'\nloader = 'nowhere:l'\n")
        run("average", ckpts, "-o", "o.safetensors")
        result = run("bn-refresh", "o.safetensors", code=1)
        assert "there is no module 'nowhere'" in str(result.exception)

    @pytest.mark.parametrize(
        "text",
        [
            "[tool.ckptavg]\nexpekt = 3\n",
            "[tool.ckptavg.average]\nexpekt = 3\n",
            "[tool.ckptavg]\naverage = 3\n",
            "[tool.ckptavg\n",
            "tool = 3\n",
            "[tool.ckptavg.average]\ndtype = 'int8'\n",
        ],
    )
    def test_mistakes_are_usage_errors(self, ckpts, tmp_path, monkeypatch, text):
        monkeypatch.chdir(tmp_path)
        self.write(tmp_path, text)
        run("average", ckpts, "-o", "o.safetensors", code=2)

    def test_a_configuration_beside_a_checkpoint_is_never_read(self, ckpts, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        self.write(ckpts, "[tool.ckptavg.average]\nexpect = 99\n")
        run("average", ckpts, "-o", "o.safetensors")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["average ckpts -o o.pt", "inspect ckpts --json"])
def test_closed_streams_are_no_error(ckpts, command, closed):
    program = f"exec {sys.executable} -m ckptavg {command} {closed}"
    done = subprocess.run(["sh", "-c", program], cwd=ckpts.parent, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    if command.startswith("average"):
        assert torch.load(ckpts.parent / "o.pt").keys() == random_state_dicts(1)[0].keys() | {
            "bn.running_mean"
        }


def test_help_imports_neither_numpy_nor_torch():
    code = (
        "import sys; sys.argv = ['ckptavg', '--help']\n"
        "from ckptavg.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'numpy', 'tqdm'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "bn-refresh" in done.stdout


def test_every_option_and_command_has_a_help_text():
    commands = dict(cli.cli.commands)
    group = cli.cli.commands["landscape"]
    assert isinstance(group, click.Group)
    commands |= group.commands
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (97_800_000, "97.8 MB"),
        (3e12, "3.0 TB"),
        (999_999, "1.0 MB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text


def test_plurals():
    assert [plural(1, "batch"), plural(2, "batch"), plural(1000, "tensor")] == [
        "1 batch",
        "2 batches",
        "1,000 tensors",
    ]


def test_an_interruption_that_an_import_made_another_error_of_is_one(monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise RuntimeError("Error calling __set_name__ on an attribute") from KeyboardInterrupt()

    monkeypatch.setattr(cli, "cli", interrupted)
    assert outcome("inspect", "x") == (130, "", "ckptavg: interrupted\n")


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "terminated"),
        (signal.SIGHUP, "terminated"),
    ],
)
def test_a_signal_before_the_command_line_is_there_is_one_line(number, word):
    code = (
        "import builtins, os, signal, sys; plain = builtins.__import__\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored,\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and so may this, under nohup\n"
        "def slow(name, *rest):\n"
        f"    if name == 'ckptavg.cli': os.kill(os.getpid(), {int(number)})\n"
        "    return plain(name, *rest)\n"
        "builtins.__import__ = slow; from ckptavg.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + number, f"ckptavg: {word}\n")
