"""Metrics: which way they are good, in names of files, in files of their own, and which win."""

from __future__ import annotations

import csv
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from ckptavg.errors import CkptAvgError, FormatError, SelectionError
from ckptavg.select.metrics import indices_of_best, metric_in_name, mode_of, read_metrics

# Which way


@pytest.mark.parametrize(
    "name",
    [
        "loss", "val_loss", "val/loss", "valLoss", "eval-loss", "LOSS", "train.loss", "loss1",
        "error", "top1_error", "err5", "perplexity", "ppl", "wer", "test_cer", "MAE", "mse",
        "RMSE", "nll", "FID", "fid50k",
    ],
)  # fmt: skip
def test_losses_and_errors_are_good_when_low(name):
    assert mode_of(name) == ("min" if name != "top1_error" else None)


@pytest.mark.parametrize(
    "name",
    [
        "acc", "acc1", "best_acc5", "val_accuracy", "top1", "eval_top5", "f1", "val_f1", "macroF1",
        "auc", "AUROC", "mAP", "map50", "metrics/mAP50-95(B)", "bleu", "BLEU4", "rougeL", "rouge2",
        "iou", "mIoU", "dice", "r2", "psnr", "SSIM", "precision", "recall",
    ],
)  # fmt: skip
def test_scores_are_good_when_high(name):
    assert mode_of(name) == "max"


@pytest.mark.parametrize(
    "name",
    [
        "", "metric", "score", "fitness", "lr", "glossy", "account", "mapping", "closs", "answer",
        "loss_acc", "accuracy_error", "neg_mean_squared_error", "negLoss", "loss_scale", "r", "f",
        "top", "1", "_", "grad_norm", "eval_runtime",
    ],
)  # fmt: skip
def test_nothing_is_guessed(name):
    assert mode_of(name) is None


# In names


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [
        ("epoch=3-val_loss=0.12.ckpt", "val_loss", 0.12),
        ("epoch=3-val_loss=0.12-v1.ckpt", "val_loss", 0.12),
        ("epoch=3-val_loss=0.12.ckpt", "epoch", 3.0),
        ("epoch=03-step=400-val_loss=-1.50.ckpt", "val_loss", -1.5),
        ("epoch=3-val_loss=1e-05.ckpt", "val_loss", 1e-5),
        ("epoch=3-val_loss=1.5E+3.ckpt", "val_loss", 1500.0),
        ("epoch=3-val_loss=7.ckpt", "val_loss", 7.0),
        ("epoch=3-val/loss=0.12.ckpt", "val/loss", 0.12),
        ("epoch=3-val_loss=0.12.ckpt", "val/loss", 0.12),
        ("step_100_acc0.93.pt", "acc", 0.93),
        ("step_100_acc93.pt", "acc", 93.0),
        ("step_100_acc_93.5.pt", "acc", 93.5),
        ("step_100-acc-93.5.pt", "acc", 93.5),
        ("step_100-loss--0.5.pt", "loss", -0.5),
        ("acc_0.93_step_100.pt", "acc", 0.93),
        ("acc0.93_100.pt", "acc", 0.93),
        ("Acc=0.93.pth.tar", "acc", 0.93),
        ("model_acc0.93.pt", "acc", 0.93),
        ("epoch=3-val_loss=0.12.ckpt", "loss", 0.12),
        ("loss=0.3-val_loss=0.12.ckpt", "loss", 0.3),
        ("val_loss=0.12-loss=0.3.ckpt", "loss", 0.3),
        ("acc1_76.5.pt", "acc1", 76.5),
        ("f1=0.5.pt", "f1", 0.5),
        ("loss=inf.pt", "loss", math.inf),
        ("loss=-inf.pt", "loss", -math.inf),
    ],
)
def test_a_metric_is_read_from_a_name(name, metric, value):
    assert metric_in_name(name, metric) == value


