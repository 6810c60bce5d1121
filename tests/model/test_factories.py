"""How the user's own objects are found and imported."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch

from ckptavg.errors import CkptAvgError, UserCodeError
from ckptavg.model.factories import load_object, user_code


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch, tmp_path):
    """Work in an empty directory."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


class TestModules:
    def test_are_looked_for_in_the_working_directory(self, tmp_path):
        write(tmp_path / "factory_one.py", "value = 3")
        assert load_object("factory_one:value") == 3

    def test_may_be_in_packages(self, tmp_path):
        write(tmp_path / "factory_pack" / "sub" / "deep.py", "value = 4")
        assert load_object("factory_pack.sub.deep:value") == 4

    @pytest.mark.parametrize("spec", ["pack_a.main:value", "pack_a/main.py:value"])
    def test_of_a_package_import_it_from_the_working_directory(self, spec, tmp_path):
        write(tmp_path / "pack_a" / "__init__.py", "")
        write(tmp_path / "pack_a" / "parts.py", "value = 5")
        write(tmp_path / "pack_a" / "main.py", "from pack_a.parts import value")
        assert load_object(spec) == 5

    @pytest.mark.parametrize("spec", ["argv_a:options", "argv_a.py:options"])
    def test_find_no_arguments_on_the_command_line(self, spec, tmp_path, monkeypatch):
        text = """
            import argparse, sys
            parser = argparse.ArgumentParser()
            parser.add_argument("--model", default="small")
            options = [parser.parse_args().model, len(sys.argv)]
        """
        write(tmp_path / "argv_a.py", text)
        monkeypatch.setattr(sys, "argv", ["ckptavg", "bn-refresh", "a.pt", "--model", "other"])
        assert load_object(spec) == ["small", 1]
        assert sys.argv[1] == "bn-refresh"

    def test_may_be_installed_ones(self):
        assert load_object("collections:OrderedDict.fromkeys")("ab") == {"a": None, "b": None}

    @pytest.mark.parametrize("name", ["factory_none", "factory_none.sub", "json.factory_none"])
    def test_that_are_not_there_are_an_error(self, name):
        with pytest.raises(
            CkptAvgError, match=r"there is no module 'factory_none'|json.factory_no"
        ):
            load_object(f"{name}:value")

    def test_that_lack_a_dependency_show_what_they_raised(self, tmp_path):
        write(tmp_path / "factory_needy.py", "import factory_absent")
        with pytest.raises(UserCodeError, match="importing factory_needy raised Modul") as caught:
            load_object("factory_needy:value")
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)
        assert caught.value.__cause__.name == "factory_absent"

    def test_that_raise_show_what_they_raised(self, tmp_path):
        write(tmp_path / "factory_bad.py", "1 / 0")
        with pytest.raises(UserCodeError, match="raised ZeroDivisionError") as caught:
            load_object("factory_bad:value")
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_the_path_grows_but_once(self, tmp_path):
        write(tmp_path / "factory_one.py", "value = 3")
        load_object("factory_one:value")
        before = list(sys.path)
        load_object("factory_one:value")
        assert sys.path == before
        assert sys.path[0] == str(tmp_path)


