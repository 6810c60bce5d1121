"""The recipes for Lightning, transformers and PyTorch Geometric."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.console import console_blocks, play
from tests.held_out import naive_metrics
from tests.oracle import StateDict, assert_mean
from tests.recipes import assert_metrics, assert_statistics


def test_lightning(recipe):
    module, printed = recipe("lightning_module")
    files = {
        name: torch.load(name, weights_only=True)
        for name in ("ckpts/last.ckpt", "swa.ckpt", "refreshed.ckpt")
    }
    states = {Path(name).name: content["state_dict"] for name, content in files.items()}
    epochs = [f"ckpts/epoch={epoch}-step={20 * (epoch + 1)}.ckpt" for epoch in range(5, 12)]
    assert_mean(states["swa.ckpt"], [torch.load(path)["state_dict"] for path in epochs])
    data = module.Data()
    passes = [lambda model, x=inputs: model(x) for inputs, _ in data.train_dataloader()]
    model, names = module.LitModel(width=24), {"layers.1", "layers.4"}
    assert_statistics(states["refreshed.ckpt"], states["swa.ckpt"], model, names, passes)
    measure = functools.partial(naive_metrics, model, batches=list(data.val_dataloader()))
    assert_metrics(printed, states, measure)
    loaded = module.LitModel.load_from_checkpoint("refreshed.ckpt")
    assert loaded.hparams.width == 24
    last, refreshed = files["ckpts/last.ckpt"], files["refreshed.ckpt"]
    assert refreshed["optimizer_states"].__class__ is last["optimizer_states"].__class__
    assert refreshed["global_step"] == last["global_step"] == 240
    outputs = ["swa.ckpt", "refreshed.ckpt"]
    play_page("lightning", outputs)
    shutil.copy("lightning_module.py", "lit.py")
    play_readme("bn-refresh swa.ckpt", outputs)


def test_transformers(recipe):
    module, printed = recipe("hf_trainer")
    folders = {"checkpoint-320": "run/checkpoint-320"}
    folders |= {name: name for name in ("swa", "refreshed")}
    kind = transformers.ResNetForImageClassification
    models = {name: kind.from_pretrained(path) for name, path in folders.items()}
    states = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    steps = [f"run/checkpoint-{step}/model.safetensors" for step in range(160, 321, 32)]
    assert_mean(load_file("swa/model.safetensors"), [load_file(path) for path in steps])
    model = kind.from_pretrained("swa")
    names = {name for name, part in model.named_modules() if hasattr(part, "running_mean")}
    assert len(names) == 6
    passes = [
        lambda model, x=batch["pixel_values"]: model(pixel_values=x)
        for batch in module.train_loader()
    ]
    assert_statistics(states["refreshed"], states["swa"], model, names, passes)

    def measure(state: StateDict) -> dict[str, float]:
        """An example at a time."""
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            scores = [
                model(example["pixel_values"][None]).logits[0] for example in module.data(2, 1000)
            ]
        labels = [int(example["labels"]) for example in module.data(2, 1000)]
        return naive_classification(scores, labels)

    assert_metrics(printed, states, measure)
    play_page("transformers", ["swa", "refreshed"])
    shutil.copy("hf_trainer.py", "train.py")
    play_readme("bn-refresh swa/", ["swa"])


def test_graphs(recipe):
    pytest.importorskip("torch_geometric")
    module, printed = recipe("graphs")
    names = ("swa.safetensors", "refreshed.safetensors")
    epochs = [torch.load(f"ckpts/epoch_{epoch}.pt")["model"] for epoch in range(4, 10)]
    states = {"epoch_9.pt": epochs[-1]} | {name: load_file(name) for name in names}
    before, after = (states[name] for name in names)
    assert_mean(before, epochs)
    model, norms = module.Net(), {"norms.0.module", "norms.1.module"}
    passes = [lambda model, x=graphs: model(x) for graphs in module.train_loader()]
    assert len(passes) == 20
    assert_statistics(after, before, model, norms, passes)

    def measure(state: StateDict) -> dict[str, float]:
        """A graph at a time, with plain sums over its neighbours."""
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            scores = [naive_scores(model, graph) for graph in module.data(2, 400)]
        return naive_classification(scores, [int(graph.y) for graph in module.data(2, 400)])

    assert_metrics(printed, states, measure)


def play_page(page: str, outputs: Iterable[str]) -> None:
    """Run the console blocks of a recipe's page in the folder in which the recipe has run."""
    remove(outputs)
    for block in console_blocks(f"docs/recipes/{page}.md"):
        assert list(play(block))


def play_readme(command: str, outputs: Iterable[str]) -> None:
    """Run the README's console block with this command there."""
    remove(outputs)
    [block] = [each for each in console_blocks("README.md") if command in each]
    assert len(list(play(block))) == 2


def remove(outputs: Iterable[str]) -> None:
    for path in map(Path, outputs):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def naive_classification(scores: list[torch.Tensor], labels: list[int]) -> dict[str, float]:
    """Of the scores of each example, `[classes]`."""
    pairs = list(zip(scores, labels, strict=True))
    losses = [float(-each.log_softmax(0)[label]) for each, label in pairs]
    right = [int(each.argmax()) == label for each, label in pairs]
    return {"loss": fmean(losses), "accuracy": fmean(right)}


def naive_scores(model: Any, graph: Any) -> torch.Tensor:
    """The scores of one graph, by the matrix of its edges."""
    edges = torch.zeros(len(graph.x), len(graph.x))
    edges[graph.edge_index[1], graph.edge_index[0]] = 1
    nodes = graph.x
    for conv, norm in zip(model.convs, model.norms, strict=True):
        nodes = norm.module(conv.nn(nodes + edges @ nodes)).relu()
    scores: torch.Tensor = model.head(nodes.sum(0))
    return scores
