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
    ckptavg.refresh_checkpoint("swa.safetensors", "a.safetensors", ckptavg.RefreshOptions(**SPECS))
    model = code["net"]() if kind == "object" else code["net"]
    loader = code["batches"]() if kind == "object" else code["batches"]
    options = ckptavg.RefreshOptions(model=model, loader=loader)
    report = ckptavg.refresh_checkpoint("swa.safetensors", "b.safetensors", options)
    assert (report.batches, report.samples) == (4, 32)
    one, other = load_file("a.safetensors"), load_file("b.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoints_are_evaluated_as_with_specs(code):
    options = ckptavg.EvaluationOptions(**SPECS, metric="code.py:largest")
    expected = ckptavg.evaluate("run", options)
    options = ckptavg.EvaluationOptions(
        model=code["net"](), loader=code["batches"](), metric=code["largest"]
    )
    assert ckptavg.evaluate("run", options) == expected
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
        options = ckptavg.EvaluationOptions(
            model=Counting(), loader=code["batches"](), metric=code["largest"]
        )
        return [each.metrics for each in ckptavg.evaluate(path, options)]

    paths = [f"run/step_{step}.safetensors" for step in range(3)]
    assert evaluated("run") == [metrics for path in paths for metrics in evaluated(path)]


def test_a_soup_is_made_of_objects(code):
    options = ckptavg.EvaluationOptions(
        model=code["net"](), loader=code["batches"](), metric="loss"
    )
    soup = ckptavg.soup("run", "soup.safetensors", options)
    assert soup.steps[0].kept
    specs = ckptavg.EvaluationOptions(**SPECS, metric="loss")
    assert ckptavg.soup("run", "again.safetensors", specs).value == soup.value


def test_a_metric_may_ask_for_the_number_of_batches(code):
    options = ckptavg.EvaluationOptions(**SPECS, metric="code.py:count")
    assert [each.metrics for each in ckptavg.evaluate("run", options)] == [{"count": 4}] * 3


def test_messages_name_objects_by_their_names(code):
    def wrong():
        return 3

    options = ckptavg.RefreshOptions(model=wrong, loader=code["batches"])
    with pytest.raises(ckptavg.CkptAvgError, match=r"wrong is a int, not a torch\.nn\.Module"):
        ckptavg.refresh_checkpoint("run/step_0.safetensors", "a.safetensors", options)


def test_a_generator_serves_one_checkpoint_only(code):
    batches = (batch for batch in code["batches"]())
    options = ckptavg.EvaluationOptions(model=nn.Sequential(*code["net"]()), loader=batches)
    with pytest.raises(ckptavg.CkptAvgError, match="can be gone through only once"):
        ckptavg.evaluate("run", options)
