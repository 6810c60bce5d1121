"""The recipes for timm and torchvision's detectors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from tests.held_out import naive_metrics
from tests.oracle import StateDict, assert_mean
from tests.recipes import assert_metrics, assert_statistics


def layers(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)}


def test_timm(recipe):
    module, printed = recipe("timm_image")
    files = "ckpts/last.pth.tar", "swa.pth.tar", "refreshed.pth.tar"
    states = {Path(path).name: load(path) for path in files}
    before, after = (states[path] for path in files[1:])
    epochs = [load(f"ckpts/checkpoint-{epoch}.pth.tar") for epoch in range(3, 8)]
    assert_mean(before, epochs)
    model = timm.create_model("test_resnet", num_classes=4)
    names = layers(model)
    assert len(names) == 15
    passes = [lambda model, x=images: model(x) for images, _ in module.train_loader()]
    assert_statistics(after, before, model, names, passes)
    measure = functools.partial(naive_metrics, model, batches=list(module.held_out()))
    assert_metrics(printed, states, measure)
    assert printed["refreshed.pth.tar"]["loss"] < printed["last.pth.tar"]["loss"]


def load(path: str) -> StateDict:
    content = torch.load(path, weights_only=False)
    state: StateDict = content.get("state_dict", content)
    return state


def test_detection(recipe):
    module, printed = recipe("detection")
    files = "swa.safetensors", "refreshed.safetensors"
    epochs = [torch.load(f"ckpts/model_{epoch}.pth")["model"] for epoch in range(4, 9)]
    states = {"model_8.pth": epochs[-1]} | {path: load_file(path) for path in files}
    before, after = (states[path] for path in files)
    assert_mean(before, epochs)
    model = module.make_model()
    names = layers(model)
    assert len(names) == 8
    assert all(name.startswith("head.") for name in names)
    passes = [
        lambda model, x=images: model.head([model.backbone(model.transform(list(x))[0].tensors)])
        for images, _ in module.train_loader()
    ]
    assert_statistics(after, before, model, names, passes)
    measure = functools.partial(naive_recall, model, list(module.data(2, 200)))
    assert_metrics(printed, states, measure)
    assert printed["refreshed.safetensors"]["recall"] > 0.5


def naive_recall(model: Any, examples: list[Any], state: StateDict) -> dict[str, float]:
    """An image and an object at a time."""
    model.load_state_dict(state)
    model.eval()
    hits = []
    for image, target in examples:
        with torch.no_grad():
            [detected] = model([image])
        first = list(
            zip(detected["boxes"][:2].tolist(), detected["labels"][:2].tolist(), strict=True)
        )
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            hits.append(any(kind == label and overlap(box, other) > 0.7 for other, kind in first))
    return {"recall": sum(hits) / len(hits)}


def overlap(box: list[float], other: list[float]) -> float:
    """The intersection of two boxes over their union."""
    low = [max(pair) for pair in zip(box[:2], other[:2], strict=True)]
    high = [min(pair) for pair in zip(box[2:], other[2:], strict=True)]
    both = max(high[0] - low[0], 0) * max(high[1] - low[1], 0)
    areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (box, other)]
    return both / (sum(areas) - both)
