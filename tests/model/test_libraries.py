"""Models that a library makes by name, without the libraries; tests/timm has them."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from torch import nn

from ckptavg.errors import CkptAvgError
from ckptavg.model.libraries import maker
from ckptavg.model.making import make_model


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_that_is_not_installed_is_named_with_its_extra(library, monkeypatch):
    if importlib.util.find_spec(library) is not None:
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CkptAvgError) as caught:
        make_model(f"{library}:resnet50", {}, "cpu")
    assert str(caught.value) == (
        f"--model {library}:resnet50 needs {library}, which is not installed; "
        f"pip install 'ckptavg[{library}]'"
    )


@pytest.mark.parametrize(
    "spec",
    ["torchvision.models:resnet50", "torchvision:models.resnet50", "timm.models:x", "a.py:resnet"],
)
def test_that_is_a_plain_attribute_is_none(spec):
    assert maker(spec) is None


def test_a_plain_attribute_is_made_as_before():
    assert isinstance(make_model("torch.nn:Identity", {}, "cpu"), nn.Identity)
