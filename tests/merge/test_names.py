"""Tensors that are left out by name, or taken from the last checkpoint, and what asks for that."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.parametrizations import weight_norm

import ckptavg
from ckptavg import Selection
from ckptavg.errors import CkptAvgError, MismatchError, SelectionError
from ckptavg.formats import open_checkpoint
from ckptavg.merge.schemes import parse
from tests.helpers import outcome, run
from tests.oracle import naive_mean, same_bits

pytestmark = pytest.mark.usefixtures("no_fsync")

State = dict[str, torch.Tensor]


@pytest.fixture
def states() -> list[State]:
    """The vocabulary grows, and only some of the checkpoints have the rotary buffers."""
    states = []
    for number in range(3):
        state = {f"layers.{layer}.w": torch.randn(4, 3) for layer in range(9)}
        if number:
            state |= {f"layers.{layer}.rotary.inv_freq": torch.randn(2) for layer in range(3)}
        state["embed.weight"] = torch.randn(10 + number, 4)
        states.append(state)
    return states


@pytest.fixture
def folder(states: list[State], tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    for number, state in enumerate(states):
        torch.save(state, tmp_path / "run" / f"step_{number}.pt")
    return tmp_path / "run"


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CkptAvgError) as caught:
        ckptavg.average(folder, folder.parent / "out.safetensors", **options)
    assert not (folder.parent / "out.safetensors").exists()
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_rest_is_averaged(states, folder, suffix):
    output = folder.parent / f"out{suffix}"
    summary = ckptavg.average(folder, output, skip=["inv_freq$"], take_last=[r"embed\.weight"])
    result = load_file(output) if suffix == ".safetensors" else torch.load(output)
    assert result.keys() == states[0].keys()
    assert same_bits(result["embed.weight"], states[2]["embed.weight"])
    for name in (name for name in result if name != "embed.weight"):
        assert same_bits(result[name], naive_mean([state[name] for state in states])), name
    assert summary.roles == {"averaged": 9, "last": 1, "skipped": 3}
    entry = open_checkpoint(output).provenance or {}
    assert entry["roles"] == summary.roles
    assert entry["options"] == {"skip": ["inv_freq$"], "take_last": [r"embed\.weight"]}
    assert ckptavg.verify(output, [folder]).compared == 10


def test_averages_from_one_read_must_agree_in_what_is_the_last_of_each(states, folder):
    schemes = (*parse("1,1,0"), *parse("uniform"))
    with pytest.raises(MismatchError, match=r"embed.weight: shape .*1.pt, shape .*2.pt"):
        ckptavg.average_many(
            folder, folder.parent / "all", weights=schemes, skip=["inv_freq"], take_last=["embed"]
        )
    ckptavg.average_many(folder, folder.parent / "all", weights=schemes, skip=["inv", "embed"],
                         take_last=["0.w"])  # fmt: skip
    results = [load_file(path) for path in sorted((folder.parent / "all").iterdir())]
    last = [states[1]["layers.0.w"], states[2]["layers.0.w"]]
    for result, value in zip(results, last, strict=True):
        assert same_bits(result["layers.0.w"], value)


def test_it_makes_no_difference_what_others_have(states, folder):
    plain = folder.parent / "plain"
    plain.mkdir()
    for number, state in enumerate(states):
        kept = {n: v for n, v in state.items() if "inv_freq" not in n and n != "embed.weight"}
        torch.save(kept, plain / f"step_{number}.pt")
    ckptavg.average(plain, folder.parent / "expected.safetensors")
    output = folder.parent / "out.safetensors"
    ckptavg.average(folder, output, skip=["inv_freq", "embed"])
    expected = load_file(folder.parent / "expected.safetensors")
    assert load_file(output).keys() == expected.keys()
    assert all(same_bits(value, expected[name]) for name, value in load_file(output).items())


def test_a_name_that_stands_for_another_is_skipped_with_it(tmp_path):
    (tmp_path / "run").mkdir()
    for number in range(2):
        tensors = {"embed.weight": torch.randn(3, 2), "w": torch.randn(2)}
        path = tmp_path / "run" / f"step_{number}.safetensors"
        save_file(tensors, path, metadata={"head.weight": "embed.weight", "kept": "yes"})
    output = tmp_path / "out.safetensors"
    ckptavg.average(tmp_path / "run", output, skip=["embed"])
    metadata = open_checkpoint(output).metadata
    assert metadata["kept"] == "yes"
    assert "head.weight" not in metadata


def test_integers_that_differ_and_quantised_weights_have_a_way_out(tmp_path):
    (tmp_path / "run").mkdir()
    states = []
    for number in range(2):
        ids = torch.arange(4) + number
        states.append({"w": torch.randn(2), "ids": ids, "old.qweight": torch.ones(2).int()})
        torch.save(states[-1], tmp_path / "run" / f"step_{number}.pt")
    assert "is quantised" in refusal(tmp_path / "run")
    assert "integer tensors differ" in refusal(tmp_path / "run", skip=["qweight"])
    output = tmp_path / "out.safetensors"
    ckptavg.average(tmp_path / "run", output, skip=["qweight"], take_last=["^ids$"])
    assert same_bits(load_file(output)["ids"], states[1]["ids"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        (("float32", "float16", "bfloat16"), "float32"),
        (("bfloat16", "float64", "float16"), "bfloat16"),
        (("float16", "float8_e5m2", "float32"), "float16"),
    ],
)
def test_floats_of_unlike_dtypes_average_in_the_one_that_is_asked_for(
    tmp_path, inputs, output, suffix
):
    (tmp_path / "run").mkdir()
    states = []
    for number, dtype in enumerate(inputs):
        values = torch.randn(70, 5).to(getattr(torch, dtype))
        mask = torch.full((3,), -torch.inf).to(values.dtype)
        states.append({"w": values, "mask": mask, "ids": torch.arange(3)})
        torch.save(states[-1], tmp_path / "run" / f"step_{number}.pt")
    path = tmp_path / f"out{suffix}"
    ckptavg.average(tmp_path / "run", path, dtype=output)
    result = load_file(path) if suffix == ".safetensors" else torch.load(path)
    dtype = getattr(torch, output)
    total = states[0]["w"].double()
    for state in states[1:]:
        total = total + state["w"].double()
    assert same_bits(result["w"], (total / 3).float().to(dtype))
    assert same_bits(result["mask"], torch.full((3,), -torch.inf).to(dtype))
    assert ckptavg.verify(path, [tmp_path / "run"]).compared == 3


def test_norm_statistics_of_unlike_dtypes_are_no_frozen_ones(tmp_path):
    (tmp_path / "run").mkdir()
    for number, dtype in enumerate((torch.float32, torch.float16)):
        large = torch.ones(600_000)  # more than a piece that is compared at once
        state = {"bn.running_mean": large, "bn.running_var": torch.ones(2) * 2}
        state = {name: value.to(dtype) for name, value in state.items()}
        torch.save(state, tmp_path / "run" / f"step_{number}.pt")
    summary = ckptavg.average(tmp_path / "run", tmp_path / "o.pt", dtype="float32")
    assert summary.roles == {"averaged": 2}
    assert same_bits(torch.load(tmp_path / "o.pt")["bn.running_var"], torch.ones(2) * 2)


def test_take_last_needs_to_know_which_is_last(states, tmp_path):
    for name, state in zip(("a.pt", "b_7.pt"), states[1:], strict=True):
        torch.save(state, tmp_path / name)
    with pytest.raises(SelectionError, match="order of the checkpoints is not known"):
        ckptavg.average(
            [tmp_path / "a.pt", tmp_path / "b_7.pt"], tmp_path / "o.pt", take_last=["embed"]
        )


class TestMessages:
    def test_group_what_differs_alike_and_name_the_way_out(self, folder):
        lines = refusal(folder).splitlines()
        assert lines[0] == "the checkpoints do not have the same tensors:"
        assert sorted(lines[1:]) == [
            (
                f"  3 tensors such as layers.0.rotary.inv_freq: missing in {folder}/step_0.pt, "
                f"present in {folder}/step_1.pt and 1 more; `skip` 'inv_freq$' leaves them out"
            ),
            (
                f"  embed.weight: shape (10, 4) in {folder}/step_0.pt, shape (11, 4) in "
                f"{folder}/step_1.pt, shape (12, 4) in {folder}/step_2.pt; "
                "`take_last` 'weight$' takes it from the last checkpoint"
            ),
        ]

    def test_work_when_they_are_followed(self, folder):
        output, options = folder.parent / "out.safetensors", list[str]()
        _, _, error = outcome("average", folder, "-o", output)
        for option, pattern in re.findall(r"(--[a-z-]+) '([^']+)'", error):
            options += [option, pattern]
        assert options[::2] == ["--take-last", "--skip"]
        result = json.loads(run("average", folder, "-o", output, "--json", *options).stdout)
        assert result["roles"] == {"averaged": 9, "last": 1, "skipped": 3}

    def test_of_other_models_are_short_and_say_so(self, tmp_path):
        for number in range(2):
            state = {f"model{number}.{layer}.{n}": torch.ones(1) for layer in "abc" for n in "xyz"}
            torch.save(state | {"w": torch.ones(1)}, tmp_path / f"step_{number}.pt")
        assert refusal(tmp_path).splitlines()[1:] == [
            (
                "  18 of 19 tensors differ, as between different models; `include` takes the "
                "checkpoints of one, `skip` and `take_last` choose tensors by name"
            ),
            *(
                f"  9 tensors such as model{one}.a.x: missing in {tmp_path}/step_{other}.pt, "
                f"present in {tmp_path}/step_{one}.pt"
                for one, other in ((0, 1), (1, 0))
            ),
        ]

    def test_of_unlike_dtypes_are_one_line_with_the_option(self, tmp_path):
        for number, dtype in enumerate((torch.float16, torch.float32)):
            state = {f"{letter}.weight": torch.ones(1).to(dtype) for letter in "abcdefghijkl"}
            state["a.weight"] = torch.ones(number + 1).to(dtype)
            torch.save(state, tmp_path / f"step_{number}.pt")
        [shape, *others] = refusal(tmp_path).splitlines()[1:]
        assert shape.endswith("; `take_last` 'a\\.weight$' takes it from the last checkpoint")
        assert others == [
            (
                f"  12 tensors such as a.weight: float16 in {tmp_path}/step_0.pt, "
                f"float32 in {tmp_path}/step_1.pt; `dtype=float32` averages them"
            )
        ]
        error = outcome("average", tmp_path, "-o", tmp_path / "o.pt")[2]
        assert "; --dtype float32 averages them" in error

    @pytest.mark.parametrize("narrow", ["float16", "float8_e5m2"])
    def test_of_16_bit_dtypes_name_one_that_holds_both(self, tmp_path, narrow):
        for number, dtype in enumerate((getattr(torch, narrow), torch.bfloat16)):
            torch.save({"w": torch.ones(1).to(dtype)}, tmp_path / f"step_{number}.pt")
        holds_both = "float32" if narrow == "float16" else "bfloat16"
        assert f"; `dtype={holds_both}` averages it" in refusal(tmp_path)

    def test_of_patterns_that_leave_nothing(self, folder):
        assert "`skip` leaves out all tensors" in refusal(folder, skip=["embed", "."])

    @pytest.mark.parametrize("option", ["skip", "take_last"])
    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("em(", "'em(' is not a regular expression"),
            ("embde", "'embde' matches no tensor's name; the names are"),
        ],
    )
    def test_of_a_pattern_that_does_nothing(self, folder, option, pattern, message):
        assert message in refusal(folder, **{option: [pattern]})

    def test_of_a_container_which_keeps_all(self, folder):
        said = run("average", folder, "-o", "o.pt", "--container", "last", "--skip", "x", code=2)
        assert "--skip" in said.stderr
        with pytest.raises(SelectionError, match="keeps all of its tensors"):
            ckptavg.average(folder, "o.pt", container="last", skip=["inv_freq"])


def test_what_is_skipped_is_not_there_to_be_taken(folder):
    message = refusal(folder, skip=["inv_freq$"], take_last=["0.rotary"])
    assert "`take_last` '0.rotary'" in message


def test_one_text_stands_for_a_list_of_it(states, folder):
    """Its characters are no patterns: `n` would be found in almost every name."""
    output = folder.parent / "out.safetensors"
    ckptavg.average(folder, output, skip="inv_freq$", take_last="embed")
    assert load_file(output).keys() == states[0].keys()
    chosen = Selection(include="step_[12].pt", exclude="*_2.pt")
    assert chosen == Selection(include=["step_[12].pt"], exclude=["*_2.pt"])
    summary = ckptavg.average(folder, output, select=chosen, force=True)
    assert [source.name for source in summary.sources] == ["step_1.pt"]
    with pytest.raises(
        SelectionError, match=r"`skip` must be a string or a list of strings, not \[3\]"
    ):
        ckptavg.average(folder, output, skip=[3])  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
class TestWeightNorm:
    """torch has two sets of names for it, and its newer API loads both."""

    @staticmethod
    def save(folder: Path, kinds: str, **more: Any) -> list[State]:
        """A checkpoint for each kind, `old` or `new`; what the newer API loads of each."""
        folder.mkdir()
        loaded = []
        for step, kind in enumerate(kinds.split()):
            torch.manual_seed(step)
            make: Any = torch.nn.utils.weight_norm if kind == "old" else weight_norm
            state = make_with_norms(make).state_dict()
            torch.save({"model": state, "step": step, **more}, folder / f"step_{step}.pt")
            model = make_with_norms(weight_norm)
            model.load_state_dict(state, strict=True)
            loaded.append(model.state_dict())
        return loaded

    @pytest.mark.parametrize("kinds", ["old old new", "new new old", "old new old"])
    @pytest.mark.parametrize("ending", ["pt", "safetensors"])
    def test_old_names_become_new_ones(self, tmp_path, kinds, ending):
        loaded = self.save(tmp_path / "run", kinds)
        out = tmp_path / f"out.{ending}"
        code, _, messages = outcome("average", tmp_path / "run", "-o", out)
        assert code == 0, messages
        count = kinds.count("old")
        assert f"weight norm have their new names in {count} checkpoints" in messages
        average = torch.load(out) if ending == "pt" else load_file(out)
        make_with_norms(weight_norm).load_state_dict(average, strict=True)
        for name, value in average.items():
            assert same_bits(value, naive_mean([state[name] for state in loaded])), name
        assert ckptavg.verify(out, [tmp_path / "run"]).compared == len(average)

    def test_a_container_keeps_the_names_of_the_last(self, tmp_path):
        loaded = self.save(tmp_path / "run", "new old")
        out = tmp_path / "out.pt"
        ckptavg.average(tmp_path / "run", out, container="last")
        average = torch.load(out)["model"]
        assert "0.weight_g" in average
        model = make_with_norms(weight_norm)
        model.load_state_dict(average, strict=True)
        for name, value in model.state_dict().items():
            assert same_bits(value, naive_mean([state[name] for state in loaded])), name
        assert ckptavg.verify(out, [tmp_path / "run"]).sources == 2

    def test_where_all_have_the_old_names_these_stay(self, tmp_path):
        self.save(tmp_path / "run", "old old")
        ckptavg.average(tmp_path / "run", tmp_path / "out.pt")
        assert "0.weight_g" in torch.load(tmp_path / "out.pt")

    def test_in_several_state_dicts_too(self, tmp_path):
        state = {"w": torch.ones(2)}
        loaded = self.save(tmp_path / "run", "old new", discriminator=state)
        ckptavg.average(tmp_path / "run", tmp_path / "out.pt", key=["model", "discriminator"])
        average = torch.load(tmp_path / "out.pt")
        for name, value in average["model"].items():
            assert same_bits(value, naive_mean([state[name] for state in loaded])), name


def make_with_norms(norm: Callable[[torch.nn.Module], torch.nn.Module]) -> torch.nn.Module:
    return torch.nn.Sequential(norm(torch.nn.Linear(3, 4)), norm(torch.nn.Conv1d(4, 2, 3)))
