"""The main job: the average of a directory, held against torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model

import ckptavg
from ckptavg.errors import (
    FormatError,
    MismatchError,
    OutputError,
    SelectionError,
    ValueRangeError,
)
from tests.helpers import run
from tests.oracle import naive_mean, random_state_dicts, same_bits, save_run

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def provenance(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as opened:
        return dict(json.loads(opened.metadata()["ckptavg"]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equals_a_naive_float64_mean_bit_for_bit(tmp_path, dtype, kind, count):
    states = random_state_dicts(count, dtype)
    save_run(tmp_path / "run", states, kind)
    ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    for result in (load_file(tmp_path / "out.safetensors"), torch.load(tmp_path / "out.pt")):
        assert result.keys() == states[0].keys()
        for name in states[0]:
            column = [state[name] for state in states]
            wanted = naive_mean(column) if column[0].is_floating_point() else column[-1]
            assert same_bits(result[name], wanted), name


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.complex64,
    ],
    ids=str,
)
def test_averages_every_other_dtype_as_torch_casts(tmp_path, dtype):
    states = [
        {
            "w": torch.randn(4000, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(
                dtype
            )
        }
        for _ in range(3)
    ]
    save_run(tmp_path / "run", states)
    ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    result = load_file(tmp_path / "out.safetensors")["w"]
    assert same_bits(result, naive_mean([state["w"] for state in states]))


def test_complex128_goes_to_a_torch_file_and_not_to_safetensors(tmp_path):
    states = [{"w": torch.randn(5, dtype=torch.complex128)} for _ in range(3)]
    save_run(tmp_path / "run", states, "pt")
    with pytest.raises(OutputError, match=r"w: safetensors has no complex128; write a \.pt"):
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
    assert same_bits(torch.load(tmp_path / "out.pt")["w"], naive_mean([s["w"] for s in states]))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_copies_of_one_checkpoint_give_its_bits(tmp_path, dtype):
    state = {"w": torch.randn(100_000).to(dtype), "zero": torch.tensor([-0.0, 0.0]).to(dtype)}
    for step in range(5):
        # Copies count once: one tensor tells them apart.
        named = state | {"step": torch.tensor(float(step))}
        save_file(named, tmp_path / f"{step}.safetensors")
    summary = ckptavg.average(tmp_path, tmp_path / "out.safetensors")
    assert len(summary.sources) == 5
    result = load_file(tmp_path / "out.safetensors")
    assert all(same_bits(result[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_equals_averaged_model_of_torch(tmp_path, kind):
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3),
            torch.nn.BatchNorm2d(16),
            torch.nn.Flatten(),
            torch.nn.LazyLinear(5),
        )

    torch.manual_seed(0)
    averaged, states = None, []
    for _ in range(6):
        one = model()
        one(torch.randn(8, 3, 8, 8))
        if averaged is None:
            averaged = torch.optim.swa_utils.AveragedModel(one, use_buffers=True)
        averaged.update_parameters(one)
        states.append(one.state_dict())
    save_run(tmp_path / "run", states, kind)
    ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    result = load_file(tmp_path / "out.safetensors")
    assert averaged is not None
    wanted = averaged.module.state_dict()
    assert result.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.is_floating_point():
            assert (result[name] - value).abs().max() <= 1e-6 * value.abs().max(), name
    model().load_state_dict(result)


def test_weights_are_normalised_and_zero_weights_are_not_read(tmp_path):
    states = [{"w": torch.randn(1000)} for _ in range(3)]
    states[1]["w"][5] = float("nan")
    save_run(tmp_path / "run", states)
    ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", weights=[1, 0, 3])
    wanted = (states[0]["w"].double() + 3 * states[2]["w"].double()) / 4
    assert same_bits(load_file(tmp_path / "out.safetensors")["w"], wanted.float())
    entry = provenance(tmp_path / "out.safetensors")
    assert [source["weight"] for source in entry["sources"]] == [1, 3]
    assert entry["divisor"] == 4


@pytest.mark.parametrize(
    "weights", [[1, 2], [1, -1, 0], [1, float("nan"), 1], [1, float("inf"), 1]]
)
def test_weights_that_make_no_average_are_refused(tmp_path, weights):
    save_run(tmp_path / "run", [{"w": torch.randn(3)} for _ in range(3)])
    with pytest.raises(SelectionError, match="weights"):
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", weights=weights)


def test_negative_weights_must_not_make_a_variance_negative(tmp_path):
    states = [
        {"bn.running_var": torch.tensor([1.0, value]), "bn.weight": torch.tensor([1.0, value])}
        for value in (1.0, 5.0)
    ]
    save_run(tmp_path / "run", states)
    with pytest.raises(ValueRangeError, match=r"bn\.running_var: element 1: .*negative"):
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", weights=[3, -1])
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_dtype_rounds_floats_as_torch_does(tmp_path, dtype):
    states = random_state_dicts(3)
    save_run(tmp_path / "run", states)
    ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", dtype=dtype)
    result = load_file(tmp_path / "out.safetensors")
    for name in ("embed.weight", "scalar", "layer.bias"):
        first, second, third = (state[name].double() for state in states)
        wanted = ((first + second + third) / 3).to(getattr(torch, dtype))
        assert same_bits(result[name], wanted), name
    assert result["layer.ids"].dtype == torch.int64


def test_norm_statistics_of_the_last_checkpoint_on_request(tmp_path):
    states = [{"bn.running_mean": torch.randn(4), "bn.weight": torch.randn(4)} for _ in range(3)]
    save_run(tmp_path / "run", states)
    ckptavg.average(
        tmp_path / "run", tmp_path / "out.safetensors", norm_stats="last", dtype="float64"
    )
    result = load_file(tmp_path / "out.safetensors")
    assert torch.equal(result["bn.running_mean"], states[-1]["bn.running_mean"].double())


def test_norm_statistics_are_marked_stale(tmp_path):
    save_run(tmp_path / "run", [{"bn.running_mean": torch.randn(4)} for _ in range(2)])
    assert ckptavg.average(tmp_path / "run", tmp_path / "a.safetensors").norm_stats == "stale"
    assert provenance(tmp_path / "a.safetensors")["norm_stats"] == {"state": "stale"}
    save_run(tmp_path / "other", [{"weight": torch.randn(4)} for _ in range(2)])
    assert ckptavg.average(tmp_path / "other", tmp_path / "b.safetensors").norm_stats == "none"


class TestNormStatisticsOfACopy:
    """The statistics of one checkpoint belong to its weights."""

    def averaged(self, tmp_path, *inputs, **options):
        output = tmp_path / f"o{len(list(tmp_path.iterdir()))}.safetensors"
        summary = ckptavg.average(inputs, output, **options)
        assert provenance(output)["norm_stats"]["state"] == summary.norm_stats
        return output, summary.norm_stats

    @pytest.fixture
    def run(self, tmp_path):
        save_run(tmp_path / "run", [{"bn.running_mean": torch.randn(4)} for _ in range(3)])
        return tmp_path / "run"

    def test_are_kept(self, run, tmp_path):
        output, state = self.averaged(tmp_path, run / "step_1.safetensors")
        assert state == "kept"
        assert self.averaged(tmp_path, output) == (tmp_path / "o2.safetensors", "kept")

    def test_are_kept_where_one_has_all_the_weight(self, run, tmp_path):
        assert self.averaged(tmp_path, run, weights=[0, 2, 0])[1] == "kept"
        assert self.averaged(tmp_path, run, weights=[0, 2, 1])[1] == "stale"

    def test_are_kept_where_all_are_copies_of_it(self, run, tmp_path):
        for number in (4, 5):
            name = f"step_{number}.safetensors"
            (tmp_path / "run" / name).write_bytes((run / "step_2.safetensors").read_bytes())
        copies = [run / f"step_{number}.safetensors" for number in (2, 4, 5)]
        assert self.averaged(tmp_path, *copies)[1] == "kept"

    def test_are_stale_where_the_weights_are_scaled(self, run, tmp_path):
        step = run / "step_1.safetensors"
        assert self.averaged(tmp_path, step, weights=[0.5], normalize=False)[1] == "stale"
        assert self.averaged(tmp_path, step, weights=[1], normalize=False)[1] == "kept"

    def test_have_the_state_that_an_average_of_ours_records(self, run, tmp_path):
        average, state = self.averaged(tmp_path, run)
        assert state == "stale"
        assert self.averaged(tmp_path, average)[1] == "stale"
        refreshed = {"state": "refreshed", "samples": 7}
        entry = {**provenance(average), "norm_stats": refreshed}
        save_file(load_file(average), average, metadata={"ckptavg": json.dumps(entry)})
        output, state = self.averaged(tmp_path, average)
        assert state == "refreshed"
        assert provenance(output)["norm_stats"] == refreshed

    @pytest.mark.parametrize("entry", [None, 3, "stale", {}, {"state": 3}], ids=str)
    def test_are_kept_where_that_is_damaged(self, entry, run, tmp_path):
        step = run / "step_1.safetensors"
        metadata = {"ckptavg": json.dumps({"norm_stats": entry})}
        save_file(load_file(step), step, metadata=metadata)
        assert self.averaged(tmp_path, step)[1] == "kept"

    def test_are_told_apart_among_several_averages(self, run, tmp_path):
        summaries = ckptavg.average_many(
            run, tmp_path / "many", select=ckptavg.Selection(last=[1, 2])
        )
        assert [summary.norm_stats for summary in summaries] == ["kept", "stale"]
        for summary in summaries:
            assert provenance(Path(summary.output))["norm_stats"] == {"state": summary.norm_stats}


class TestIntegers:
    def test_counters_are_the_last_checkpoints(self, tmp_path):
        states = [{"bn.num_batches_tracked": torch.tensor(value)} for value in (5, 9, 7)]
        save_run(tmp_path / "run", states)
        summary = ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        result = load_file(tmp_path / "out.safetensors")["bn.num_batches_tracked"]
        assert same_bits(result, torch.tensor(7))
        assert summary.roles == {"last": 1}

    def test_equal_ones_are_kept(self, tmp_path):
        states = [
            {"ids": torch.arange(10), "mask": torch.tensor([True, False]), "n": torch.tensor(3)}
            for _ in range(2)
        ]
        for state, value in zip(states, (1.0, 2.0), strict=True):
            state["w"] = torch.tensor(value)
        save_run(tmp_path / "run", states)
        summary = ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        assert summary.roles == {"averaged": 1, "kept": 3}
        assert torch.equal(load_file(tmp_path / "out.safetensors")["ids"], torch.arange(10))

    def test_differing_tensors_are_all_named(self, tmp_path):
        states = [
            {"a": torch.tensor([1, step]), "b": torch.tensor([2, step]).to(torch.uint8)}
            for step in range(3)
        ]
        save_run(tmp_path / "run", states)
        with pytest.raises(MismatchError) as caught:
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        assert len(caught.value.differences) == 2
        assert "ints=last" in str(caught.value)
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", ints="last")
        assert load_file(tmp_path / "out.safetensors")["a"].tolist() == [1, 2]

    def test_a_difference_far_into_a_large_tensor_is_found(self, tmp_path):
        big = torch.zeros(1_000_003, dtype=torch.int16)
        other = big.clone()
        other[-1] = 1
        save_run(
            tmp_path / "run", [{"a": big, "w": torch.ones(1)}, {"a": other, "w": torch.zeros(1)}]
        )
        with pytest.raises(MismatchError, match="a: int16"):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")


class TestMismatches:
    def test_lists_all_differences_and_leaves_nothing(self, tmp_path):
        run = tmp_path / "run"
        save_run(
            run,
            [
                {
                    "same": torch.ones(2),
                    "shape": torch.ones(64),
                    "dtype": torch.ones(2),
                    "mine": torch.ones(1),
                },
                {
                    "same": torch.ones(2),
                    "shape": torch.ones(64, 1),
                    "dtype": torch.ones(2).half(),
                    "yours": torch.ones(1),
                },
            ],
        )
        out = tmp_path / "out"
        out.mkdir()
        with pytest.raises(MismatchError) as caught:
            ckptavg.average(run, out / "o.safetensors")
        text = str(caught.value)
        assert len(caught.value.differences) == 5  # and how many tensors differ
        assert "shape: shape (64,) in" in text
        assert "(64, 1) in" in text
        assert "dtype: float32 in" in text
        assert "mine: missing in" in text
        assert "yours: missing in" in text
        assert str(run / "step_1.safetensors") in text
        assert list(out.iterdir()) == []

    def test_a_lacking_tensor_is_never_averaged_over_fewer(self, tmp_path):
        save_run(tmp_path / "run", [{"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)}])
        with pytest.raises(MismatchError, match=r"b: missing in .*step_1.*, present in .*step_0"):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")


class TestTiedWeights:
    def states(self) -> list[dict[str, torch.Tensor]]:
        made = []
        for _ in range(3):
            shared = torch.randn(30, 4)
            made.append({"lm_head.weight": shared, "embed.weight": shared, "bias": torch.randn(4)})
        return made

    def test_all_names_stay_and_a_torch_file_keeps_the_sharing(self, tmp_path):
        states = self.states()
        save_run(tmp_path / "run", states, "pt")
        summary = ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        result = torch.load(tmp_path / "out.pt")
        assert result["lm_head.weight"].data_ptr() == result["embed.weight"].data_ptr()
        wanted = naive_mean([state["embed.weight"] for state in states])
        flat = load_file(tmp_path / "out.safetensors")
        for name in ("lm_head.weight", "embed.weight"):
            assert same_bits(result[name], wanted)
            assert same_bits(flat[name], wanted)
        assert summary.roles == {"averaged": 2}

    def test_aliases_can_be_dropped_as_save_model_drops_them(self, tmp_path):
        class Tied(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = torch.nn.Embedding(7, 3)
                self.head = torch.nn.Linear(3, 7, bias=False)
                self.head.weight = self.embed.weight

        models = [Tied() for _ in range(2)]
        save_run(tmp_path / "run", [model.state_dict() for model in models], "pt")
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", drop_aliases=True)
        save_model(models[0], str(tmp_path / "reference.safetensors"))
        with (
            safe_open(tmp_path / "out.safetensors", "pt") as mine,
            safe_open(tmp_path / "reference.safetensors", "pt") as theirs,
        ):
            assert list(mine.keys()) == list(theirs.keys())
            aliases = {k: v for k, v in mine.metadata().items() if k not in ("ckptavg", "format")}
            assert aliases == {k: v for k, v in theirs.metadata().items() if k != "format"}
        fresh = Tied()
        load_model(fresh, str(tmp_path / "out.safetensors"))
        wanted = naive_mean([model.embed.weight.detach() for model in models])
        assert same_bits(fresh.head.weight.detach(), wanted)

    @pytest.mark.parametrize("container", ["weights", "last"])
    def test_aliases_are_not_dropped_in_a_torch_file(self, tmp_path, container):
        save_run(tmp_path / "run", random_state_dicts(2), "pt")
        with pytest.raises(
            OutputError, match=r"out\.pt: torch's own layouts have tied tensors once: "
        ):
            ckptavg.average(
                tmp_path / "run", tmp_path / "out.pt", drop_aliases=True, container=container
            )
        assert not (tmp_path / "out.pt").exists()

    def test_alias_metadata_of_the_inputs_is_carried_over(self, tmp_path):
        for step in range(2):
            save_file(
                {"embed.weight": torch.randn(3)},
                tmp_path / f"{step}.safetensors",
                {"lm_head.weight": "embed.weight", "format": "pt"},
            )
        ckptavg.average(tmp_path, tmp_path / "out.safetensors")
        with safe_open(tmp_path / "out.safetensors", "pt") as opened:
            assert opened.metadata()["lm_head.weight"] == "embed.weight"

    def test_empty_tensors_are_strangers(self, tmp_path):
        """In a safetensors file all of them are at one place, which is none."""
        states = [{"a": torch.empty(0), "b": torch.empty(0), "c": torch.randn(2)} for _ in range(2)]
        save_run(tmp_path / "run", states)
        summary = ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", drop_aliases=True)
        assert summary.tensors == 3

    def test_names_that_are_tied_in_one_checkpoint_only_are_not_tied(self, tmp_path):
        shared = torch.randn(5)
        states = [
            {"a": shared, "b": shared},
            {"a": torch.randn(5), "b": torch.randn(5)},
        ]
        save_run(tmp_path / "run", states, "pt")
        ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
        result = torch.load(tmp_path / "out.pt")
        for name in ("a", "b"):
            assert same_bits(result[name], naive_mean([state[name] for state in states]))


class TestStrides:
    @pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
    def test_any_layout_averages_to_the_same(self, tmp_path, output):
        base = [torch.randn(64, 100) for _ in range(3)]
        images = [torch.randn(8, 3, 5, 5) for _ in range(3)]
        states = [
            {
                "transposed": b.t(),
                "columns": b[:, 10:20],
                "rows": b[5:9],
                "every_other": b[::2, ::3],
                "expanded": b[:1].expand(4, 100),
                "image": i.to(memory_format=torch.channels_last),
                "large": b.repeat(30, 20).t(),
                "half": b.half().t(),
                "ints": torch.arange(12).view(3, 4).t(),
            }
            for b, i in zip(base, images, strict=True)
        ]
        save_run(tmp_path / "run", states, "pt")
        ckptavg.average(tmp_path / "run", tmp_path / output)
        path = tmp_path / output
        result = torch.load(path) if output.endswith(".pt") else load_file(path)
        for name in states[0]:
            column = [state[name] for state in states]
            wanted = naive_mean(column) if column[0].is_floating_point() else column[0]
            assert same_bits(result[name], wanted), name

    def test_layouts_that_differ_between_checkpoints(self, tmp_path):
        values = [torch.randn(300, 500) for _ in range(3)]
        states = [{"w": values[0]}, {"w": values[1].t().contiguous().t()}, {"w": values[2]}]
        save_run(tmp_path / "run", states, "pt")
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        assert same_bits(load_file(tmp_path / "out.safetensors")["w"], naive_mean(values))

    def test_nan_in_a_strided_tensor_is_found(self, tmp_path):
        states = [{"w": torch.randn(30, 40).t()} for _ in range(2)]
        states[1]["w"][3, 4] = float("nan")
        save_run(tmp_path / "run", states, "pt")
        with pytest.raises(ValueRangeError, match=r"step_1\.pt: w: is nan"):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")


class TestNonFinite:
    @pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e5m2, torch.complex64], ids=str)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_names_file_and_tensor(self, tmp_path, dtype, value):
        states = [{"a": torch.ones(500), "b": torch.ones(300_000).to(dtype)} for _ in range(3)]
        states[1]["b"][200_123] = value
        save_run(tmp_path / "run", states)
        with pytest.raises(ValueRangeError, match=r"step_1\.safetensors: b: element 200123: is"):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", allow_nonfinite=True)
        result = load_file(tmp_path / "out.safetensors")["b"]
        assert not bool(torch.isfinite(result[200_123].to(torch.complex64)))

    def test_infinities_that_cancel_are_found(self, tmp_path):
        states = [{"w": torch.tensor([value])} for value in (float("inf"), float("-inf"))]
        save_run(tmp_path / "run", states)
        with pytest.raises(ValueRangeError):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")

    @pytest.mark.parametrize("weights", ["uniform", [2, -1, 1]])
    def test_the_same_value_everywhere_stays(self, tmp_path, weights):
        mask = torch.zeros(400, 400).masked_fill(torch.ones(400, 400).triu(1).bool(), float("-inf"))
        mask[0, 0] = float("nan")
        states = [{"mask": mask, "w": torch.randn(3)} for _ in range(3)]
        save_run(tmp_path / "run", states)
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", weights=weights)
        result = load_file(tmp_path / "out.safetensors")["mask"]
        assert torch.equal(result.nan_to_num(nan=5.0), mask.nan_to_num(nan=5.0))

    def test_a_mean_that_overflows_the_output_is_an_error(self, tmp_path):
        save_run(tmp_path / "run", [{"w": torch.tensor([1.0, value])} for value in (1e5, 2e5)])
        with pytest.raises(
            ValueRangeError, match=r"w: element 1: the average does not fit float16"
        ):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", dtype="float16")

    @pytest.mark.parametrize("allowed", [False, True])
    @pytest.mark.parametrize("weights", ["uniform", [3, 1, 2]])
    def test_a_mean_that_fits_though_its_sum_does_not(self, tmp_path, weights, allowed):
        rows = [[1.7e308, 1.0, 1e308], [1.6e308, 2.0, 1.7e308], [-1.5e308, 3.0, 1.6e308]]
        save_run(tmp_path / "run", [{"w": torch.tensor(row, dtype=torch.float64)} for row in rows])
        output = tmp_path / "out.safetensors"
        ckptavg.average(tmp_path / "run", output, weights=weights, allow_nonfinite=allowed)
        factors = [1, 1, 1] if weights == "uniform" else weights
        exact = [
            sum(n * Fraction(x) for n, x in zip(factors, column, strict=True)) / sum(factors)
            for column in zip(*rows, strict=True)
        ]
        wanted = torch.tensor([float(value) for value in exact], dtype=torch.float64)
        torch.testing.assert_close(load_file(output)["w"], wanted, rtol=4e-16, atol=0)

    def test_a_mean_of_float64_that_does_not_fit_is_an_error(self, tmp_path):
        states = [{"w": torch.tensor([x], dtype=torch.float64)} for x in (1e308, 1.5e308)]
        save_run(tmp_path / "run", states)
        for allowed in (False, True):
            with pytest.raises(ValueRangeError, match="the average does not fit float64"):
                ckptavg.average(
                    tmp_path / "run", tmp_path / "out.safetensors", weights=[1, 1],
                    normalize=False, allow_nonfinite=allowed,
                )  # fmt: skip

    def test_an_overflow_everywhere_is_one_too(self, tmp_path):
        save_run(tmp_path / "run", [{"w": torch.tensor([1e5]), "x": torch.randn(1)} for _ in "ab"])
        with pytest.raises(ValueRangeError, match="does not fit float16"):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", dtype="float16")

    def test_an_infinity_that_the_output_cannot_hold(self, tmp_path):
        states = [{"w": torch.tensor([float("inf")]), "x": torch.randn(1)} for _ in range(2)]
        save_run(tmp_path / "run", states)
        with pytest.raises(ValueRangeError, match="does not fit float8_e4m3fn"):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", dtype="float8_e4m3fn")

    @pytest.mark.parametrize("dtype", [None, "float64"])
    def test_nan_in_the_last_checkpoints_statistics(self, tmp_path, dtype):
        states = [{"bn.running_mean": torch.randn(3)} for _ in range(3)]
        states[2]["bn.running_mean"][1] = float("nan")
        save_run(tmp_path / "run", states)
        with pytest.raises(ValueRangeError, match=r"step_2\.safetensors: bn\.running_mean"):
            ckptavg.average(
                tmp_path / "run", tmp_path / "out.safetensors", norm_stats="last", dtype=dtype
            )

    def test_many_of_them_take_no_time_when_allowed(self, tmp_path):
        states = [{"w": torch.randn(131_072)} for _ in range(2)]
        states[1]["w"][:] = float("nan")
        save_run(tmp_path / "run", states)
        started = time.process_time()
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", allow_nonfinite=True)
        assert time.process_time() - started < 30


class TestQuantised:
    @pytest.mark.parametrize(
        "state",
        [
            {"w": torch.ones(4).to(torch.float8_e4m3fn), "w_scale": torch.ones(1)},
            {
                "a.weight": torch.ones(4).to(torch.float8_e4m3fn),
                "a.weight_scale_inv": torch.ones(1),
            },
            {"a.qweight": torch.ones(4, dtype=torch.int32), "a.scales": torch.ones(1)},
            {"a.weight": torch.ones(4, dtype=torch.uint8), "a.weight.absmax": torch.ones(1)},
            {"a.weight": torch.ones(4, dtype=torch.int8), "a.SCB": torch.ones(1)},
            {"a.weight": torch.ones(4).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(1)},
            {"weight": torch.ones(4, dtype=torch.int8), "weight_scale": torch.ones(1)},
            {"a.W_q": torch.ones(4, dtype=torch.uint8), "a.scale": torch.ones(1)},
            {"a.weight._data": torch.ones(4, dtype=torch.int8), "a.weight._scale": torch.ones(1)},
            {"a._weight_qdata": torch.ones(4).char(), "a._weight_scale": torch.ones(1)},
            {"a.up_blocks": torch.ones(4).byte(), "a.up_scales": torch.ones(4).byte()},
            {"a.weight": torch.ones(4).byte(), "a.weight_scale_2": torch.ones(1)},
            {"a.q_weight": torch.ones(4).int(), "a.q_scale": torch.ones(1).int()},
            {
                "a.codes": torch.ones(4).short(),
                "a.codebooks": torch.ones(4),
                "a.scales": torch.ones(1),
            },
            {
                "a.codes": torch.ones(4).char(),
                "a.codebooks": torch.ones(4),
                "a.scales": torch.ones(1),
            },
            {"a.trellis": torch.ones(4).short(), "a.suh": torch.ones(4), "a.svh": torch.ones(4)},
            {"a.Qidxs": torch.ones(4).long(), "a.SU": torch.ones(4), "a.SV": torch.ones(4)},
        ],
        ids=lambda state: next(iter(state)),
    )
    @pytest.mark.parametrize("ints", ["equal", "last"])
    def test_codes_with_scales_are_refused(self, tmp_path, state, ints):
        unlike = [state | {"z": torch.full((1,), value)} for value in (1.0, 2.0)]
        save_run(tmp_path / "run", unlike)
        with pytest.raises(FormatError, match="quantised"):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", ints=ints)

    def test_a_scale_beside_plain_weights_or_a_mask_is_a_parameter(self, tmp_path):
        states = [
            {
                "norm.scale": torch.randn(2),
                "norm.weight": torch.randn(2),
                "norm.mask": torch.ones(2, dtype=torch.uint8),
            }
            for _ in range(2)
        ]
        save_run(tmp_path / "run", states)
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")


def test_metadata_that_are_true_of_the_last_checkpoint_alone_go(tmp_path):
    (tmp_path / "run").mkdir()
    untrue = (
        "sshs_model_hash",
        "sshs_legacy_hash",
        "modelspec.hash_sha256",
        "ss_epoch",
        "ss_steps",
    )
    true = {"ss_network_dim": "8", "modelspec.title": "mine", "format": "pt"}
    for number in range(2):
        path = tmp_path / "run" / f"step_{number}.safetensors"
        save_file({"w": torch.randn(2)}, path, dict.fromkeys(untrue, "1") | true)
    ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata.pop("ckptavg")
    assert metadata == true


class TestNames:
    def test_wrappers_are_taken_off_with_a_notice(self, tmp_path, caplog):
        states = [{f"module._orig_mod.{name}": torch.randn(2) for name in "ab"} for _ in range(2)]
        save_run(tmp_path / "run", states, "pt")
        with caplog.at_level("INFO", "ckptavg"):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        assert load_file(tmp_path / "out.safetensors").keys() == {"a", "b"}
        assert "module._orig_mod." in caplog.text

    def test_the_name_of_a_compiled_submodule_is_as_if_it_were_not_compiled(self, tmp_path, caplog):
        states = [torch.nn.Sequential(torch.nn.Linear(3, 2)).state_dict() for _ in range(3)]
        compiled = [
            {name.replace("0.", "0._orig_mod."): value for name, value in state.items()}
            for state in states
        ]
        save_run(tmp_path / "run", [compiled[0], states[1], compiled[2]], "pt")
        with caplog.at_level("INFO", "ckptavg"):
            ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
        average = torch.load(tmp_path / "out.pt")
        assert average.keys() == states[0].keys()
        for name, value in average.items():
            assert same_bits(value, naive_mean([state[name] for state in states]))
        assert "removed the wrapper's '_orig_mod.' from names in 2 checkpoints" in caplog.text
        save_run(tmp_path / "kept", compiled, "pt")
        ckptavg.average(tmp_path / "kept", tmp_path / "kept.pt", keep_prefix=True)
        assert torch.load(tmp_path / "kept.pt").keys() == compiled[0].keys()

    def test_or_left_on(self, tmp_path):
        states = [{"module.a": torch.randn(2)} for _ in range(2)]
        save_run(tmp_path / "run", states)
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", keep_prefix=True)
        assert load_file(tmp_path / "out.safetensors").keys() == {"module.a"}

    def test_the_counter_of_averaged_model_is_no_tensor_of_the_model(self, tmp_path):
        model = torch.nn.Linear(2, 2)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        states = []
        for _ in range(2):
            averaged.update_parameters(model)
            states.append({name: value.clone() for name, value in averaged.state_dict().items()})
        save_run(tmp_path / "run", states, "pt")
        for keep in (False, True):
            ckptavg.average(tmp_path / "run", tmp_path / "out.pt", keep_prefix=keep, force=True)
            names = set(torch.load(tmp_path / "out.pt"))
            assert names == {("module." if keep else "") + name for name in model.state_dict()}

    def test_a_compiled_and_a_plain_checkpoint_agree(self, tmp_path):
        states = [{"a": torch.ones(1)}, {"_orig_mod.a": torch.zeros(1)}]
        save_run(tmp_path / "run", states, "pt")
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        assert load_file(tmp_path / "out.safetensors")["a"] == 0.5

    def test_a_prefix_that_some_names_lack_is_a_name(self, tmp_path):
        states = [{"module.a": torch.ones(1), "b": torch.ones(1)} for _ in range(2)]
        save_run(tmp_path / "run", states)
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        assert load_file(tmp_path / "out.safetensors").keys() == {"module.a", "b"}

    def test_module_versions_and_aliases_lose_the_prefix_too(self, tmp_path):
        model = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
        save_run(tmp_path / "run", [model.state_dict(), model.state_dict()], "pt")
        ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
        wanted = model.module.state_dict()
        assert vars(torch.load(tmp_path / "out.pt")) == vars(wanted)
        for step in range(2):
            aliases = {"module.head": "module.w", "note": "module"}
            save_file({"module.w": torch.ones(1)}, tmp_path / f"{step}.safetensors", aliases)
        inputs = [tmp_path / f"{step}.safetensors" for step in range(2)]
        ckptavg.average(inputs, tmp_path / "out.safetensors")
        with safe_open(tmp_path / "out.safetensors", "pt") as opened:
            assert opened.metadata()["head"] == "w"
            assert opened.metadata()["note"] == "module"


class TestOutput:
    def test_the_same_inputs_give_the_same_bytes(self, tmp_path, monkeypatch):
        save_run(tmp_path / "run", random_state_dicts(3))
        for suffix in ("safetensors", "pt"):
            first, second = tmp_path / f"first.{suffix}", tmp_path / f"second.{suffix}"
            ckptavg.average(tmp_path / "run", first, threads=1)
            monkeypatch.chdir(tmp_path / "run")
            ckptavg.average(".", second, threads=3)
            assert first.read_bytes() == second.read_bytes()
            assert str(tmp_path).encode() not in first.read_bytes()

    def test_provenance_says_what_it_is_made_of(self, tmp_path):
        paths = save_run(tmp_path / "run", random_state_dicts(2))
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        entry = provenance(tmp_path / "out.safetensors")
        assert entry["version"] == ckptavg.__version__
        assert entry["scheme"] == "uniform"
        assert [source["name"] for source in entry["sources"]] == [path.name for path in paths]
        assert [source["bytes"] for source in entry["sources"]] == [
            path.stat().st_size for path in paths
        ]
        assert [source["weight"] for source in entry["sources"]] == [1, 1]
        assert entry["divisor"] == 2
        assert entry["roles"] == {"averaged": 6, "kept": 1, "last": 1}

    def test_metadata_of_the_last_checkpoint_is_carried_over(self, tmp_path):
        for step in range(2):
            save_file(
                {"w": torch.ones(1) * step}, tmp_path / f"{step}.safetensors", {"note": f"n{step}"}
            )
        ckptavg.average(tmp_path, tmp_path / "out.safetensors")
        with safe_open(tmp_path / "out.safetensors", "pt") as opened:
            assert opened.metadata()["note"] == "n1"
            assert opened.metadata()["format"] == "pt"

    def test_tensors_are_aligned_whatever_the_order_of_the_inputs(self, tmp_path):
        states = [
            {
                "odd": torch.ones(3, dtype=torch.int8),
                "half": torch.ones(3).half(),
                "w": torch.randn(5),
                "d": torch.randn(2).double(),
            }
            for _ in range(2)
        ]
        save_run(tmp_path / "run", states, "pt")
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        raw = (tmp_path / "out.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        sizes = {"F64": 8, "F32": 4, "F16": 2, "I8": 1}
        assert length % 8 == 0
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0, name

    def test_an_existing_output_is_refused_without_force(self, tmp_path):
        save_run(tmp_path / "run", random_state_dicts(2))
        out = tmp_path / "out.safetensors"
        out.write_bytes(b"precious")
        with pytest.raises(OutputError, match="exists already; `force` replaces it"):
            ckptavg.average(tmp_path / "run", out)
        assert out.read_bytes() == b"precious"
        ckptavg.average(tmp_path / "run", out, force=True)
        assert load_file(out)

    def test_an_input_is_never_overwritten(self, tmp_path):
        paths = save_run(tmp_path / "run", random_state_dicts(2))
        before = paths[0].read_bytes()
        with pytest.raises(OutputError, match="is itself one of the checkpoints"):
            ckptavg.average(tmp_path / "run", paths[0], force=True)
        assert paths[0].read_bytes() == before

    def test_dry_run_writes_nothing_and_tells_the_bytes(self, tmp_path):
        states = random_state_dicts(3)
        save_run(tmp_path / "run", states)
        told = ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", dry_run=True)
        assert not (tmp_path / "out.safetensors").exists()
        ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        assert told.bytes_written == (tmp_path / "out.safetensors").stat().st_size
        floats = sum(t.nbytes for t in states[0].values() if t.is_floating_point())
        others = sum(t.nbytes for t in states[0].values() if not t.is_floating_point())
        assert told.bytes_read == 3 * floats + others

    def test_a_copy_of_an_input_is_never_overwritten_either(self, tmp_path):
        paths = save_run(tmp_path / "run", random_state_dicts(2))
        last = tmp_path / "run" / "last.safetensors"
        last.write_bytes(paths[1].read_bytes())
        with pytest.raises(OutputError, match="is itself one of the checkpoints"):
            ckptavg.average(tmp_path / "run", last, force=True)

    @pytest.mark.parametrize(
        "options",
        [{"threads": 0}, {"threads": -1}, {"ints": "lsat"}, {"norm_stats": "x"}, {"dtype": "int8"}],
    )
    def test_values_that_no_option_has_are_errors(self, tmp_path, options):
        save_run(tmp_path / "run", random_state_dicts(2))
        with pytest.raises(SelectionError):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors", **options)
        assert not (tmp_path / "out.safetensors").exists()

    def test_less_than_all_bytes_are_never_published(self, tmp_path, monkeypatch):
        save_run(tmp_path / "run", random_state_dicts(2))
        monkeypatch.setattr("ckptavg.write.writing.execute", lambda *_, **__: (n for n in [5]))
        with pytest.raises(OutputError, match="only 5 of"):
            ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()

    def test_a_dry_run_warns_of_what_would_fail(self, tmp_path, caplog):
        save_run(tmp_path / "run", random_state_dicts(2))
        ckptavg.average(tmp_path / "run", tmp_path / "no" / "out.safetensors", dry_run=True)
        assert "the average would fail: " in caplog.text
        assert "there is no directory" in caplog.text

    @pytest.mark.parametrize(
        ("name", "better"),
        [
            ("out.zip", "out.safetensors"),
            ("out", "out.safetensors"),
            ("out.safetensor", "out.safetensors"),
            ("out.SAFETENSORS", "out.safetensors"),
            ("out.ptt", "out.pt"),
            ("decay0.9", "decay0.9.safetensors"),
            ("out.cpkt", "out.ckpt"),
        ],
    )
    def test_an_unknown_ending_is_an_error_that_names_a_better_one(self, tmp_path, name, better):
        save_run(tmp_path / "run", random_state_dicts(2))
        with pytest.raises(OutputError, match=f"is not that of a format.* name it {tmp_path}/"):
            ckptavg.average(tmp_path / "run", tmp_path / name)
        with pytest.raises(OutputError, match=re.escape(f"/{better};")):
            ckptavg.average(tmp_path / "run", tmp_path / name)

    def test_progress_adds_up_to_the_tensors(self, tmp_path):
        save_run(tmp_path / "run", random_state_dicts(2))
        told: list[tuple[int, int | None]] = []
        ckptavg.average(
            tmp_path / "run",
            tmp_path / "out.safetensors",
            progress=lambda done, total: told.append((done, total)),
        )
        assert sum(done for done, _ in told) == told[0][1]


def test_the_command_never_imports_torch(tmp_path):
    save_run(tmp_path / "run", random_state_dicts(2), "pt")
    code = (
        "import sys; sys.argv = ['ckptavg', 'average', 'run', '-o', sys.argv[1]]\n"
        "from ckptavg.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    for name in ("out.safetensors", "out.pt"):
        done = subprocess.run(
            [sys.executable, "-c", code, name],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr.strip().endswith("False")
        assert (tmp_path / name).exists()


def test_numpy_written_files_average_too(tmp_path):
    from safetensors.numpy import load_file as load_numpy
    from safetensors.numpy import save_file as save_numpy

    arrays = [np.random.default_rng(seed).standard_normal((4, 5)) for seed in range(3)]
    for step, array in enumerate(arrays):
        save_numpy({"w": array}, tmp_path / f"{step}.safetensors")
    ckptavg.average(tmp_path, tmp_path / "out.safetensors")
    wanted = (arrays[0] + arrays[1] + arrays[2]) / 3
    assert np.array_equal(load_numpy(tmp_path / "out.safetensors")["w"], wanted)


def test_optimizer_state_is_never_read(tmp_path, bytes_read):
    states = [{"w": torch.randn(1000, 500), "steps": torch.tensor(step)} for step in range(3)]
    (tmp_path / "run").mkdir()
    for step, state in enumerate(states):
        optimizer = {"state": {0: {name: torch.randn(1000, 500) for name in ("m", "v")}}}
        checkpoint = {"model": state, "optimizer": optimizer, "epoch": step}
        torch.save(checkpoint, tmp_path / "run" / f"{step}.pt")
    ckptavg.average(tmp_path / "run", tmp_path / "out.safetensors")
    model = sum(value.nbytes for state in states for value in state.values())
    assert model <= sum(bytes_read) <= 1.05 * model


@pytest.mark.parametrize(
    ("short", "name"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")]
)
def test_a_dtype_has_a_short_name_too(short, name, tmp_path):
    save_run(tmp_path / "run", [{"w": torch.randn(3)} for _ in range(2)])
    run("average", tmp_path / "run", "-o", tmp_path / "short.pt", "--dtype", short)
    ckptavg.average(tmp_path / "run", tmp_path / "long.pt", dtype=name)
    assert torch.load(tmp_path / "short.pt")["w"].dtype == getattr(torch, name)
    assert (tmp_path / "short.pt").read_bytes() == (tmp_path / "long.pt").read_bytes()
