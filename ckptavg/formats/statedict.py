"""Find the state dicts in what a torch file holds, and take the right one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg.errors import FormatError, SelectionError, printable
from ckptavg.formats.modules import ModuleReader, is_module
from ckptavg.formats.pickled import PickledTensor, Placeholder, UnreadableTensor

if TYPE_CHECKING:
    from pathlib import Path

StateDicts = dict[str, Mapping[str, object]]

# Where trainers put the weights themselves.
_PLAIN = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
# What averages and their like are called: `state_dict_ema`, `swa_state_dict`, `model_ema`.
_AVERAGES = ("ema", "swa", "avg", "average", "averaged", "shadow", "teacher")
# How the names begin of what holds tensors that are no weights.
_TRAINING = ("optim", "sched", "rng", "scaler", "loops", "callbacks", "sampler", "criterion")
# DeepSpeed's pieces of weights that `module` has as a whole.
_NO_WEIGHTS = ("frozen_param_fragments",)
# What stands beside the weights in a checkpoint of DeepSpeed's engine.
_DEEPSPEED_MARKS = ("ds_version", "ds_config", "dp_world_size")
_DEEPEST = 2
_MOST = 1_000
_LONGEST_NAME = 1_000  # of what holds a state dict; mappings without end can share a longer one


def find_state_dicts(root: object, path: Path | None = None, key: str | None = None) -> StateDicts:
    """Every state dict in what a file holds, by its dotted path (empty for the top).

    A whole model counts as the state dict that it would give. Tensors at the top, with state dicts
    beside them, are one of their own.

    Args:
        root: what the file holds.
        path: the file, for messages.
        key: the one that is wanted, which counts whatever its name says.

    Raises:
        FormatError: a whole model in it has no end, or what no model has.
    """
    finder = _Finder(path)
    if is_module(root):
        whole = finder.modules.state_dict(root)
        return {"": whole} if finder.is_state_dict(whole) else {}
    if not isinstance(root, Mapping):
        return {}
    if finder.is_state_dict(root):
        return {"": root}
    finder.search(root, "", _DEEPEST)
    found = {**finder.at_the_top(root), **finder.found}
    if key and key not in found:
        found |= finder.named(root, key)
    distinct = {id(value): value for value in found.values()}
    counters = {number: _is_counters(value) for number, value in distinct.items()}
    weights = {name: value for name, value in found.items() if not counters[id(value)]}
    return weights or found


def _is_counters(value: Mapping[Any, object]) -> bool:
    """Whether its tensors are numbers all of them: what trainers count."""
    tensors = [
        item for item in value.values() if isinstance(item, PickledTensor | UnreadableTensor)
    ]
    return bool(tensors) and all(getattr(item, "shape", None) == () for item in tensors)


class _Finder:
    """Looks at each mapping once, however often a file refers to it, or it to itself."""

    def __init__(self, path: Path | None) -> None:
        self.found: StateDicts = {}
        self.modules = ModuleReader(path)
        self._verdicts: dict[int, bool] = {}
        self._with_tensors: dict[int, bool] = {}
        self._tensors_below: dict[tuple[int, int], bool] = {}
        self._kept: list[object] = []
        self._barren: set[tuple[int, int]] = set()

    def is_state_dict(self, value: Mapping[Any, object]) -> bool:
        """Whether it maps names to tensors: strings as keys, some tensors, no tree."""
        verdict = self._verdicts.get(id(value))
        if verdict is None:
            verdict = self._verdicts[id(value)] = (
                self._holds_tensors(value)
                and all(isinstance(name, str) for name in value)
                and not any(self._holds_state_dict(name, item) for name, item in value.items())
            )
        return verdict

    def _holds_state_dict(self, name: str, item: object) -> bool:
        """Whether an entry of a mapping is no part of a state dict, but has tensors of its own."""
        if name.endswith("_extra_state"):
            return False
        return is_module(item) or self._holds_below(item, _DEEPEST)

    def _holds_below(self, value: object, depth: int) -> bool:
        """Whether there are tensors in it, or so many levels down."""
        if not isinstance(value, Mapping):
            return False
        if self._holds_tensors(value):
            return True
        known = self._tensors_below.get((id(value), depth))
        if known is None:
            known = self._tensors_below[id(value), depth] = depth > 0 and any(
                self._holds_below(item, depth - 1) for item in value.values()
            )
        return known

    def at_the_top(self, root: Mapping[Any, object]) -> StateDicts:
        """The tensors that stand at the top beside state dicts, as weights of their own.

        They are none if they are but numbers, or if weights stand where trainers put them.
        """
        if any(name in _PLAIN for name in self.found) or not all(
            isinstance(name, str) for name in root
        ):
            return {}
        own = {
            name: item
            for name, item in root.items()
            if not (is_training(name) or self._holds_state_dict(name, item))
        }
        self._kept.append(own)  # while its identity stands for it
        return {} if not self._holds_tensors(own) or _is_counters(own) else {"": own}

    def named(self, root: Mapping[Any, object], key: str) -> StateDicts:
        """What stands at a dotted path, whatever its name says."""
        node: object = root
        for name in key.split("."):
            node = node.get(name) if isinstance(node, Mapping) else None
        value = self.modules.state_dict(node) if is_module(node) else node
        return {key: value} if isinstance(value, Mapping) and self.is_state_dict(value) else {}

    def _holds_tensors(self, value: object) -> bool:
        if not isinstance(value, Mapping):
            return False
        holds = self._with_tensors.get(id(value))
        if holds is None:
            holds = self._with_tensors[id(value)] = any(
                isinstance(item, PickledTensor | UnreadableTensor) for item in value.values()
            )
        return holds

    def search(self, node: Mapping[Any, object], path: str, depth: int) -> None:
        """Go down so many levels."""
        if (id(node), depth) in self._barren:
            return
        before = len(self.found)
        for name, item in node.items():
            if not isinstance(name, str) or len(name) > _LONGEST_NAME or is_training(name):
                continue
            # Further down a model is rather one of a configuration.
            value = self.modules.state_dict(item) if is_module(item) and not path else item
            if not isinstance(value, Mapping):
                continue
            if len(self.found) >= _MOST:
                return
            if self.is_state_dict(value):
                self.found[path + name] = value
            elif depth > 1:
                self.search(value, f"{path}{name}.", depth - 1)
        if len(self.found) == before:
            self._barren.add((id(node), depth))


def is_training(name: str) -> bool:
    """Whether a key's name says optimizer or the like."""
    return name in _NO_WEIGHTS or any(word.startswith(_TRAINING) for word in _words(name))


