"""Find the state dicts in what a torch file holds, and take the right one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg.errors import SelectionError, printable
from ckptavg.formats.unpickler import PickledTensor, UnreadableTensor

if TYPE_CHECKING:
    from pathlib import Path

StateDicts = dict[str, Mapping[str, object]]

# Where trainers put the weights themselves, the surest name first.
_PLAIN = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
# What averages and their like are called: `state_dict_ema`, `swa_state_dict`, `model_ema`.
_AVERAGES = ("ema", "swa", "avg", "average", "averaged", "shadow", "teacher")
# Where tensors are that are no weights.
_TRAINING = ("optim", "sched", "rng", "scaler", "loops", "callbacks", "sampler", "criterion")
_DEEPEST = 2


def find_state_dicts(root: object) -> StateDicts:
    """Every state dict in what a file holds, by its dotted path (empty for the whole file)."""
    if isinstance(root, PickledTensor | UnreadableTensor) or not isinstance(root, Mapping):
        return {}
    if is_state_dict(root):
        return {"": root}
    found: StateDicts = {}
    _search(root, "", found, _DEEPEST)
    return found


def is_state_dict(value: object) -> bool:
    """Whether it maps names to tensors: strings as keys, a tensor among the values, no tree."""
    return (
        _holds_tensors(value)
        and all(isinstance(name, str) for name in value)
        and not any(
            _holds_tensors(item)
            for name, item in value.items()
            if not name.endswith("_extra_state")
        )
    )


def _holds_tensors(value: object) -> TypeGuard[Mapping[Any, object]]:
    return isinstance(value, Mapping) and any(
        isinstance(item, PickledTensor | UnreadableTensor) for item in value.values()
    )


def _search(node: Mapping[Any, object], path: str, found: StateDicts, depth: int) -> None:
    for name, value in node.items():
        if not isinstance(name, str) or not isinstance(value, Mapping):
            continue
        if any(part in name.lower() for part in _TRAINING):
            continue
        if is_state_dict(value):
            found[path + name] = value
        elif depth > 1:
            _search(value, f"{path}{name}.", found, depth - 1)


def choose(path: Path, found: StateDicts, key: str | None) -> str:
    """Which of the state dicts is meant.

    Args:
        path: the file, for messages.
        found: the state dicts in it.
        key: the one that the user asked for, if he did.

    Raises:
        SelectionError: there is none, not the one asked for, or the choice is unclear.
    """
    if key is not None and key in found:
        return key
    if not found:
        raise SelectionError("no state dict found in it", path=path)
    if key is not None:
        raise SelectionError(f"no state dict {key!r} in it; there are: {_listing(found)}", path=path)
    if "current_model_state" in found and "state_dict" in found:
        # Lightning's WeightAveraging: `state_dict` is its running average, this the weights.
        return "current_model_state"
    plain = [name for name in found if not is_average(name)]
    if len(plain) == 1:
        return plain[0]
    known = [name for name in _PLAIN if name in plain]
    if len(known) != 1:
        raise SelectionError(
            f"several state dicts in it: {_listing(found)}",
            path=path,
            remedy="take one with --key",
            choices=tuple(found),
        )
    return known[0]


def is_average(key: str) -> bool:
    """Whether a state dict's name says that it is an average of others already."""
    words = key.lower().replace(".", "_").split("_")
    return any(word in _AVERAGES for word in words)


def _listing(found: StateDicts) -> str:
    return ", ".join(printable(name) or "the whole file" for name in found)


def training_facts(root: object) -> dict[str, int | float]:
    """What the file records of its place in the training: step, epoch, learning rate."""
    if not isinstance(root, Mapping):
        return {}
    facts: dict[str, int | float] = {
        name: root[name] for name in ("global_step", "step", "epoch") if type(root.get(name)) is int
    }
    rate = _learning_rate(root)
    if rate is not None:
        facts["learning_rate"] = rate
    return facts


def _learning_rate(root: Mapping[Any, object]) -> float | None:
    """The first parameter group's rate, as any torch optimizer's state dict has it."""
    for name, value in root.items():
        if not isinstance(name, str) or "optim" not in name.lower():
            continue
        match value[0] if isinstance(value, list) and value else value:
            case {"param_groups": [{"lr": int() | float() as rate}, *_]}:
                return float(rate)
    return None