class TestFiles:
    def test_are_named_by_their_path(self, tmp_path):
        path = write(tmp_path / "some where" / "factory_file.py", "value = 5")
        assert load_object(f"{path}:value") == 5
        assert load_object("some where/factory_file.py:value") == 5
        assert load_object("./some where/factory_file.py:value") == 5

    def test_may_import_what_is_beside_them(self, tmp_path):
        write(tmp_path / "inner" / "factory_beside.py", "value = 6")
        path = write(tmp_path / "inner" / "factory_main.py", "from factory_beside import value")
        assert load_object(f"{path}:value") == 6

    @pytest.mark.parametrize("stem", ["factory_once", "json", "factory-with-dashes", "factory.dot"])
    def test_are_imported_once_for_model_and_loader(self, stem, tmp_path):
        text = "with open('log', 'a') as log: log.write('x')\nclass A: pass\nb = A()"
        write(tmp_path / "inner" / f"{stem}.py", text)
        (tmp_path / "link").symlink_to("inner")
        made = load_object(f"inner/{stem}.py:A")
        assert isinstance(load_object(f"inner/{stem}.py:b"), made)
        assert isinstance(load_object(f"{tmp_path}/link/../inner/{stem}.py:b"), made)
        assert isinstance(load_object(f"link/{stem}.py:b"), made)
        assert (tmp_path / "log").read_text() == "x"

    def test_are_the_same_as_the_module_of_that_file(self, tmp_path):
        write(tmp_path / "factory_same.py", "class A: pass")
        assert load_object("factory_same:A") is load_object("factory_same.py:A")
        write(tmp_path / "factory_pack" / "factory_same2.py", "class A: pass")
        made = load_object("factory_pack.factory_same2:A")
        assert load_object("factory_pack/factory_same2.py:A") is made
        write(tmp_path / "factory_pack2" / "__init__.py", "class A: pass")
        assert load_object("factory_pack2:A") is load_object("factory_pack2/__init__.py:A")

    @pytest.mark.parametrize("spec", ["factory_trains.py:Net", "factory_trains:Net"])
    def test_that_train_are_stopped_before_they_save(self, spec, tmp_path):
        text = """
        import torch
        class Net(torch.nn.Linear): pass
        model = Net(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        open("saved", "w").close()
        """
        write(tmp_path / "factory_trains.py", text)
        with pytest.raises(UserCodeError, match=r"starts a training.*under `if __name__"):
            load_object(spec)
        assert not (tmp_path / "saved").exists()
        weight = torch.nn.Parameter(torch.ones(1))
        weight.grad = torch.ones(1)
        torch.optim.SGD([weight], lr=1.0).step()  # goes on elsewhere
        assert weight.item() == 0

    def test_are_known_by_their_name_to_worker_processes(self, tmp_path):
        write(tmp_path / "factory_worker.py", "class A: pass")
        assert load_object("factory_worker.py:A").__module__ == "factory_worker"
        assert sys.modules["factory_worker"].A is load_object("factory_worker:A")

    def test_of_one_name_in_two_places_are_two(self, tmp_path):
        for place in ("one", "two", "three"):
            write(tmp_path / place / "factory_twin.py", f"value = {place!r}")
        found = [load_object(f"{place}/factory_twin.py:value") for place in ("one", "two", "three")]
        assert found == ["one", "two", "three"]
        assert load_object("one/factory_twin.py:value") == "one"

    def test_do_not_take_the_place_of_a_module(self, tmp_path):
        import json

        write(tmp_path / "json.py", "value = 7")
        assert load_object("json.py:value") == 7
        assert sys.modules["json"] is json

    def test_that_are_not_there_are_an_error(self, tmp_path):
        with pytest.raises(CkptAvgError, match=r"absent.py: there is no such file"):
            load_object("absent.py:value")
        (tmp_path / "folder.py").mkdir()
        with pytest.raises(CkptAvgError, match="there is no such file"):
            load_object("folder.py:value")

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("1 / 0", ZeroDivisionError),
            ("def", SyntaxError),
            ("import sys; sys.exit(0)", SystemExit),
        ],
    )
    def test_that_raise_show_it_and_are_forgotten(self, text, error, tmp_path):
        path = write(tmp_path / "factory_bad.py", text)
        with pytest.raises(UserCodeError, match=rf"factory_bad.py raised {error.__name__}") as one:
            load_object("factory_bad.py:value")
        assert isinstance(one.value.__cause__, error)
        assert "factory_bad" not in sys.modules
        path.write_text("value = 'mended, and longer than before'")
        assert load_object("factory_bad.py:value").startswith("mended")

    def test_that_are_interrupted_are_forgotten_too(self, tmp_path):
        write(tmp_path / "factory_slow.py", "raise KeyboardInterrupt")
        with pytest.raises(KeyboardInterrupt):
            load_object("factory_slow.py:value")
        assert "factory_slow" not in sys.modules


class TestAttributes:
    def test_may_be_dotted(self, tmp_path):
        write(tmp_path / "factory_dots.py", "class A:\n  class B:\n    value = 8")
        assert load_object("factory_dots.py:A.B.value") == 8

    @pytest.mark.parametrize("name", ["absent", "A.absent", "absent.A", "A..B"])
    def test_that_are_not_there_are_an_error(self, name, tmp_path):
        write(tmp_path / "factory_dots.py", "class A:\n  class B: pass")
        with pytest.raises(CkptAvgError, match=rf"factory_dots.py has no '{name}'") as caught:
            load_object(f"factory_dots.py:{name}")
        assert not isinstance(caught.value, UserCodeError)

    def test_that_are_not_there_bring_up_those_alike(self, tmp_path):
        code = "from json import loads\ndef make_model(): pass\nother = []\nloader = [1]\nn = 3"
        write(tmp_path / "factory_alike.py", code)
        expected = r"'train_loader'; it has loader, make_model, other$"
        with pytest.raises(CkptAvgError, match=expected):
            load_object("factory_alike.py:train_loader")

    def test_that_raise_show_what_they_raised(self, tmp_path):
        write(tmp_path / "factory_lazy.py", "def __getattr__(name):\n  return 1 / 0")
        with pytest.raises(UserCodeError, match=r"looking up factory_lazy.py:value raised Zero"):
            load_object("factory_lazy.py:value")


