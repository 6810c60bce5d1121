"""What a loader yields: nested dicts, lists and tuples of tensors."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from ckptavg.errors import RefreshError, listed
from ckptavg.model.factories import user_code

Numbered = Iterator[tuple[int, Any]]
"""Batches with their numbers in the whole pass."""
Formats = Mapping[int, torch.memory_format]
"""Memory formats of images by their number of dimensions; images of another number keep theirs."""


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the model, by its first tensor."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def moved(batch: Any, device: torch.device) -> Any:  # noqa: ANN401 - what the user's loader yields
    """The batch with all its tensors on a device.

    Containers keep their types; an object with a `to` of its own (a packed sequence, a graph)
    moves itself.
    """

    def move(leaf: Any) -> Any:  # noqa: ANN401
        if not isinstance(leaf, torch.Tensor):
            return leaf.to(device)
        # Only copies to a GPU are in order with what reads them.
        return leaf.to(device, non_blocking=device.type == "cuda")

    return _changed(batch, move)


def in_formats(batch: Any, formats: Formats) -> Any:  # noqa: ANN401
    """The batch with its images, which are of a floating dtype, in the memory formats."""

    def convert(leaf: Any) -> Any:  # noqa: ANN401
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        layout = formats.get(leaf.dim())
        return leaf if layout is None else leaf.contiguous(memory_format=layout)

    return _changed(batch, convert) if formats else batch


def pinned(batch: Any) -> Any:  # noqa: ANN401
    """The batch with its tensors in memory from which a GPU can fetch them by itself."""
    return _changed(batch, lambda leaf: leaf.pin_memory() if _is_pinnable(leaf) else leaf)


def _is_pinnable(leaf: Any) -> bool:  # noqa: ANN401
    if isinstance(leaf, torch.Tensor):
        return leaf.device.type == "cpu" and leaf.layout == torch.strided
    return callable(getattr(leaf, "pin_memory", None))


def cloned(batch: Any) -> Any:  # noqa: ANN401
    """The batch with tensors of its own."""
    return _changed(batch, lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)


def leaves(batch: Any) -> list[Any]:  # noqa: ANN401
    """All tensors in the batch, and the objects that move themselves."""
    found = []

    def take(leaf: Any) -> Any:  # noqa: ANN401
        found.append(leaf)
        return leaf

    _changed(batch, take)
    return found


def _changed(batch: Any, change: Callable[[Any], Any]) -> Any:  # noqa: ANN401
    """The batch with each leaf that has a `to` changed; containers keep their types."""
    if callable(getattr(batch, "to", None)):
        return change(batch)
    if isinstance(batch, Mapping):
        return _like(batch, {key: _changed(value, change) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        elements = [_changed(value, change) for value in batch]
        return type(batch)(*elements) if hasattr(batch, "_fields") else type(batch)(elements)
    return batch


def _like(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the batch's type, where that can be had, with new values."""
    if not isinstance(batch, MutableMapping):
        return items
    copied = copy.copy(batch)
    copied.update(items)
    return copied


def default_forward(model: torch.nn.Module, batch: Any) -> object:  # noqa: ANN401
    """Call the model with a batch.

    With a tensor, or the first element of a list or tuple; with the values of a dict by their keys
    if the model's `forward` takes them all; with an object that moves itself to a device, such as
    a batch of graphs.

    Raises:
        RefreshError: the batch is something else.
    """
    if isinstance(batch, Mapping) and _takes(model, batch):
        return model(**batch)
    given = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(given, torch.Tensor) and (
        isinstance(given, Mapping | list | tuple) or not callable(attribute_of(given, "to"))
    ):
        what = f"a {type(given).__name__}"
        if isinstance(given, Mapping):
            what = f"a dict of {listed(given)}"
        if given is not batch:
            what = f"a {type(batch).__name__} that begins with {what}"
        raise RefreshError(
            f"the loader yields {what}, and it is unclear how the model is called with it",
            remedy="give `forward`, a function of the model and the batch",
        )
    return model(given)


