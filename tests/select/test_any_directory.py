"""Any directory of a series and others: the mean of the series, or an error that says why not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import ckptavg
from ckptavg.cli import cli
from ckptavg.errors import CkptAvgError
from ckptavg.formats.words import WORDS, Word
from tests.oracle import naive_mean, same_bits

SERIES = (
    "epoch_{}.pt", "{}epoch.pth", "step={}.ckpt", "checkpoint-{}/model.pt", "model{:06}.pt",
    "tokens_{}B.pt", "epoch={}-loss=0.5.ckpt", "loss_-0.{}-it{}.pt", "x.{}.bin",
    "a_2024-05-17_{}.pt", "iter_{:07}.pth.tar",
)  # fmt: skip
OPTIMIZER = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def name_of(template: str, number: int) -> str:
    return template.format(number, number)


def beside(word: Word, template: str, way: int, number: int) -> str:
    """A name with a word of the table: by itself, in front, behind, or as trainers write it."""
    stem, dot, suffix = name_of(template, number).rpartition("/")[2].partition(".")
    names = (
        word.example,
        f"{word.word}.pt",
        f"{word.word}_{number}.pt",
        f"{word.word}_{stem}{dot}{suffix}",
        f"{stem}_{word.word}{dot}{suffix}",
        f"{stem}-{word.word}{number}{dot}{suffix}",
        f"{word.word}-{number}/model.pt",
    )
    return names[way % len(names)]


def put(path: Path, value: float, *, is_weightless: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({"w": torch.full((3,), value)}, path)
    elif path.suffix:
        torch.save(OPTIMIZER if is_weightless else {"w": torch.full((3,), value)}, path)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    template=st.sampled_from(SERIES),
    numbers=st.lists(st.integers(1, 30), min_size=2, max_size=4, unique=True),
    others=st.lists(
        st.tuples(st.sampled_from(WORDS), st.integers(0, 6), st.integers(1, 30)), max_size=5
    ),
)
def test_the_mean_of_the_plain_series_or_an_error(template, numbers, others):
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "dir", Path(place) / "out.safetensors"
        series = {name_of(template, number): float(number) for number in numbers}
        for name, value in series.items():
            put(folder / name, value)
        names = {beside(word, template, way, n): word for word, way, n in others}
        for value, (name, word) in enumerate(names.items(), 100):
            if name not in series:
                put(folder / name, value + 0.5, is_weightless=word.kind == "no weights")
        shown = CliRunner().invoke(cli, ["inspect", "--json", str(folder)])
        rows = json.loads(shown.stdout)["checkpoints"] if shown.exit_code == 0 else []
        taken = [row["path"] for row in rows if row["selected"]]
        try:
            summary = ckptavg.average(folder, out)
        except CkptAvgError as error:
            text = str(error)
            assert not taken
            assert len(text.splitlines()) <= 20
            assert any(
                said in text
                for said in (
                    "series of checkpoints",
                    "pieces of one model",
                    "the same step twice",
                    "no index of them",
                )
            )
        else:
            assert [source.path for source in summary.sources] == taken
            expected = naive_mean([torch.full((3,), value) for value in sorted(series.values())])
            assert same_bits(load_file(out)["w"], expected), names
