"""Averages held against their own digests and their checkpoints."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg import Selection
from ckptavg.cli import cli
from ckptavg.errors import (
    CkptAvgError,
    MismatchError,
    OutputError,
    SelectionError,
    VerificationError,
)
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.select.run import Run
from tests.helpers import run
from tests.oracle import random_state_dicts, save_run


@pytest.fixture(name="run")
def _run(tmp_path):
    return save_run(tmp_path / "run", random_state_dicts(4))


def provenance(path):
    found = open_checkpoint(path).provenance
    assert found is not None
    return found


def flip(path, offset, mask=1):
    """Change a bit of a file, and leave its size and times as they were."""
    data, times = bytearray(path.read_bytes()), path.stat()
    data[offset] ^= mask
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


class TestHash:
    @pytest.mark.parametrize("name", ["o.safetensors", "o.pt", "o/"])
    def test_records_what_sha256sum_says_of_the_inputs(self, tmp_path, run, name):
        summary = ckptavg.average(tmp_path / "run", f"{tmp_path}/{name}", hash=True)
        entry = provenance(tmp_path / name)
        wanted = [hashlib.sha256(path.read_bytes()).hexdigest() for path in run]
        assert [source["sha256"] for source in entry["sources"]] == wanted
        assert [source.sha256 for source in summary.sources] == wanted

    def test_of_shards_records_each_file(self, tmp_path):
        for step in (1, 2):
            folder = tmp_path / "run" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            weight_map = {}
            for number in (1, 2):
                shard = f"model-0000{number}-of-00002.safetensors"
                save_file({f"w{number}": torch.full((50,), float(step))}, folder / shard)
                weight_map[f"w{number}"] = shard
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": weight_map})
            )
        ckptavg.average(tmp_path / "run", f"{tmp_path}/o/", hash=True, max_shard_size=200)
        shards = sorted((tmp_path / "o").glob("*.safetensors"))
        assert len(shards) == 2
        entry = provenance(tmp_path / "o")
        first = tmp_path / "run" / "checkpoint-1"
        assert entry["sources"][0]["sha256"] == {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in first.glob("*.safetensors")
        }
        assert ckptavg.verify(tmp_path / "o", [tmp_path / "run"]).sources_hashed == 2

    @pytest.mark.usefixtures("run")
    def test_leaves_no_trace_where_it_is_not_asked_for(self, tmp_path):
        ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors")
        entry = provenance(tmp_path / "o.safetensors")
        assert all("sha256" not in source for source in entry["sources"])

    @pytest.mark.usefixtures("run")
    def test_does_not_read_checkpoints_without_a_weight(self, tmp_path):
        ckptavg.average(
            tmp_path / "run", tmp_path / "o.safetensors", weights=[1, 0, 1, 1], hash=True
        )
        sources = provenance(tmp_path / "o.safetensors")["sources"]
        assert [source["name"] for source in sources] == [
            f"step_{n}.safetensors" for n in (0, 2, 3)
        ]
        assert all("sha256" in source for source in sources)
        assert ckptavg.verify(tmp_path / "o.safetensors", [tmp_path / "run"]).sources_hashed == 3

    def test_a_container_s_checksums_are_right(self, tmp_path):
        (tmp_path / "run").mkdir()
        for step, state in enumerate(random_state_dicts(3)):
            torch.save({"state_dict": state, "epoch": step}, tmp_path / "run" / f"step_{step}.pt")
        out = tmp_path / "o.ckpt"
        ckptavg.average(tmp_path / "run", out, container="last", hash=True)
        with zipfile.ZipFile(out) as archive:
            assert archive.testzip() is None
        assert ckptavg.verify(out, [tmp_path / "run"]).compared


OPTIONS: dict[str, dict[str, Any]] = {
    "the mean": {},
    "weights": {"weights": "ema:0.7"},
    "weights that are not normalised": {"weights": [0.3, -0.1, 0.2, 0.7], "normalize": False},
    "some": {"select": Selection(last=2)},
    "another dtype": {"dtype": "bfloat16"},
}


class TestVerify:
    @pytest.mark.parametrize("name", ["o.safetensors", "o.pt"])
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.usefixtures("run")
    def test_what_was_made_is_verified(self, tmp_path, options, name):
        out = tmp_path / name
        made = ckptavg.average(tmp_path / "run", out, **options)
        found = ckptavg.verify(out, [tmp_path / "run"])
        assert found.sources == len(made.sources)
        assert found.compared == made.tensors
        assert not found.sources_hashed
        assert not found.refreshed

    def test_statistics_of_the_last(self, tmp_path):
        states = [
            {
                "bn.running_mean": torch.randn(5),
                "bn.running_var": torch.rand(5),
                "w": torch.randn(3),
            }
            for _ in range(3)
        ]
        save_run(tmp_path / "run", states)
        ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors", norm_stats="last")
        assert ckptavg.verify(tmp_path / "o.safetensors", [tmp_path / "run"]).compared == 3

    def test_wrappers_tied_and_strided_tensors(self, tmp_path):
        (tmp_path / "run").mkdir()
        for step in range(3):
            tied = torch.randn(40, 30)
            state = {"module.a": tied, "module.b": tied, "module.t": torch.randn(50, 20).t()}
            torch.save(state, tmp_path / "run" / f"step_{step}.pt")
        outputs: dict[str, dict[str, Any]] = {
            "o.safetensors": {},
            "o.pt": {},
            "dropped.safetensors": {"drop_aliases": True},
            "kept.safetensors": {"keep_prefix": True},
            "whole.pt": {"container": "last"},
        }
        for name, options in outputs.items():
            ckptavg.average(tmp_path / "run", tmp_path / name, hash=True, **options)
            found = ckptavg.verify(tmp_path / name, [tmp_path / "run"])
            assert (found.sources_hashed, found.compared) == (3, 2), name

    @pytest.mark.parametrize("hashed", [True, False])
    @pytest.mark.parametrize("tensor", ["embed.weight", "layer.weight"])
    @pytest.mark.parametrize("name", ["o.safetensors", "o.pt", "o/"])
    @pytest.mark.usefixtures("run")
    def test_a_bit_that_differs_is_found_and_its_tensor_named(self, tmp_path, name, tensor, hashed):
        ckptavg.average(tmp_path / "run", f"{tmp_path}/{name}", hash=hashed)
        out = tmp_path / name
        opened = open_checkpoint(out)
        place = opened.tensors[tensor]
        part = opened.parts[place.part]
        flip(Path(part.path), getattr(part, "start", 0) + place.offset + 4 * 7)
        with pytest.raises(
            VerificationError, match=r"element 7 is .*, but its checkpoints"
        ) as caught:
            ckptavg.verify(out, [tmp_path / "run"])
        assert caught.value.tensor == tensor
        assert caught.value.path == out

    def test_of_several_the_first_that_differs_is_named(self, tmp_path):
        save_run(tmp_path / "run", [{f"w{n:03}": torch.randn(50_000) for n in range(40)}] * 1)
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out)
        opened = open_checkpoint(out)
        for number in (11, 12, 30):
            place = opened.tensors[f"w{number:03}"]
            flip(out, place.offset + 4 * 40_000)
        for threads in (1, 4):
            with pytest.raises(VerificationError) as caught:
                ckptavg.verify(out, [tmp_path / "run"], threads=threads)
            assert caught.value.tensor == "w011"
            assert "element 40000 " in caught.value.message

    @pytest.mark.usefixtures("run")
    def test_without_checkpoints_nothing_can_be_verified(self, tmp_path):
        ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors")
        with pytest.raises(VerificationError, match=r"made of: step_0\S+, step_1.*; name them, or"):
            ckptavg.verify(tmp_path / "o.safetensors", [])

    @pytest.mark.usefixtures("run")
    def test_leaves_nothing_behind(self, tmp_path):
        ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors")
        before = sorted(tmp_path.rglob("*"))
        ckptavg.verify(tmp_path / "o.safetensors", [tmp_path / "run"])
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_checkpoint_with_another_bit_is_named(self, tmp_path, run):
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out, hash=True)
        flip(run[2], run[2].stat().st_size // 2)
        with pytest.raises(MismatchError) as caught:
            ckptavg.verify(out, [tmp_path / "run"])
        assert caught.value.differences == (f"{run[2]}: has another SHA-256 than it had",)

    def test_checkpoints_that_are_missing_or_others_are_all_named(self, tmp_path, run):
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out)
        run[0].unlink()
        state = load_file(run[1])
        save_file({**state, "one": torch.ones(2)}, run[1])
        save_file(state, run[3], metadata={"a": "b"})
        with pytest.raises(MismatchError) as caught:
            ckptavg.verify(out, [tmp_path / "run"])
        first, second, third = caught.value.differences
        assert first == "step_0.safetensors: is not among the inputs"
        assert second.startswith(f"{run[1]}: has ")
        assert third.startswith(f"{run[3]}: has ")

    def test_further_checkpoints_do_not_matter(self, tmp_path, run):
        out = tmp_path / "o.safetensors"
        ckptavg.average(run[:3], out, hash=True)
        assert ckptavg.verify(out, [tmp_path / "run"]).sources == 3
        run[3].write_bytes(b"damaged")
        shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "run")
        assert ckptavg.verify(out, [tmp_path / "elsewhere" / "run"]).sources_hashed == 3

    def test_of_members_alike_one_list_of_tensors_is_in_memory(self, tmp_path, run, monkeypatch):
        ckptavg.average(run, tmp_path / "o.safetensors")
        verifying: Any = importlib.import_module("ckptavg.verify")
        write_averages = verifying.write_averages
        given: list[Checkpoint] = []

        def spied(run: Run, *args: Any, **options: Any) -> Any:
            given.extend(run.members)
            return write_averages(run, *args, **options)

        monkeypatch.setattr(verifying, "write_averages", spied)
        assert ckptavg.verify(tmp_path / "o.safetensors", run).sources == 4
        assert len(given) == 4
        assert len({id(member.tensors) for member in given}) == 1

    @pytest.mark.usefixtures("run")
    def test_the_same_name_in_two_runs_is_told_apart_by_what_is_known_of_it(self, tmp_path):
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out)
        save_run(tmp_path / "a", [{"w": torch.randn(3)} for _ in range(4)])
        assert ckptavg.verify(out, [tmp_path / "a", tmp_path / "run"]).compared

    def test_an_average_that_was_brought_up_to_date_cannot_be_made_again(self, tmp_path, run):
        ckptavg.average(run[:2], tmp_path / "first.safetensors")
        out = tmp_path / "o.safetensors"
        ckptavg.average([tmp_path / "first.safetensors", *run[2:]], out, update=True, hash=True)
        with pytest.raises(VerificationError, match="made with update"):
            ckptavg.verify(out, [tmp_path / "run"])

    def test_what_is_not_of_our_making_is_refused(self, run):
        with pytest.raises(VerificationError, match="was not made by ckptavg"):
            ckptavg.verify(run[0], run)

    @pytest.mark.parametrize(
        "change",
        [
            {"sources": []}, {"sources": [{}]}, {"sources": 3}, {"divisor": 0}, {"divisor": "x"},
            {"divisor": None}, {"divisor": True}, {"options": 1}, {"options": {"dtype": "x"}},
            {"options": {"dtype": []}}, {"options": {"norm_stats": {}}}, {"options": {"lora": []}},
            {"sha256": 1}, {"divisor": 10**400}, {"options": {"dtype": "bool"}}, {"norm_stats": 1},
            {"scheme": [[]]}, {"version": {}},
        ],
        ids=str,
    )  # fmt: skip
    @pytest.mark.usefixtures("run")
    def test_a_damaged_provenance_is_one_line(self, tmp_path, change):
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out)
        with safe_open(out, "pt") as opened:
            metadata = opened.metadata()
        entry = {**json.loads(metadata["ckptavg"]), **change}
        save_file(load_file(out), out, metadata={**metadata, "ckptavg": json.dumps(entry)})
        result = CliRunner().invoke(cli, ["verify", str(out), str(tmp_path / "run")])
        assert result.exception is None or isinstance(result.exception, SystemExit | CkptAvgError)
        assert "\n" not in str(result.exception)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("one"), "one: is missing from it"),
            (lambda state: state.update(more=torch.ones(1)), "more: is in it, but not in its"),
            (lambda state: state.update(one=torch.ones(2)), r"is float32 \[2\] in it, but its che"),
            (lambda state: state.update(one=torch.ones(1).half()), "is float16"),
        ],
    )
    @pytest.mark.usefixtures("run")
    def test_tensors_that_are_missing_or_others_are_named(self, tmp_path, change, message):
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out)
        with safe_open(out, "pt") as opened:
            metadata = opened.metadata()
        state = load_file(out)
        change(state)
        save_file(state, out, metadata=metadata)
        with pytest.raises(VerificationError, match=message):
            ckptavg.verify(out, [tmp_path / "run"])

    @pytest.mark.usefixtures("run")
    def test_another_version_is_mentioned_where_something_differs(self, tmp_path):
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out)
        with safe_open(out, "pt") as opened:
            metadata = opened.metadata()
        state = load_file(out)
        state["one"] += 1
        metadata["ckptavg"] = metadata["ckptavg"].replace(ckptavg.__version__, "9.8")
        save_file(state, out, metadata=metadata)
        with pytest.raises(VerificationError, match=r"it was made by ckptavg 9\.8, and this is"):
            ckptavg.verify(out, [tmp_path / "run"])

    def test_a_checkpoint_that_an_option_named_by_key(self, tmp_path):
        (tmp_path / "run").mkdir()
        for step, state in enumerate(random_state_dicts(3)):
            both = {"model": state, "model_ema": {k: v + 1 for k, v in state.items()}}
            torch.save(both, tmp_path / "run" / f"step_{step}.pt")
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out, key="model_ema", hash=True)
        assert ckptavg.verify(out, [tmp_path / "run"]).sources_hashed == 3
        with pytest.raises(SelectionError):
            ckptavg.verify(out, [tmp_path / "run"], key="nothing")


def test_a_disk_without_room_for_the_copy_is_an_error_that_names_the_average(
    tmp_path, run, monkeypatch
):
    output = tmp_path / "o.safetensors"
    ckptavg.average(run, output)
    room = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((1, 1, 9, 1, 1, *room[5:])))
    with pytest.raises(OutputError, match=r"copy to compare it with: .*No space left") as raised:
        ckptavg.verify(output, run)
    assert raised.value.path == output
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["o.safetensors", "run"]


class TestCommand:
    @pytest.mark.usefixtures("run")
    def test_says_what_was_verified(self, tmp_path):
        out = str(tmp_path / "o.safetensors")
        ckptavg.average(tmp_path / "run", out, hash=True)
        result = run("verify", out, tmp_path / "run")
        lines = result.stdout.splitlines()
        assert lines[0] == f"{out}: verified"
        assert "4 of them by SHA-256" in lines[1]
        assert "equal in every bit" in lines[2]
        result = run("verify", out, tmp_path / "run", "--json")
        assert json.loads(result.stdout) == {
            "output": out, "scheme": "uniform", "sources": 4, "sources_hashed": 4,
            "compared": 8, "refreshed": 0, "notices": [],
        }  # fmt: skip

    def test_of_a_refreshed_average_leaves_the_statistics_out(self, tmp_path, monkeypatch):
        states = []
        for step in range(3):
            torch.manual_seed(step)
            model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
            model(torch.randn(8, 3))
            states.append(model.state_dict())
        save_run(tmp_path / "run", states)
        (tmp_path / "m.py").write_text(
            "import torch\n"
            "model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))\n"
            "loader = [torch.randn(8, 3) for _ in range(3)]\n"
        )
        monkeypatch.chdir(tmp_path)
        spec = ["--model", "m.py:model", "--loader", "m.py:loader"]
        for arguments in (
            ["average", "run", "-o", "o.safetensors", "--hash", *spec],
            ["average", "run", "-o", "p.safetensors", "--hash"],
            ["bn-refresh", "p.safetensors", *spec],
        ):
            run(*arguments)
        for name in ("o.safetensors", "p.safetensors"):
            result = run("verify", name, "run")
            assert "3 tensors: refreshed statistics" in result.stdout

    def test_a_refreshed_directory_is_recorded_by_its_own_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("m.py").write_text(
            "import torch\nmodel = torch.nn.BatchNorm1d(4)\n"
            "loader = [torch.randn(8, 4) for _ in range(3)]\n"
        )
        Path("checkpoint-7").mkdir()
        Path("checkpoint-7/config.json").write_text("{}")
        save_file(torch.nn.BatchNorm1d(4).state_dict(), "checkpoint-7/model.safetensors")
        spec = ["--model", "m.py:model", "--loader", "m.py:loader"]
        run("bn-refresh", "checkpoint-7", "-o", "out.safetensors", *spec)
        entry = open_checkpoint(Path("out.safetensors")).provenance
        assert entry is not None
        assert [source["name"] for source in entry["sources"]] == ["checkpoint-7"]
        assert ckptavg.verify("out.safetensors", ["checkpoint-7"]).compared == 2

    def test_names_do_not_depend_on_what_is_no_member(self, tmp_path):
        states = [{"w": torch.full((3,), float(step))} for step in range(3)]
        save_run(tmp_path / "run", states)
        (tmp_path / "other").mkdir()
        save_file(states[2], tmp_path / "other" / "best.safetensors")  # a copy
        save_file(states[0], tmp_path / "other" / "left.safetensors")
        ckptavg.average(
            [tmp_path / "run", tmp_path / "other"], tmp_path / "o.safetensors",
            select=ckptavg.Selection(exclude=("other/left*",)),
        )  # fmt: skip
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        verified = ckptavg.verify(tmp_path / "o.safetensors", [tmp_path / "elsewhere"])
        assert verified.sources == 3


class TestMembers:
    """The checkpoints are found again, whatever they are called."""

    @pytest.fixture
    def two(self, tmp_path, monkeypatch):
        """Two runs whose files have the same names and headers."""
        monkeypatch.chdir(tmp_path)
        for place, name in enumerate("ab"):
            torch.manual_seed(place)
            save_run(tmp_path / name, [{"w": torch.randn(9, 900)} for _ in range(3)])
        return tmp_path

    @pytest.mark.usefixtures("two")
    @pytest.mark.parametrize("hashed", [True, False])
    def test_of_two_with_one_name_the_one_with_the_values_is_meant(self, hashed):
        ckptavg.average(["a", "b"], "o.pt", select=Selection(exclude=("a/*",)), hash=hashed)
        assert ckptavg.verify("o.pt", ["a", "b"]).compared
        Path("a/step_0.safetensors").write_bytes(b"damaged")
        assert ckptavg.verify("o.pt", ["b", "a"]).compared

    @pytest.mark.usefixtures("two")
    def test_one_file_stands_for_one_member(self):
        Path("b/step_0.safetensors").rename("step_0.safetensors")
        ckptavg.average(["step_0.safetensors", "a/step_0.safetensors"], "o.pt")
        assert ckptavg.verify("o.pt", ["step_0.safetensors", "a/step_0.safetensors"]).compared
        with pytest.raises(MismatchError):
            ckptavg.verify("o.pt", ["a/step_0.safetensors"])

    @pytest.mark.usefixtures("two")
    def test_copies_of_them_do_not_hide_them(self):
        shutil.copytree("b", "0copy")
        ckptavg.average(["0copy", "a", "b"], "o.pt", select=Selection(exclude=("0copy/*",)))
        assert ckptavg.verify("o.pt", ["0copy", "a", "b"]).sources == 6

    def test_they_may_be_where_one_is(self, two, monkeypatch):
        monkeypatch.chdir(two / "a")
        ckptavg.average([".", "../b"], "../o.pt")
        assert ckptavg.verify("../o.pt", [".", "../b"]).sources == 6

    def test_each_has_a_state_dict_of_its_own(self, tmp_path):
        states = random_state_dicts(2)
        save_run(tmp_path / "run", states[:1])
        torch.save({"model": states[1]}, tmp_path / "run" / "step_1.pt")
        ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors")
        assert ckptavg.verify(tmp_path / "o.safetensors", [tmp_path / "run"]).compared

    def test_with_other_values_and_the_same_header_is_another(self, tmp_path, run):
        ckptavg.average(tmp_path / "run", tmp_path / "o.safetensors")
        state = load_file(run[1])
        save_file({name: value + 1 for name, value in state.items()}, run[1])
        with pytest.raises(MismatchError, match=f"{run[1]}: has other values than recorded"):
            ckptavg.verify(tmp_path / "o.safetensors", [tmp_path / "run"])

    def test_a_changed_shard_is_named(self, tmp_path):
        folder = tmp_path / "run" / "checkpoint-1"
        folder.mkdir(parents=True)
        for name in "xy":
            save_file({name: torch.zeros(500)}, folder / f"{name}.safetensors")
        weight_map = {name: f"{name}.safetensors" for name in "xy"}
        text = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
        ckptavg.average(tmp_path / "run", f"{tmp_path}/o/", hash=True)
        flip(folder / "y.safetensors", (folder / "y.safetensors").stat().st_size - 1)
        with pytest.raises(MismatchError, match=r"checkpoint-1, y\.safetensors: has another SHA"):
            ckptavg.verify(tmp_path / "o", [tmp_path / "run"])


class TestKeys:
    @pytest.fixture(name="both")
    def _both(self, tmp_path):
        (tmp_path / "run").mkdir()
        for step, state in enumerate(random_state_dicts(3)):
            ema = {name: value + 1 for name, value in state.items()}
            torch.save({"model": state, "model_ema": ema}, tmp_path / "run" / f"step_{step}.pt")
        return tmp_path

    def test_a_container_is_opened_where_the_average_is(self, both):
        out = both / "o.pt"
        ckptavg.average(both / "run", out, key="model_ema", container="last", hash=True)
        assert ckptavg.verify(out, [both / "run"]).sources_hashed
        opened = open_checkpoint(out, key="model_ema")
        flip(out, opened.tensors["embed.weight"].offset)
        with pytest.raises(VerificationError):
            ckptavg.verify(out, [both / "run"])

    def test_a_refreshed_copy_is_held_against_the_state_dict_that_it_is(self, both, monkeypatch):
        monkeypatch.chdir(both)
        Path("m.py").write_text(
            "import torch\nmodel = torch.nn.BatchNorm1d(4)\n"
            "loader = [torch.randn(8, 4) for _ in range(3)]\n"
        )
        norm = {name: value + 0 for name, value in torch.nn.BatchNorm1d(4).state_dict().items()}
        ema = {**norm, "weight": torch.randn(4)}
        torch.save({"model": norm, "model_ema": ema}, "one.pt")
        spec = ["--model", "m.py:model", "--loader", "m.py:loader", "--key", "model_ema"]
        for name, more in (("o.safetensors", []), ("o.pt", ["--container", "last"])):
            run("bn-refresh", "one.pt", "-o", name, *spec, *more)
            assert ckptavg.verify(name, ["one.pt"]).compared == 2
        opened = open_checkpoint(Path("o.pt"), key="model_ema")
        flip(Path("o.pt"), opened.tensors["weight"].offset)
        with pytest.raises(VerificationError) as caught:
            ckptavg.verify("o.pt", ["one.pt"])
        assert caught.value.tensor == "weight"


class TestWhatDiffers:
    @pytest.mark.parametrize("hashed", [True, False])
    @pytest.mark.usefixtures("run")
    def test_names_are_as_they_were(self, tmp_path, hashed):
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out, hash=hashed)
        with safe_open(out, "pt") as opened:
            metadata = opened.metadata()
        renamed = {f"module.{name}": value for name, value in load_file(out).items()}
        save_file(renamed, out, metadata=metadata)
        with pytest.raises(VerificationError):
            ckptavg.verify(out, [tmp_path / "run"])

    def test_statistics_have_the_shape_that_they_had(self, tmp_path):
        norm = torch.nn.BatchNorm1d(4).state_dict()
        save_run(tmp_path / "run", [norm, {name: value + 1 for name, value in norm.items()}])
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out)
        with safe_open(out, "pt") as opened:
            metadata = opened.metadata()
        entry = json.loads(metadata["ckptavg"]) | {"norm_stats": {"state": "refreshed"}}
        metadata["ckptavg"] = json.dumps(entry)
        for change in ({"running_mean": torch.zeros(5)}, {"running_var": torch.zeros(4).char()}):
            save_file({**load_file(out), **change}, tmp_path / "x.safetensors", metadata=metadata)
            with pytest.raises(VerificationError, match="in it, but its checkpoints give"):
                ckptavg.verify(tmp_path / "x.safetensors", [tmp_path / "run"])

    @pytest.mark.parametrize("drop", [True, False])
    def test_tied_names_are_there_or_said_to_be_dropped(self, tmp_path, drop):
        (tmp_path / "run").mkdir()
        for step in range(2):
            tied = torch.randn(30)
            state = {"a": tied, "b": tied, "c": torch.randn(30)}
            torch.save(state, tmp_path / "run" / f"step_{step}.pt")
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out, drop_aliases=drop)
        assert ckptavg.verify(out, [tmp_path / "run"]).compared == 2
        with safe_open(out, "pt") as opened:
            metadata = opened.metadata()
        state = load_file(out)
        state.pop("b", None)
        for aliases in ({"b": "c"}, {"b": ""}):
            save_file(state, out, metadata={**metadata, **aliases})
            with pytest.raises(VerificationError, match="b: is missing from it"):
                ckptavg.verify(out, [tmp_path / "run"])

    def test_integers_that_could_not_be_averaged_are_not_passed_over(self, tmp_path):
        states = [{"w": torch.randn(3), "ids": torch.arange(4)} for _ in range(2)]
        paths = save_run(tmp_path / "run", states)
        out = tmp_path / "o.safetensors"
        ckptavg.average(tmp_path / "run", out)
        flip(paths[0], paths[0].stat().st_size - 1 - 12)
        with pytest.raises(CkptAvgError):
            ckptavg.verify(out, [tmp_path / "run"])

    def test_a_file_without_a_place_for_digests_is_refused_by_hash(self, tmp_path):
        (tmp_path / "run").mkdir()
        for step, state in enumerate(random_state_dicts(2)):
            torch.save(
                {"state_dict": state}, tmp_path / "run" / f"step_{step}.pt",
                _use_new_zipfile_serialization=False,
            )  # fmt: skip
        with pytest.raises(CkptAvgError, match="has no place for digests"):
            ckptavg.average(tmp_path / "run", tmp_path / "o.pt", container="last", hash=True)
        assert not (tmp_path / "o.pt").exists()

    def test_a_member_called_like_the_average_that_is_brought_up_to_date(self, tmp_path):
        for place, name in enumerate(("base", "new")):
            save_run(tmp_path / name, random_state_dicts(2, seed=place))
        ckptavg.average(tmp_path / "base", tmp_path / "base" / "step_9.safetensors")
        new = tmp_path / "new" / "step_9.safetensors"
        (tmp_path / "new" / "step_1.safetensors").rename(new)
        out = tmp_path / "o.safetensors"
        ckptavg.average([tmp_path / "base" / "step_9.safetensors", new], out, update=True)
        assert len(provenance(out)["sources"]) == 3
