"""Several averages from one read, and averages that are brought up to date."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg import Selection
from ckptavg.errors import CkptAvgError, OutputError, SelectionError, ValueRangeError
from ckptavg.formats import open_checkpoint
from ckptavg.write.output import Output
from tests.helpers import run
from tests.oracle import naive_mean, random_state_dicts, same_bits, save_run

SCHEMES = "uniform,ema:0.7,linear"


def assert_same_files(one, other):
    """Equal bytes, but for what they say of how they were chosen."""
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys()
    assert all(same_bits(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_is_what_it_would_be_alone(tmp_path, kind, dtype):
    save_run(tmp_path / "run", random_state_dicts(7, dtype), kind)
    summaries = ckptavg.average_many(
        tmp_path / "run", tmp_path / "out", select=Selection(last=[2, 5, 7]), weights=SCHEMES
    )
    assert len(summaries) == len(list((tmp_path / "out").iterdir())) == 9
    for last in (2, 5, 7):
        for scheme, label in (("uniform", "uniform"), ("ema:0.7", "ema0.7"), ("linear", "linear")):
            alone = tmp_path / "alone.safetensors"
            select = Selection(last=last)
            ckptavg.average(tmp_path / "run", alone, select=select, weights=scheme, force=True)
            assert_same_files(tmp_path / "out" / f"last{last}-{label}.safetensors", alone)


def test_the_uniform_ones_are_the_naive_means(tmp_path):
    states = random_state_dicts(6)
    save_run(tmp_path / "run", states)
    ckptavg.average_many(tmp_path / "run", tmp_path / "out", select=Selection(last=[1, 3, 6]))
    for last in (1, 3, 6):
        found = load_file(tmp_path / "out" / f"last{last}-uniform.safetensors")
        for name in ("embed.weight", "scalar", "layer.weight", "empty"):
            assert same_bits(found[name], naive_mean([state[name] for state in states[-last:]]))
        # The counter is the last checkpoint's.
        assert found["layer.num_batches_tracked"] == 50


def test_strided_and_tied_tensors(tmp_path):
    (tmp_path / "run").mkdir()
    states = []
    for step in range(4):
        made = torch.Generator().manual_seed(step)
        tied = torch.randn(40, 30, generator=made)
        state = {"a": tied, "b": tied, "t": torch.randn(50, 20, generator=made).t()}
        torch.save(state, tmp_path / "run" / f"step_{step}.pt")
        states.append(state)
    ckptavg.average_many(
        tmp_path / "run", tmp_path / "out", select=Selection(last=[2, 4]), weights="uniform,linear"
    )
    for last in (2, 4):
        found = load_file(tmp_path / "out" / f"last{last}-uniform.safetensors")
        for name in "abt":
            assert same_bits(found[name], naive_mean([state[name] for state in states[-last:]]))


def test_each_byte_is_read_once(tmp_path, bytes_read):
    save_run(tmp_path / "run", [{"w": torch.randn(700, 1000)} for _ in range(6)])
    ckptavg.average_many(
        tmp_path / "run",
        tmp_path / "out",
        select=Selection(last=[1, 2, 4, 6]),
        weights="uniform,ema:0.9",
    )
    tensors = 6 * 700 * 1000 * 4
    assert tensors <= sum(bytes_read) <= 1.02 * tensors


def test_a_checkpoint_that_only_some_take_may_hold_nan(tmp_path):
    states = [{"w": torch.randn(5)} for _ in range(4)]
    states[0]["w"][2] = float("nan")
    save_run(tmp_path / "run", states)
    ckptavg.average_many(tmp_path / "run", tmp_path / "out", select=Selection(last=[1, 2, 3]))
    with pytest.raises(ValueRangeError, match=r"step_0\.safetensors.*w.*element 2: is nan"):
        ckptavg.average_many(tmp_path / "run", tmp_path / "no", select=Selection(last=[2, 4]))
    assert not (tmp_path / "no").exists()


def test_all_of_them_or_none(tmp_path):
    save_run(tmp_path / "run", random_state_dicts(3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last3-uniform.safetensors").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        ckptavg.average_many(tmp_path / "run", tmp_path / "out", select=Selection(last=[2, 3]))
    assert os.listdir(tmp_path / "out") == ["last3-uniform.safetensors"]
    ckptavg.average_many(
        tmp_path / "run", tmp_path / "out", select=Selection(last=[2, 3]), force=True
    )
    assert len(os.listdir(tmp_path / "out")) == 2


def test_directories_make_directories(tmp_path):
    for step, state in enumerate(random_state_dicts(3)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text("{}")
    ckptavg.average_many(tmp_path / "run", tmp_path / "out", select=Selection(last=[2, 3]))
    names = ["config.json", "model.safetensors"]
    for last in (2, 3):
        assert sorted(os.listdir(tmp_path / "out" / f"last{last}-uniform")) == names


def test_the_command_makes_every_combination(tmp_path):
    save_run(tmp_path / "run", random_state_dicts(4))
    out = tmp_path / "out"
    arguments = ["average", str(tmp_path / "run"), "-o", str(out), "--last", "2,4"]
    result = run(*arguments, "--weights", "uniform,ema:0.9", "--json")
    averages = json.loads(result.stdout)["averages"]
    assert {os.path.basename(one["output"]) for one in averages} == set(os.listdir(out))  # noqa: PTH119
    assert set(os.listdir(out)) == {
        "last2-uniform.safetensors",
        "last2-ema0.9.safetensors",
        "last4-uniform.safetensors",
        "last4-ema0.9.safetensors",
    }
    shares = [source["weight"] for source in averages[1]["sources"]]
    np.testing.assert_allclose(shares, [0.9, 0.1])


def test_a_dry_run_prints_weights_and_what_decay_they_emulate(tmp_path):
    save_run(tmp_path / "run", random_state_dicts(4))
    result = run(
        "average", tmp_path / "run", "-o", tmp_path / "o.pt", "-n", "--weights", "decay:1-sqrt"
    )
    lines = result.stdout.splitlines()
    assert "weight 0.5" in lines[0]
    assert "emulated decay 1" in lines[0]
    assert "emulated decay 0.5" in lines[1]
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--last", "2,x"],
        ["--last", "0"],
        ["--last", ""],
        ["--last", "2,3", "--update"],
        ["--weights", "uniform,linear", "--model", "m:M", "--loader", "m:L"],
    ],
    ids=str,
)
def test_wrong_usage(tmp_path, arguments):
    save_run(tmp_path / "run", random_state_dicts(2))
    out = str(tmp_path / "out")
    run("average", tmp_path / "run", "-o", out, *arguments, code=2)


def test_no_normalize_takes_weights_as_they_are(tmp_path):
    states = random_state_dicts(2)
    save_run(tmp_path / "run", states)
    out = tmp_path / "o.safetensors"
    ckptavg.average(tmp_path / "run", out, weights="0.5,2", normalize=False)
    expected = states[0]["scalar"].double() * 0.5 + states[1]["scalar"].double() * 2
    assert same_bits(load_file(out)["scalar"], expected.float())


def test_weights_by_path(tmp_path):
    states = random_state_dicts(3)
    save_run(tmp_path / "run", states)
    out = tmp_path / "o.safetensors"
    ckptavg.average(
        tmp_path / "run", out, weights=f"step_2.safetensors=1,{tmp_path}/run/step_0.safetensors=3"
    )
    expected = states[0]["scalar"].double() * 3 + states[2]["scalar"].double()
    assert same_bits(load_file(out)["scalar"], (expected / 4).float())


class TestUpdate:
    @pytest.fixture(params=[torch.float32, torch.float64])
    def run(self, request, tmp_path):
        states = random_state_dicts(6, request.param)
        save_run(tmp_path / "run", states)

    @pytest.mark.usefixtures("run")
    def test_is_the_average_of_all(self, tmp_path):
        swa, out, once = (tmp_path / f"{name}.safetensors" for name in ("swa", "out", "once"))
        new = [tmp_path / "run" / f"step_{step}.safetensors" for step in (4, 5)]
        ckptavg.average(tmp_path / "run", swa, select=Selection(steps="0:3"))
        summary = ckptavg.average([swa, *new], out, update=True)
        ckptavg.average(tmp_path / "run", once)
        found, wanted, earlier = load_file(out), load_file(once), load_file(swa)
        for name, value in wanted.items():
            if value.is_floating_point():
                array = value.numpy()
                # Where new values cancel the old ones, the old average's rounding is what is left.
                gap = np.spacing(np.maximum(np.abs(array), np.abs(earlier[name].numpy())))
                assert (np.abs(found[name].numpy() - array) <= gap).all(), name
            else:
                assert torch.equal(found[name], value)
        made = open_checkpoint(out).provenance
        assert made is not None
        assert [source["name"] for source in made["sources"]] == [
            f"step_{step}.safetensors" for step in range(6)
        ]
        assert {source["weight"] for source in made["sources"]} == {1}
        assert made["divisor"] == 6
        assert made["scheme"] == summary.scheme == "uniform"

    @pytest.mark.usefixtures("run")
    def test_in_its_own_place(self, tmp_path):
        swa = tmp_path / "swa.safetensors"
        ckptavg.average(tmp_path / "run", swa, select=Selection(steps="0:3"))
        new = tmp_path / "run" / "step_4.safetensors"
        with pytest.raises(OutputError):
            ckptavg.average([swa, new], swa, update=True)
        ckptavg.average([swa, new], swa, update=True, force=True)
        ckptavg.average(
            [swa, tmp_path / "run" / "step_5.safetensors"], swa, update=True, force=True
        )
        made = open_checkpoint(swa).provenance
        assert made is not None
        assert len(made["sources"]) == 6

    @pytest.mark.usefixtures("run")
    def test_refuses_what_is_in_it_already(self, tmp_path):
        swa = tmp_path / "swa.safetensors"
        ckptavg.average(tmp_path / "run", swa)
        new = tmp_path / "run" / "step_3.safetensors"
        with pytest.raises(SelectionError, match=r"contains .*step_3\.safetensors already"):
            ckptavg.average([swa, new], tmp_path / "o.safetensors", update=True)

    def test_is_stale_again(self, tmp_path):
        states = [{"bn.running_mean": torch.ones(2) * step} for step in range(3)]
        save_run(tmp_path / "run", states)
        swa = tmp_path / "swa.safetensors"
        ckptavg.average(tmp_path / "run", swa, select=Selection(steps="0,1"))
        new = tmp_path / "run" / "step_2.safetensors"
        summary = ckptavg.average([swa, new], tmp_path / "o.safetensors", update=True)
        assert summary.norm_stats == "stale"

    def test_what_cannot_be_updated(self, tmp_path):
        save_run(tmp_path / "run", random_state_dicts(3, torch.bfloat16))
        new = tmp_path / "run" / "step_2.safetensors"
        out = tmp_path / "o.safetensors"
        for weights, message in (("uniform", "bfloat16"), ("ema:0.5", "not a uniform average")):
            swa = tmp_path / f"swa_{weights[:3]}.safetensors"
            ckptavg.average(tmp_path / "run", swa, select=Selection(steps="0,1"), weights=weights)
            with pytest.raises(SelectionError, match=message):
                ckptavg.average([swa, new], out, update=True)
        with pytest.raises(SelectionError, match="there are 0"):
            ckptavg.average(tmp_path / "run", out, update=True)
        save_run(tmp_path / "other", random_state_dicts(2))
        alone = tmp_path / "alone.safetensors"
        ckptavg.average(tmp_path / "other", alone)
        with pytest.raises(SelectionError, match="no checkpoints to add"):
            ckptavg.average(alone, out, update=True)
        with pytest.raises(SelectionError, match="uniform average can be updated"):
            ckptavg.average(
                [tmp_path / "swa_uni.safetensors", new], out, update=True, weights="linear"
            )
        assert not out.exists()

    def test_of_another_model_is_a_mismatch(self, tmp_path):
        save_run(tmp_path / "run", random_state_dicts(2))
        swa = tmp_path / "swa.safetensors"
        ckptavg.average(tmp_path / "run", swa)
        save_file({"v": torch.ones(2)}, tmp_path / "step_9.safetensors")
        inputs = [swa, tmp_path / "step_9.safetensors"]
        with pytest.raises(CkptAvgError, match="do not have the same tensors"):
            ckptavg.average(inputs, tmp_path / "o.safetensors", update=True)

    @pytest.fixture
    def counted(self, tmp_path):
        """Five checkpoints with a counter, which is the last one's in an average."""
        for number in range(1, 6):
            state = {"w": torch.full((3,), float(number)), "n": torch.tensor(100 * number)}
            path = tmp_path / "run" / f"step_{100 * number}.pt"
            path.parent.mkdir(exist_ok=True)
            torch.save({"model": state, "global_step": 100 * number}, path)
        return tmp_path / "run"

    def test_in_whatever_order(self, counted, tmp_path):
        swa, out = tmp_path / "swa.safetensors", tmp_path / "out.safetensors"
        ckptavg.average(counted, swa, select=Selection(steps="400,500"))
        ckptavg.average([swa, counted / "step_100.pt", counted / "step_300.pt"], out, update=True)
        found = load_file(out)
        assert found["w"].tolist() == [3.25] * 3
        assert found["n"] == 500
        made = open_checkpoint(out).provenance
        assert made is not None
        names = [source["name"] for source in made["sources"]]
        assert names == [f"step_{n}.pt" for n in (100, 300, 400, 500)]

    def test_only_means_are_brought_up_to_date(self, counted, tmp_path):
        total, mean, out = (tmp_path / f"{n}.safetensors" for n in ("total", "mean", "out"))
        new = counted / "step_300.pt"
        rules = Selection(steps="100,200")
        ckptavg.average(counted, total, select=rules, normalize=False)
        ckptavg.average(counted, mean, select=rules)
        with pytest.raises(SelectionError, match="is not a mean"):
            ckptavg.average([total, new], out, update=True)
        with pytest.raises(SelectionError, match="only a mean"):
            ckptavg.average([mean, new], out, update=True, normalize=False)
        assert not out.exists()

    def test_members_are_known_by_what_they_hold(self, counted, tmp_path):
        swa, out = tmp_path / "swa.safetensors", tmp_path / "out.safetensors"
        ckptavg.average(counted, swa, select=Selection(steps="100:300:100"))
        (tmp_path / "copy.pt").write_bytes((counted / "step_300.pt").read_bytes())
        (tmp_path / "link.pt").symlink_to(counted / "step_200.pt")
        state = torch.load(counted / "step_100.pt")["model"]
        save_file(state, tmp_path / "other.safetensors")
        for name in ("copy.pt", "link.pt", "other.safetensors"):
            with pytest.raises(SelectionError, match=f"contains .*{name} already"):
                ckptavg.average([swa, tmp_path / name], out, update=True)
        # Of the same name, and another.
        (tmp_path / "again").mkdir()
        fresh = tmp_path / "again" / "step_300.pt"
        torch.save({"model": {"w": torch.ones(3), "n": torch.tensor(7)}, "global_step": 9}, fresh)
        ckptavg.average([swa, fresh], out, update=True)
        assert load_file(out)["n"] == 300

    def test_rules_are_for_the_new_ones(self, counted, tmp_path):
        swa, out = tmp_path / "swa.safetensors", tmp_path / "out.safetensors"
        ckptavg.average(counted, swa, select=Selection(steps="100:300:100"))
        for rules in (Selection(start=400), Selection(include=["step_[45]*"])):
            ckptavg.average([swa, counted], out, update=True, select=rules, force=True)
            assert load_file(out)["w"].tolist() == [3.0] * 3