def _words(name: str) -> list[str]:
    return re.split(r"[\W_]+", name.lower())


def check_kind(path: Path, root: object, found: StateDicts) -> None:
    """Refuse a file without its weights, or with an object instead of a state dict.

    Args:
        path: the file, for messages.
        root: what it holds.
        found: the state dicts in that.

    Raises:
        FormatError: the weights are spread over other files.
        SelectionError: it holds no state dict, and an object that may have had one.
    """
    if is_deepspeed(root) and (path.name.startswith("zero_pp_rank_") or is_partitioned(root)):
        raise FormatError(
            "holds no whole weights: DeepSpeed's ZeRO stage 3 spread them over other files",
            path=path,
            remedy="join them with the zero_to_fp32.py that DeepSpeed leaves beside the "
            "checkpoint, and average what that writes",
        )
    whole = None if found else _whole_object(root)
    if whole is not None:
        raise SelectionError(
            f"holds a whole {printable(whole.origin)} object, no state dict",
            path=path,
            remedy="load it where its class can be imported, and save its state_dict()",
        )


def is_deepspeed(root: object) -> TypeGuard[Mapping[Any, object]]:
    """Whether DeepSpeed's engine wrote this, by what stands beside the weights."""
    return (
        isinstance(root, Mapping)
        and "module" in root
        and any(mark in root for mark in _DEEPSPEED_MARKS)
    )


def is_partitioned(root: Mapping[Any, object]) -> bool:
    """Whether the weights are spread over other files: stage 3 of ZeRO."""
    match root.get("ds_config"):
        case {"zero_optimization": {"stage": 3}}:
            return True
    module = root["module"]
    if not isinstance(module, Mapping):
        return False
    return any(_is_emptied(module.get(name), shape) for name, shape in _shapes(root))


def _is_emptied(value: object, shape: object) -> bool:
    return isinstance(value, PickledTensor) and value.shape == (0,) and shape != (0,)


def _shapes(root: Mapping[Any, object]) -> Iterator[tuple[object, object]]:
    """Name and shape of each parameter, of the trained ones and of the frozen ones."""
    groups = root.get("param_shapes")
    for group in (*(groups if isinstance(groups, list) else ()), root.get("frozen_param_shapes")):
        if isinstance(group, Mapping):
            yield from group.items()


def _whole_object(root: object) -> Placeholder | None:
    """What stands where a state dict would: the file itself, or an entry that is called so."""
    places = [root.get(name) for name in _PLAIN] if isinstance(root, Mapping) else [root]
    return next((value for value in places if isinstance(value, Placeholder)), None)


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
        raise SelectionError(
            f"no state dict {key!r} in it; there are: {_listing(found)}", path=path
        )
    if "current_model_state" in found and "state_dict" in found:
        # Lightning's WeightAveraging: `state_dict` is its running average, this the weights.
        return "current_model_state"
    if len(found) == 1:
        return next(iter(found))
    plain = [name for name in found if not is_average(name)]
    if len(plain) == 1:
        return plain[0]
    known = [name for name in _PLAIN if name in plain]
    if len(known) != 1:
        raise SelectionError(
            f"several state dicts in it: {_listing(found)}",
            path=path,
            remedy="take one with --key" + (" ('' is the top)" if "" in found else ""),
            choices=tuple(found),
        )
    return known[0]


def is_average(key: str) -> bool:
    """Whether a state dict's name says that it is an average of others already."""
    return any(word in _AVERAGES for word in _words(key))


def _listing(found: StateDicts) -> str:
    top = "the tensors at the top" if len(found) > 1 else "the whole file"
    return ", ".join(printable(name) or top for name in found)