@pytest.mark.parametrize("name", ["loss=nan.ckpt", "loss_nan.ckpt", "epoch=2-loss=NaN-v1.ckpt"])
def test_nan_is_read_as_such(name):
    found = metric_in_name(name, "loss")
    assert found is not None
    assert math.isnan(found)


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("epoch=3.ckpt", "val_loss"),
        ("glossy=0.3.pt", "loss"),
        ("loss.pt", "loss"),
        ("loss=.pt", "loss"),
        ("loss_info.pt", "loss"),
        ("lossless0.3.pt", "loss"),
        ("loss=0.93abc.pt", "loss"),
        ("acc0.93abc.pt", "acc"),
        ("acc93abc.pt", "acc"),
        ("acc1_76.5.pt", "acc"),
        ("acc1=76.5.pt", "acc"),
        ("acc12-3.pt", "acc"),
        ("train_loss=0.1-val_loss=0.2.ckpt", "loss"),
        ("loss=0.1-loss=0.2.ckpt", "loss"),
        ("anything0.5.pt", ""),
        ("anything0.5.pt", "._/"),
        ("loss=0.5.pt", ".*"),
    ],
)
def test_nothing_else_is(name, metric):
    assert metric_in_name(name, metric) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * (1 + (8 << 20)), "is 8 MB long, and a file of metrics is at most 8 MiB long"),
        ("," * 500_001, "has more than 500,000 cells"),
        ("a,1\n" * 250_001, "has more than 500,000 cells"),
        ("a\r" * 500_002, "has more than 500,000 cells"),
    ],
    ids=["bytes", "columns", "rows", "other line ends"],
)
def test_a_file_that_is_too_long_is_not_read(tmp_path, text, message):
    path = tmp_path / "metrics.csv"
    path.write_bytes(text.encode() + b"\n")
    with pytest.raises(FormatError, match=rf"metrics.csv: {message}; leave out the rows of other"):
        read_metrics(path, "loss")


def test_long_names_are_read_at_once():
    started = time.process_time()
    for piece in ("loss=", "loss1", "loss-", "1", "loss_1_", "e1", "-"):
        metric_in_name(piece * 5_000, "loss")
    assert time.process_time() - started < 5


# The best


@pytest.mark.parametrize(
    ("values", "count", "mode", "taken"),
    [
        ([0.3, 0.1, 0.2], 1, "min", [1]),
        ([0.3, 0.1, 0.2], 1, "max", [0]),
        ([0.3, 0.1, 0.2], 2, "min", [1, 2]),
        ([0.3, 0.1, 0.2], 2, "max", [0, 2]),
        ([0.3, 0.1, 0.2], 9, "max", [0, 1, 2]),
        ([math.nan, 0.1, math.nan], 2, "min", [1]),
        ([math.nan, 0.1, math.nan], 2, "max", [1]),
        ([None, 0.1, None, 0.2], 1, "min", [1]),
        ([math.inf, 0.1, -math.inf], 1, "min", [1]),
        ([math.inf, 0.1, -math.inf], 1, "max", [1]),
        ([0.1, 0.1, 0.1, 0.3], 2, "min", [1, 2]),
        ([0.9, 0.9, 0.9, 0.3], 1, "max", [2]),
        ([0.0, -0.0], 1, "max", [1]),
        ([math.nan, None], 1, "max", []),
        ([], 1, "max", []),
        ([0.1], 0, "max", []),
    ],
)
def test_the_best_win_nan_never_and_the_later_of_equals(values, count, mode, taken):
    assert indices_of_best(values, count, mode) == taken


def test_the_best_are_those_of_a_naive_search():
    for values in itertools.product((0.1, 0.2, None, math.nan), repeat=5):
        for count, mode in itertools.product((1, 2, 3), ("min", "max")):
            left = {i: v for i, v in enumerate(values) if v is not None and v == v}  # noqa: PLR0124
            wanted: list[int] = []
            while left and len(wanted) < count:
                top = min(left.values()) if mode == "min" else max(left.values())
                winner = max(index for index, value in left.items() if value == top)
                wanted.append(winner)
                del left[winner]
            assert indices_of_best(values, count, mode) == sorted(wanted)


# Files


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "metrics.txt"  # the content says what it is
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def by_csv(path: Path, rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


WANTED = {"a.pt": 0.5, "run/b, c.pt": -1e-3}


def test_csv_with_a_header(tmp_path):
    rows: list[list[Any]] = [
        ["checkpoint", "acc", "loss"],
        ["a.pt", 0.9, 0.5],
        ["run/b, c.pt", 0.8, -1e-3],
    ]
    path = by_csv(tmp_path / "m.csv", rows)
    assert read_metrics(path, "loss") == WANTED
    assert read_metrics(path, "acc") == {"a.pt": 0.9, "run/b, c.pt": 0.8}


def test_csv_of_two_columns_needs_no_header(tmp_path):
    rows: list[list[Any]] = [[name, value] for name, value in WANTED.items()]
    assert read_metrics(by_csv(tmp_path / "m.csv", rows), "whatever") == WANTED
    rows = [["name", "loss"], *rows]
    assert read_metrics(by_csv(tmp_path / "m.csv", rows), "loss") == WANTED


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffname,loss\r\na.pt,0.5\r\n\r\nb.pt,\r\nc.pt\r\nd.pt,nan\r\n",
        " name , loss \n a.pt , 0.5 \n b.pt,\n c.pt\n d.pt,NaN\n",
        "a.pt,0.5\nb.pt,\nc.pt\nd.pt,nan",
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path, text):
    found = read_metrics(write(tmp_path, text), "loss")
    assert found.keys() == {"a.pt", "d.pt"}
    assert found["a.pt"] == 0.5
    assert math.isnan(found["d.pt"])