def test_each_says_how_it_was_chosen(tmp_path):
    save_run(tmp_path / "run", random_state_dicts(4))
    ckptavg.average_many(tmp_path / "run", tmp_path / "out", select=Selection(last=[2, 3]))
    ckptavg.average(tmp_path / "run", tmp_path / "one.safetensors", select=Selection(last=3))
    several = (tmp_path / "out" / "last3-uniform.safetensors").read_bytes()
    assert several == (tmp_path / "one.safetensors").read_bytes()


def test_fewer_than_asked_for_is_said(tmp_path, caplog):
    save_run(tmp_path / "run", random_state_dicts(2))
    with caplog.at_level("INFO", "ckptavg"):
        ckptavg.average_many(tmp_path / "run", tmp_path / "out", select=Selection(last=[1, 9]))
    assert "there are only 2 of the last 9" in caplog.text


def test_notices_of_the_selection_come_once_for_several_schemes(tmp_path, caplog):
    save_run(tmp_path / "run", random_state_dicts(2))
    with caplog.at_level("INFO", "ckptavg"):
        ckptavg.average_many(
            tmp_path / "run",
            tmp_path / "out",
            weights="uniform,linear,ema:0.9",
            select=Selection(last=[1, 9]),
        )
    assert caplog.text.count("there are only 2 of the last 9") == 1


