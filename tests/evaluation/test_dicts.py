"""Batches that are dicts, and outputs that have logits and a loss, as those of transformers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import ckptavg
from ckptavg.errors import CkptAvgError

pytestmark = pytest.mark.usefixtures("no_fsync", "user_folder")


class Output(NamedTuple):
    loss: torch.Tensor | None
    logits: torch.Tensor


class Model(nn.Module):
    """Twenty tokens; what becomes of the scores is up to the kind of the model."""

    def __init__(self, kind: str = "sequence") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 1 if kind == "regression" else 20 if kind == "causal" else 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        del attention_mask
        hidden = self.embed(input_ids)
        if self.kind == "causal":
            logits = self.head(hidden)
            pairs = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            return Output(cross_entropy(*pairs), logits)
        logits = self.head(hidden.mean(1))
        if labels is None:
            return Output(None, logits)
        if self.kind == "regression":
            return Output(mse_loss(logits[:, 0], labels), logits)
        if labels.is_floating_point():
            return Output(binary_cross_entropy_with_logits(logits, labels), logits)
        return Output(cross_entropy(logits, labels, label_smoothing=0.2), logits)


def batches(kind: str = "sequence") -> list[dict[str, Any]]:
    """Of 6, 6 and 2 examples."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, (14, 5), generator=generator)
    labels = {
        "sequence": ids.sum(1) % 3,
        "causal": ids,
        "regression": ids.float().mean(1),
        "several": (ids[:, :3] > 9).float(),
    }[kind]
    mask = torch.ones_like(ids)
    return [
        {"input_ids": a, "attention_mask": b, "labels": c}
        for a, b, c in zip(ids.split(6), mask.split(6), labels.split(6), strict=True)
    ]


@pytest.fixture
def evaluate(user_folder) -> Any:
    torch.save(Model().state_dict(), user_folder / "a.pt")

    def run(model: nn.Module, loader: Any, **options: Any) -> Any:
        torch.save(model.state_dict(), "a.pt")
        [found] = ckptavg.evaluate("a.pt", model=model, loader=loader, device="cpu", **options)
        return found.metrics

    return run


def joined(kind: str) -> dict[str, torch.Tensor]:
    return {name: torch.cat([each[name] for each in batches(kind)]) for name in batches(kind)[0]}


def test_the_loss_is_the_models_own_over_all_examples(evaluate):
    model = Model()
    with torch.no_grad():
        expected = model(**joined("sequence"))
    right = expected.logits.argmax(1) == joined("sequence")["labels"]
    found = evaluate(model, batches())
    assert found["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))
    assert evaluate(model, batches(), metric="loss") == {"loss": found["loss"]}


def test_without_a_loss_of_the_models_it_is_the_cross_entropy_of_the_logits(evaluate):
    model, whole = Model(), joined("sequence")
    tuples = [(batch["input_ids"], batch["labels"]) for batch in batches()]
    with torch.no_grad():
        expected = cross_entropy(model(whole["input_ids"]).logits, whole["labels"])
    assert evaluate(model, tuples)["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_labels_that_do_not_count_do_not(evaluate):
    loader = batches()
    loader[0]["labels"][:4] = -100
    loader[2]["labels"][:] = -100  # its loss is NaN
    kept = {
        name: torch.cat([loader[0][name][4:], loader[1][name]]) for name in ("input_ids", "labels")
    }
    with torch.no_grad():
        expected = float(Model()(**kept).loss)
    assert evaluate(Model(), loader)["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["causal", "regression", "several"])
def test_what_is_no_classification_has_a_loss_alone(kind, evaluate, notices):
    model = Model(kind)
    found = evaluate(model, batches(kind))
    assert found.keys() == {"loss"}
    assert found["loss"] == pytest.approx(model(**joined(kind)).loss.item(), rel=1e-5)
    assert "accuracy is not computed, as of language models: targets are " in notices.text
    with pytest.raises(CkptAvgError, match=r"targets are .*--metric FILE\.py:FUNCTION"):
        evaluate(model, batches(kind), metric="accuracy")


def test_a_loss_that_is_no_number_is_said(evaluate):
    model = Model()
    with torch.no_grad():
        model.head.bias.fill_(math.nan)
    found = evaluate(model, batches())
    assert math.isnan(found["loss"])
    assert math.isnan(found["accuracy"])


def test_a_dict_without_labels_is_an_error(evaluate):
    loader = [{"input_ids": batch["input_ids"]} for batch in batches()]
    with pytest.raises(CkptAvgError, match=r"neither \(inputs, targets\) nor dicts with labels"):
        evaluate(Model(), loader)


@pytest.mark.parametrize("value", [torch.tensor([0.25]), torch.tensor([[0.25]]).numpy()])
def test_a_metric_may_be_an_array_of_one_number(value, evaluate):
    def score(_model: nn.Module, _batches: object) -> object:
        return value

    assert evaluate(Model(), batches(), metric=score) == {"score": 0.25}