@pytest.mark.parametrize(
    "content",
    [
        WANTED,
        {name: {"acc": 0.1, "loss": value} for name, value in WANTED.items()},
        [{"checkpoint": name, "loss": value, "acc": 1} for name, value in WANTED.items()],
        {
            "evaluations": [{"checkpoint": n, "loss": v, "batches": 3} for n, v in WANTED.items()],
            "notices": [],
        },
        {**WANTED, "c.pt": None},
        {name: {"loss": value} for name, value in WANTED.items()} | {"c.pt": {}},
    ],
)
def test_json_in_each_form(tmp_path, content):
    for indent in (None, 2):
        path = write(tmp_path, json.dumps(content, indent=indent))
        assert read_metrics(path, "loss") == WANTED


def test_json_may_have_nan(tmp_path):
    found = read_metrics(write(tmp_path, '{"a": NaN, "b": 1}'), "loss")
    assert math.isnan(found["a"])
    assert found["b"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a CSV"),
        ("a.pt\nb.pt", "not a CSV"),
        ("name,loss\na,x", r"of a, 'x' is no number"),
        ("a,0.1\na,0.2", "has two values of loss for a: 0.1 in line 1, and 0.2 in line 2"),
        (b"\xff\xfe\x00", "not text"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": true}', "no number"),
        ('{"a": "x\\u001b[2J"}', "no number"),
        ('{"a": [1]}', "no number"),
        ('{"a": 1' + "0" * 400 + "}", "no number"),
        ('{"a": 1, "b": {"loss": 2}}', "mixes values"),
        ('[{"loss": 1}]', 'without "checkpoint"'),
        ("[1]", 'without "checkpoint"'),
        ('[{"checkpoint": 3, "loss": 1}]', 'without "checkpoint"'),
        (
            '[{"checkpoint": "a", "loss": 1}, {"checkpoint": "a", "loss": 2}]',
            "1 in entry 1, and 2 in entry 2",
        ),
        ('{"evaluations": [3]}', 'without "checkpoint"'),
    ],
)
def test_what_is_no_such_file_is_an_error_of_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(FormatError, match=message) as caught:
        read_metrics(path, "loss")
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "name,acc,f1\na,1,2",
        "name,acc\na,1",
        '{"a": {"acc": 1, "f1": 2}}',
        '[{"checkpoint": "a", "acc": 1}]',
    ],
)
def test_a_metric_that_is_not_there_is_told_with_those_that_are(tmp_path, text):
    with pytest.raises(SelectionError, match="has no metric loss; there are: acc"):
        read_metrics(write(tmp_path, text), "loss")


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CkptAvgError, match="No such file"):
        read_metrics(tmp_path / "none.csv", "loss")


# Logs


def test_a_log_has_values_by_epoch_and_step_and_by_epoch_where_that_has_one(tmp_path):
    path = write(
        tmp_path,
        "acc,epoch,loss,step\n,0,0.5,1\n0.9,0,,3\n,0,0.4,3\n0.8,1,,7\n0.8,1,,7\n,,,7\n",
    )
    assert read_metrics(path, "acc") == {
        (0, 3): 0.9, (0, None): 0.9, (1, 7): 0.8, (1, None): 0.8,
    }  # fmt: skip
    assert read_metrics(path, "loss") == {(0, 1): 0.5, (0, 3): 0.4}
    assert read_metrics(write(tmp_path, "step,loss\n10,1\n20,2"), "loss") == {
        (None, 10): 1.0,
        (None, 20): 2.0,
    }


def test_what_a_log_contradicts_is_an_error_with_both_lines(tmp_path):
    path = write(tmp_path, "epoch,step,loss\n0,3,0.5\n0,3,\n1,7,0.4\n0,3,0.6\n")
    message = r"two values of loss for epoch 0, step 3: 0\.5 in line 2, and 0\.6 in line 5"
    with pytest.raises(FormatError, match=message):
        read_metrics(path, "loss")


def test_names_before_columns_of_epoch_and_step_are_names(tmp_path):
    path = write(tmp_path, "checkpoint,epoch,step,loss\na.pt,0,3,0.5\nb.pt,1,7,0.4\n")
    assert read_metrics(path, "loss") == {"a.pt": 0.5, "b.pt": 0.4}
