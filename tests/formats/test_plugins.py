"""Formats that other packages read, and what is said where such a package is at fault."""

from __future__ import annotations

import pytest
import torch

import ckptavg
from ckptavg.formats import is_suffix, plugins
from tests.helpers import outcome, run


def test_a_package_at_fault_is_named_in_one_line(tmp_path, install):
    codes = {
        "raises": "def read(file, key):\n    raise ZeroDivisionError('two\\nlines')\n",
        "returns": "def read(file, key):\n    return {}\n",
        "imports": "import nonsense_that_is_not_there\n",
        "lacks": "",
    }
    wanted = {
        "raises": r"failed to read it: ZeroDivisionError: two\nlines",
        "returns": "failed to read it: TypeError: its_returns:read returns no Checkpoint",
        "imports": "No module named 'nonsense_that_is_not_there'",
        "lacks": "has no attribute 'read'",
    }
    for kind, code in codes.items():
        install(f"its-{kind}", code, {f"{kind}x": f"its_{kind}:read"})
        (tmp_path / f"a.{kind}x").write_bytes(b"x")
        end, _, message = outcome("inspect", tmp_path / f"a.{kind}x")
        assert end == 1
        assert message.count("\n") == 1
        assert f"a.{kind}x: the package its-{kind} 0.1 failed" in message
        assert wanted[kind] in message


def test_two_packages_for_one_suffix_are_named(tmp_path, install):
    for name in ("one", "other"):
        install(name, "def read(file, key): ...\n", {"xyz": f"{name}:read"})
    (tmp_path / "a.xyz").write_bytes(b"x")
    with pytest.raises(ckptavg.CkptAvgError, match=r"several packages read .xyz: one 0.1, other"):
        ckptavg.convert(tmp_path / "a.xyz", tmp_path / "b.pt")


def test_a_suffix_of_ours_is_no_package_s(tmp_path, install):
    install("greedy", "", {"pt": "greedy:read", "safetensors": "greedy:read"})
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    run("inspect", tmp_path / "a.pt")


def test_packages_are_looked_through_for_unknown_suffixes_only(install):
    install("quiet", "", {"5": "quiet:read", "xyz": "quiet:read"})
    for suffix in (".pt", ".safetensors", "", ".5"):
        is_suffix(suffix)
    assert not plugins._all_entry_points.cache_info().currsize
    assert is_suffix(".xyz")
    assert not is_suffix(".txt")
