"""Paths and URLs: what is shown of them, what tells them apart, what is kept secret."""

from __future__ import annotations

import time
from pathlib import Path, PurePosixPath

import pytest

from ckptavg.errors import CkptAvgError, FormatError, printable
from ckptavg.formats.paths import absolute, as_path, is_remote, remote_errors
from ckptavg.select.names import relative_names

ADDRESS = "memory://user:secret@bucket/run/step_1.pt?token=secret"


class TestPrintable:
    @pytest.mark.parametrize(
        ("address", "shown"),
        [
            ("https://user:secret@host/x.pt", "https://host/x.pt"),
            ("s3://secret@bucket/x", "s3://bucket/x"),
            ("https://host/x.pt?token=secret", "https://host/x.pt"),
            ("https://user:secret@host/x.pt?a=secret&b=secret", "https://host/x.pt"),
            ("https://host/x?token=secret gives 404", "https://host/x gives 404"),
            ("no https://a:secret@b/c?d=secret nor s3://secret@e", "no https://b/c nor s3://e"),
            ("https://user:se@ret@host/x.pt", "https://host/x.pt"),
            ("s3://bucket/my run/x.pt?versionId=secret", "s3://bucket/my run/x.pt"),
            ("s3://a/x and s3://b/y?c=secret\ns3://d?e=secret", "s3://a/x and s3://b/y\\ns3://d"),
            ("/run/user@host/what?.pt", "/run/user@host/what?.pt"),
            ("s3://bucket/a@b", "s3://bucket/a@b"),
        ],
    )
    def test_shows_addresses_without_secrets(self, address, shown):
        assert printable(address) == shown

    def test_is_one_line_of_a_terminal(self):
        assert printable("a\nb\x1b[31m\x7f\x9b\u2028\ud800") == (
            "a\\nb\\x1b[31m\\x7f\\x9b\\u2028\\ud800"
        )

    def test_is_not_endless(self):
        assert printable("x" * 1000) == "x" * 300 + "... (1000 long)"

    def test_takes_no_time_for_a_name_made_to_take_it(self):
        before = time.process_time()
        printable("://" * 100_000)
        printable("://" + "a" * 100_000 + "@:" * 100_000)
        assert time.process_time() - before < 30

    def test_leaves_other_names_as_they_are(self):
        assert printable("слой.вес 日本 'q'\\") == "слой.вес 日本 'q'\\"

    def test_holds_for_what_an_error_says(self):
        error = CkptAvgError("is damaged", path=ADDRESS, tensor="a\tb")
        assert str(error) == "memory://bucket/run/step_1.pt: a\\tb: is damaged"


class TestAsPath:
    def test_takes_paths_as_they_are(self):
        assert as_path("a/b") == as_path(Path("a/b")) == Path("a/b")
        assert not is_remote(as_path("a/b"))

    @pytest.mark.parametrize("url", ["file:///a/b.pt", "local:///a/b.pt"])
    def test_takes_urls_of_this_machine_as_paths(self, url):
        path = as_path(url)
        assert path == Path("/a/b.pt")
        assert isinstance(path, Path)
        assert not is_remote(path)

    def test_takes_urls_and_what_it_made_of_them(self):
        path = as_path("memory://bucket/run")
        assert is_remote(path)
        assert as_path(path) is path

    @pytest.mark.parametrize("text", ["memory", b"memory", Path("x"), 7, None])
    def test_nothing_else_is_remote(self, text):
        assert not is_remote(text)

    def test_shows_no_secret_of_an_unknown_address(self):
        with pytest.raises(CkptAvgError) as caught:
            as_path("nonsense://user:secret@host/x?token=secret")
        assert "secret" not in str(caught.value)
        assert "nonsense://host/x" in str(caught.value)


class TestAbsolute:
    @pytest.mark.parametrize("url", [ADDRESS, "memory://bucket/run/step_1.pt"])
    def test_of_a_url_has_no_secret(self, url):
        assert absolute(as_path(url)) == PurePosixPath("/bucket/run/step_1.pt")

    def test_of_a_path_keeps_its_links(self, tmp_path, monkeypatch):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        monkeypatch.chdir(tmp_path)
        assert absolute(Path("real/../link/x")) == tmp_path / "link" / "x"


class TestLabels:
    def test_are_below_the_common_folder(self, tmp_path):
        paths = [tmp_path / "a" / "x.pt", tmp_path / "b" / "x.pt"]
        assert [*relative_names(paths).values()] == ["a/x.pt", "b/x.pt"]

    def test_here_and_behind_urls_have_no_folder_in_common(self, tmp_path):
        paths = [tmp_path / "a.pt", as_path(ADDRESS), as_path("memory://bucket/run/step_2.pt")]
        assert [*relative_names(paths).values()] == ["a.pt", "step_1.pt", "step_2.pt"]


class TestRemoteErrors:
    def test_says_in_one_line_what_a_store_raises(self):
        with pytest.raises(CkptAvgError) as caught, remote_errors(as_path(ADDRESS)):
            raise RuntimeError(f"403 for {ADDRESS}\nbecause")
        assert str(caught.value) == (
            "memory://bucket/run/step_1.pt: cannot read it: "
            "403 for memory://bucket/run/step_1.pt\\nbecause"
        )

    def test_names_what_says_nothing(self):
        with (
            pytest.raises(CkptAvgError, match="cannot read it: KeyError"),
            remote_errors(as_path(ADDRESS)),
        ):
            raise KeyError

    def test_leaves_errors_of_ours_alone(self):
        with pytest.raises(FormatError, match=r"^is damaged$"), remote_errors(as_path(ADDRESS)):
            raise FormatError("is damaged")

    def test_leaves_what_this_machine_raises_alone(self, tmp_path):
        with pytest.raises(RuntimeError, match="a bug"), remote_errors(tmp_path):
            raise RuntimeError("a bug")