@pytest.mark.parametrize("spec", ["", ":", "json", "json:", ":json", "a.py", "a.py:", ".json:load"])
def test_a_spec_of_another_form_is_an_error(spec):
    with pytest.raises(CkptAvgError, match=r"is not of the form package.module:attr"):
        load_object(spec)


class TestUserCode:
    def test_lets_our_own_errors_pass(self):
        with pytest.raises(CkptAvgError, match=r"^ours$"), user_code("it"):
            raise CkptAvgError("ours")

    @pytest.mark.parametrize("error", [ValueError, StopIteration, MemoryError])
    def test_wraps_the_users(self, error):
        expected = pytest.raises(UserCodeError, match=f"^it raised {error.__name__}: his$")
        with expected as caught, user_code("it"):
            raise error("his")
        assert isinstance(caught.value.__cause__, error)

    @pytest.mark.parametrize(
        ("error", "remedy"),
        [
            (SystemExit(1), r"belongs under `if __name__ == \"__main__\":`"),
            (SystemExit(2), "argparse has no arguments"),
            (
                ImportError("attempted relative import with no known parent package"),
                "package.module",
            ),
            (
                TypeError("Net.forward() missing 1 required positional argument: 'mask'"),
                "`forward`",
            ),
            (RuntimeError("element 0 of tensors does not require grad"), "torch.enable_grad"),
            (
                AssertionError("targets should not be none when in training mode"),
                "`train_mode` norm",
            ),
            (
                RuntimeError("mat1 and mat2 must have the same dtype, but got Float and Half"),
                "in a function given as `forward`",
            ),
            (
                RuntimeError("Input type (float) and bias type (c10::Half) should be the same"),
                "in a function given as `forward`",
            ),
            (
                AttributeError("'NoneType' object has no attribute 'world_size'"),
                "there is no Trainer here",
            ),
            (RuntimeError("Net is not attached to a `Trainer`."), "there is no Trainer here"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_says_what_to_do(self, error, remedy):
        with pytest.raises(UserCodeError, match=remedy), user_code("importing it"):
            raise error

    def test_says_what_to_do_about_an_error_deep_in_a_worker(self):
        frames = "".join(f'  File "part_{n}.py", line 1, in f\n    f()\n' for n in range(200))
        text = f"Caught it.\nOriginal Traceback (most recent call last):\n{frames}"
        with pytest.raises(UserCodeError, match="enable_grad") as caught, user_code("it"):
            raise RuntimeError(f"{text}RuntimeError: element 0 of tensors does not require grad")
        assert "part_" not in str(caught.value)

    def test_shortens_what_has_no_end(self):
        with pytest.raises(UserCodeError) as caught, user_code("it"):
            raise AssertionError("target " * 200_000)
        assert len(str(caught.value)) < 3_000

    def test_does_without_a_message_that_cannot_be_made(self):
        class Wordless(Exception):  # noqa: N818
            def __str__(self):
                raise RuntimeError

        expected = pytest.raises(UserCodeError, match=r"it raised Wordless: \(its message cannot")
        with expected, user_code("it"):
            raise Wordless

    def test_makes_no_options_of_what_the_user_quotes(self):
        expected = pytest.raises(UserCodeError, match=r"raised ValueError: pass 'labels'$")
        with expected, user_code("it"):
            raise ValueError("pass `labels`")

    def test_quotes_the_last_line_of_a_worker(self):
        quoted = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent "
        quoted += 'call last):\n  File "data.py", line 3\nOSError: no such image\nor another\n'
        expected = r"raised OSError: OSError: no such image\nor another \(in a worker process\)$"
        with pytest.raises(UserCodeError, match=expected), user_code("it"):
            raise OSError(quoted)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
    def test_lets_interrupts_pass(self, error):
        with pytest.raises(error), user_code("it"):
            raise error