def test_names_taken_meanwhile_leave_none(tmp_path, monkeypatch):
    save_run(tmp_path / "run", random_state_dicts(3))
    out = tmp_path / "out"
    original = Output.publish

    def publish(sink):
        if sink.path.name.startswith("last3"):
            sink.path.write_text("somebody else")
        original(sink)

    monkeypatch.setattr(Output, "publish", publish)
    with pytest.raises(OutputError, match="exists already"):
        ckptavg.average_many(tmp_path / "run", out, select=Selection(last=[2, 3]))
    assert os.listdir(out) == ["last3-uniform.safetensors"]


def test_many_outputs_take_little_memory(tmp_path):
    save_run(tmp_path / "run", random_state_dicts(3))
    few = ckptavg.average_many(
        tmp_path / "run", tmp_path / "a", select=Selection(last=[2]), dry_run=True
    )
    many = ckptavg.average_many(
        tmp_path / "run",
        tmp_path / "a",
        select=Selection(last=[1, 2, 3]),
        weights=SCHEMES,
        dry_run=True,
    )
    assert few[0].memory < many[0].memory < 128 << 20
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("output", ["memory://x/", "out.safetensors"])
def test_several_outputs_need_a_directory_here(tmp_path, output):
    save_run(tmp_path / "run", random_state_dicts(3))
    place = output if "://" in output else tmp_path / output
    with pytest.raises(OutputError):
        ckptavg.average_many(tmp_path / "run", place, select=Selection(last=[2, 3]))
