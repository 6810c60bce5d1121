"""The Python API with objects: a model, an iterable and a function in place of their specs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckptavg

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

def batches():
    made = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, generator=made), torch.randint(3, (8,), generator=made))
        for _ in range(4)
    ]

def largest(model, batches):
    return max(float(model(inputs).max()) for inputs, _ in batches)

def count(model, batches):
    return len(batches)
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """The functions of the file that specs name; a run of three checkpoints is beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    functions: dict[str, Any] = {}
    exec(CODE, functions)  # noqa: S102 - ours
    (tmp_path / "run").mkdir()
    for step in range(3):
        torch.manual_seed(step)
        state = {name: torch.rand_like(value.float()) for name, value in net(functions).items()}
        state["1.num_batches_tracked"] = torch.tensor(step)
        save_file(state, tmp_path / "run" / f"step_{step}.safetensors")
    return functions


def net(functions):
    return functions["net"]().state_dict()


SPECS: dict[str, Any] = {"model": "code.py:net", "loader": "code.py:batches"}


@pytest.mark.parametrize("kind", ["object", "callable"])
def test_a_checkpoint_is_refreshed_as_with_specs(code, kind):
    ckptavg.average("run", "swa.safetensors")
    ckptavg.refresh_checkpoint("swa.safetensors", "a.safetensors", **SPECS)
    model = code["net"]() if kind == "object" else code["net"]
    loader = code["batches"]() if kind == "object" else code["batches"]
    report = ckptavg.refresh_checkpoint(
        "swa.safetensors", "b.safetensors", model=model, loader=loader
    )
    assert (report.batches, report.samples) == (4, 32)
    one, other = load_file("a.safetensors"), load_file("b.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoints_are_evaluated_as_with_specs(code):
    expected = ckptavg.evaluate("run", **SPECS, metric="code.py:largest")
    objects = {"model": code["net"](), "loader": code["batches"](), "metric": code["largest"]}
    assert ckptavg.evaluate("run", **objects) == expected
    assert [sorted(each.metrics) for each in expected] == [["largest"]] * 3


class Counting(nn.Module):
    """Its output depends on a buffer that no checkpoint has, and that each call changes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, values):
        self.calls += 1
        return self.net(values) + self.calls


def test_buffers_that_no_checkpoint_has_do_not_pass_from_one_to_the_next(code):
    def evaluated(path):
        evaluations = ckptavg.evaluate(
            path, model=Counting(), loader=code["batches"](), metric=code["largest"]
        )
        return [each.metrics for each in evaluations]

    paths = [f"run/step_{step}.safetensors" for step in range(3)]
    assert evaluated("run") == [metrics for path in paths for metrics in evaluated(path)]


def test_a_soup_is_made_of_objects(code):
    soup = ckptavg.soup(
        "run", "soup.safetensors", model=code["net"](), loader=code["batches"](), metric="loss"
    )
    assert soup.steps[0].kept
    again = ckptavg.soup("run", "again.safetensors", **SPECS, metric="loss")
    assert again.value == soup.value


def test_a_metric_may_ask_for_the_number_of_batches(code):
    evaluations = ckptavg.evaluate("run", **SPECS, metric="code.py:count")
    assert [each.metrics for each in evaluations] == [{"count": 4}] * 3


def test_messages_name_objects_by_their_names(code):
    def wrong():
        return 3

    with pytest.raises(ckptavg.CkptAvgError, match=r"wrong is a int, not a torch\.nn\.Module"):
        ckptavg.refresh_checkpoint(
            "run/step_0.safetensors",
            "a.safetensors",
            model=wrong,
            loader=code["batches"],
        )


def test_a_generator_serves_one_checkpoint_only(code):
    batches = (batch for batch in code["batches"]())
    with pytest.raises(ckptavg.CkptAvgError, match="can be iterated only once"):
        ckptavg.evaluate("run", model=nn.Sequential(*code["net"]()), loader=batches)


@pytest.mark.parametrize("name", ["refresh_checkpoint", "evaluate", "soup", "average"])
def test_a_wrong_keyword_is_an_error_that_names_the_function(name):
    with pytest.raises(TypeError, match=rf"^{name}\(\) .*(required|unexpected)"):
        getattr(ckptavg, name)("a.pt", bogus=1)