def _takes(model: torch.nn.Module, batch: Mapping[Any, Any]) -> bool:
    """Whether the keys of a batch are what the model's `forward` wants."""
    try:
        inspect.signature(model.forward).bind(**batch)
    except (TypeError, ValueError):
        return False
    return True


def count_examples(batch: Any) -> int:  # noqa: ANN401
    """Examples in a batch: the leading dimension of its first tensor or array.

    A batch of graphs says how many it has. A list of tensors, and lists of its length beside it,
    hold an example in each element, unless all tensors share their leading dimension, as those of
    a collated batch do. Whatever else there is counts as one: limits on the number of examples come
    to an end with every loader.
    """
    return _count_examples(batch) or 1


def _count_examples(batch: Any) -> int:  # noqa: ANN401
    stated = _stated_count(batch)
    if stated is not None:
        return stated
    elements = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(elements, list | tuple):
        return 0
    lists = [each for each in elements if isinstance(each, list | tuple)]
    of_arrays = [each for each in lists if each and _are_arrays(each)]
    is_collated = len(of_arrays) == len(lists) and len(set(_leading_sizes(elements))) == 1
    if of_arrays and len({len(each) for each in lists}) == 1 and not is_collated:
        return len(of_arrays[0])
    if len(elements) > 1 and all(isinstance(each, Mapping) for each in elements):
        return len(elements)
    counted = next((count for count in map(_count_examples, elements) if count), 0)
    return counted or (len(batch) if isinstance(batch, list) else 0)


def _stated_count(batch: Any) -> int | None:  # noqa: ANN401
    """What a batch of graphs, a packed sequence or an array says; None for containers."""
    if isinstance(batch, torch.nn.utils.rnn.PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, torch.Tensor):
        return int(batch.size(0)) if batch.dim() else None
    for name in ("num_graphs", "batch_size"):  # of PyTorch Geometric; of DGL
        count = attribute_of(batch, name)
        if isinstance(count, int):
            return count
    shape = attribute_of(batch, "shape")
    return int(shape[0]) if isinstance(shape, tuple) and shape else None


def attribute_of(thing: object, name: str) -> Any:  # noqa: ANN401
    """An attribute of a user's object; None if it has none, or raises when it is asked."""
    try:
        return getattr(thing, name, None)
    except Exception:  # noqa: BLE001 - the user's own
        return None


def _leading_sizes(batch: Any) -> Iterator[int]:  # noqa: ANN401
    """The leading dimension of each array in the batch."""
    stated = _stated_count(batch)
    if stated is not None:
        yield stated
    elif isinstance(batch, Mapping | list | tuple):
        for each in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leading_sizes(each)


def _are_arrays(elements: Sequence[Any]) -> bool:
    return all(_stated_count(each) is not None for each in elements)


def on_device(batches: Numbered, device: torch.device) -> Numbered:
    """The batches moved there, each while the device is busy with the one before.

    To a GPU they go from pinned memory, on a stream of their own: the next batch is drawn and on
    its way before the pass over the last one has ended.
    """
    if device.type != "cuda":
        for number, batch in batches:
            with user_code("moving a batch"):
                here = moved(batch, device)
            yield number, here
        return
    ahead = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[int, Any, torch.cuda.Event] | None = None
    for number, batch in batches:
        # The memory of an object that moves itself could be given away while it is in use.
        is_plain = all(isinstance(leaf, torch.Tensor) for leaf in leaves(batch))
        stream = ahead if is_plain else torch.cuda.current_stream(device)
        with user_code("moving a batch"), torch.cuda.stream(stream):
            here = moved(pinned(batch), device)
            arrived = stream.record_event()
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = number, here, arrived
    if waiting is not None:
        yield _arrived(*waiting, device)


def _arrived(
    number: int,
    batch: Any,  # noqa: ANN401
    event: torch.cuda.Event,
    device: torch.device,
) -> tuple[int, Any]:
    """A batch that the device's own stream may use."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(event)
    for leaf in leaves(batch):
        if isinstance(leaf, torch.Tensor):
            leaf.record_stream(stream)
    return number, batch
