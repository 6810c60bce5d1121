"""`ckptavg convert`: one checkpoint in another layout, every byte of its tensors as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckptavg
from ckptavg.errors import CkptAvgError, FormatError, SelectionError
from ckptavg.formats import open_checkpoint
from tests.helpers import outcome, run, save_dcp
from tests.oracle import naive_mean, same_bits, save_run

pytestmark = pytest.mark.usefixtures("no_fsync")

KINDS = ("a.safetensors", "b.pt", "training.pt", "legacy.pt", "dcp")


def state() -> dict[str, Any]:
    """What averages refuse or round: NaN, codes with a scale, a bool, a negative variance."""
    shared = torch.randn(5, 3)
    return {
        "w": torch.randn(4, 3),
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "half": torch.randn(7).half(),
        "fc.weight": torch.randint(-100, 100, (4, 4)).char(),
        "fc.weight_scale": torch.ones(1),
        "bn.running_var": -torch.ones(2),
        "bn.running_mean": torch.ones(2),
        "mask": torch.tensor([True, False]),
        "turned": torch.randn(3, 5).t(),
        "embed": shared,
        "head": shared,
    }


def save(kind: str, values: dict[str, Any], folder: Path) -> Path:
    path = folder / "in" / kind
    path.parent.mkdir(exist_ok=True)
    match kind:
        case "a.safetensors":
            save_file({name: value.clone().contiguous() for name, value in values.items()}, path)
        case "dcp":
            return save_dcp(values, path)
        case "training.pt":
            torch.save({"model": values, "optimizer": {"state": {}}, "epoch": 3}, path)
        case "legacy.pt":
            torch.save(values, path, _use_new_zipfile_serialization=False)
        case _:
            torch.save(values, path)
    return path


def load(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return dict(load_file(path / "model.safetensors"))
    return dict(load_file(path)) if path.suffix == ".safetensors" else dict(torch.load(path))


@pytest.mark.parametrize("output", ["out.safetensors", "out.pt", "out/"])
@pytest.mark.parametrize("kind", KINDS)
def test_names_and_bytes_stay(tmp_path, kind, output):
    values = state()
    path = save(kind, values, tmp_path)
    summary = ckptavg.convert(path, f"{tmp_path}/{output}")
    result = load(tmp_path / output)
    assert result.keys() == values.keys()
    for name, value in values.items():
        assert same_bits(result[name], value), name
    assert set(summary.roles) == {"kept"}
    if output == "out.pt" and kind == "b.pt":
        assert result["embed"].data_ptr() == result["head"].data_ptr()


def test_there_and_back_is_the_same_file(tmp_path):
    save_file({"a": torch.randn(3), "b": torch.arange(4)}, tmp_path / "a.safetensors")
    ckptavg.convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    ckptavg.convert(tmp_path / "b.pt", tmp_path / "c.safetensors")
    ckptavg.convert(tmp_path / "b.pt", tmp_path / "d.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    assert load(tmp_path / "c.safetensors").keys() == {"a", "b"}


def test_a_prefix_stays(tmp_path):
    torch.save({"module.w": torch.ones(1), "module.b": torch.ones(1)}, tmp_path / "a.pt")
    ckptavg.convert(tmp_path / "a.pt", tmp_path / "o.safetensors")
    assert load(tmp_path / "o.safetensors").keys() == {"module.w", "module.b"}
    assert ckptavg.verify(tmp_path / "o.safetensors", [tmp_path / "a.pt"]).compared == 2


def test_dtype_and_skip(tmp_path):
    values = state()
    path = save("b.pt", values, tmp_path)
    output = tmp_path / "o.safetensors"
    summary = ckptavg.convert(path, output, dtype="bfloat16", skip=["^odd$", r"^fc\."])
    result = load(output)
    assert summary.roles == {"kept": 7, "skipped": 3}  # tied tensors are one
    for name, value in result.items():
        assert same_bits(value, values[name].bfloat16() if value.is_floating_point() else value)
    assert "odd" not in result
    assert ckptavg.verify(output, [path]).compared == 7


def test_an_average_stays_what_it_is(tmp_path):
    states = [{"bn.running_mean": torch.randn(2), "bn.running_var": torch.ones(2) * step,
               "w": torch.randn(3)} for step in (1, 2)]  # fmt: skip
    save_run(tmp_path / "run", states)
    average, converted = tmp_path / "swa.safetensors", tmp_path / "swa.pt"
    ckptavg.average(tmp_path / "run", average)
    ckptavg.convert(average, converted)
    assert open_checkpoint(converted).provenance == open_checkpoint(average).provenance
    assert ckptavg.verify(converted, [tmp_path / "run"]).compared == 3
    assert same_bits(load(converted)["w"], naive_mean([state["w"] for state in states]))
    said = run("inspect", converted).stdout
    assert "uniform average of 2 checkpoints, norm statistics stale" in said


def test_an_average_in_another_dtype_is_a_copy_of_it(tmp_path):
    save_run(tmp_path / "run", [{"w": torch.randn(3)} for _ in range(2)])
    average, converted = tmp_path / "swa.safetensors", tmp_path / "half.safetensors"
    ckptavg.average(tmp_path / "run", average)
    ckptavg.convert(average, converted, dtype="float16")
    entry = open_checkpoint(converted).provenance or {}
    assert (entry["scheme"], entry["options"]) == ("none", {"dtype": "float16"})
    assert [member["name"] for member in entry["sources"]] == ["swa.safetensors"]
    assert ckptavg.verify(converted, [average]).compared == 1


def test_a_checkpoint_is_no_average_afterwards(tmp_path):
    (tmp_path / "new").mkdir()
    for step in (1, 2):
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        torch.save(model.state_dict(), tmp_path / f"step_{step}.pt")
        output = tmp_path / "new" / f"step_{step}.safetensors"
        code, out, err = outcome("convert", tmp_path / f"step_{step}.pt", "-o", output)
        assert (code, err) == (0, "")
        assert out.splitlines()[0] == f"converted step_{step}.pt"
        assert not any(word in out for word in ("average", "stale", "bn-refresh"))
    ckptavg.average(tmp_path / "new", tmp_path / "swa.safetensors")
    assert load(tmp_path / "swa.safetensors").keys() == model.state_dict().keys()


def test_json_and_a_dry_run(tmp_path):
    path = save("training.pt", state(), tmp_path)
    output = tmp_path / "o.safetensors"
    result = json.loads(run("convert", path, "-o", output, "--json", "--dry-run").stdout)
    assert not output.exists()
    assert (result["written"], result["tensors"], result["scheme"]) == (False, 10, "none")
    assert run("convert", path, "-o", output, "-n").stdout.startswith("would convert training.pt\n")


class TestRefusals:
    def test_of_several_checkpoints_name_them(self, tmp_path):
        save_run(tmp_path / "run", [{"w": torch.ones(1)}, {"w": torch.zeros(1)}])
        with pytest.raises(SelectionError, match=r"of checkpoints: .*step_.*; convert one"):
            ckptavg.convert(tmp_path / "run", tmp_path / "o.pt")

    def test_of_pieces_of_one_model_name_what_joins_them(self, tmp_path):
        folder = tmp_path / "mp_rank_00"
        folder.mkdir()
        for number in range(2):
            torch.save({"w": torch.ones(1)}, folder / f"epoch_{number}.pth")
        with pytest.raises(SelectionError, match="convert one of them"):
            ckptavg.convert(folder, tmp_path / "o.pt")
        for number in range(2):
            (folder / f"epoch_{number}.pth").rename(folder / f"consolidated.0{number}.pth")
        with pytest.raises(SelectionError, match=r"of one model: .*convert_llama_weights_to_hf"):
            ckptavg.convert(folder, tmp_path / "o.pt")

    def test_of_several_state_dicts_name_the_key(self, tmp_path):
        torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.zeros(1)}}, tmp_path / "a.pt")
        with pytest.raises(SelectionError, match="a, b"):
            ckptavg.convert(tmp_path / "a.pt", tmp_path / "o.pt")
        ckptavg.convert(tmp_path / "a.pt", tmp_path / "o.pt", key="b")
        assert load(tmp_path / "o.pt") == {"w": torch.zeros(1)}

    @pytest.mark.parametrize(
        ("options", "output", "message"),
        [
            ({"skip": ["nothing"]}, "o.pt", "matches no tensor's name"),
            ({"skip": [""]}, "o.pt", "leaves out all tensors"),
            ({"dtype": "int8"}, "o.pt", "unknown floating dtype"),
            ({"max_shard_size": 10}, "o.pt", "shards need a directory"),
            ({"force": True}, "b.pt", "is itself one of the checkpoints"),
            ({}, "taken.pt", "exists"),
            ({}, "o.xyz", "is not that of a format"),
        ],
    )
    def test_leave_nothing_behind(self, tmp_path, options, output, message):
        path = save("b.pt", state(), tmp_path)
        folder = path.parent
        (folder / "taken.pt").write_bytes(b"x")
        before = {each.name: each.read_bytes() for each in folder.iterdir()}
        with pytest.raises(CkptAvgError, match=message):
            ckptavg.convert(path, folder / output, **options)
        assert {each.name: each.read_bytes() for each in folder.iterdir()} == before

    def test_of_a_damaged_file(self, tmp_path):
        path = save("a.safetensors", state(), tmp_path)
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(FormatError):
            ckptavg.convert(path, tmp_path / "o.pt")
        assert not (tmp_path / "o.pt").exists()


def test_it_works_without_torch(tmp_path):
    values = state()
    inputs = {kind: save(kind, values, tmp_path).as_posix() for kind in KINDS}
    code = (
        "import sys; sys.modules['torch'] = None; import ckptavg\n"
        f"for kind, path in {inputs!r}.items():\n"
        "    for end in ('.safetensors', '.pt', '/'):\n"
        "        ckptavg.convert(path, f'{kind}-out{end}')\n"
        "    ckptavg.convert(path, f'{kind}-dcp/', format='dcp')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for kind in inputs:
        ckptavg.convert(tmp_path / f"{kind}-dcp", tmp_path / f"{kind}-again.pt")
        for name in ("out.safetensors", "out.pt", "out", "again.pt"):
            result = load(tmp_path / f"{kind}-{name}")
            assert result.keys() == values.keys()
            assert all(same_bits(result[each], value) for each, value in values.items())
