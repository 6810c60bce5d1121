"""Find the state dicts in what a torch file holds, and choose those that are meant."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptavg.errors import FormatError, NoStateDictError, SelectionError, listed, printable
from ckptavg.formats.pickled import ModuleReader, Placeholder, is_module, is_tensor
from ckptavg.formats.words import is_average, words_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

StateDicts = dict[str, Mapping[str, object]]
"""The state dicts of a file by their dotted paths in it; the empty path is the whole file."""
Key = str | tuple[str, ...] | None
"""The name of a state dict, those of several that are one checkpoint, or None for what is meant."""
ALL = "*"
"""Among names of state dicts, this one stands for all in the file."""

# Names under which trainers store the weights themselves.
_PLAIN = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
# Words begin like this in the names of what holds tensors that are no weights.
_TRAINING = ("optim", "sched", "rng", "scaler", "loops", "callbacks", "sampler", "criterion")
# One of these stands beside the weights in a file that DeepSpeed's engine wrote.
_DEEPSPEED_MARKS = {"ds_version", "ds_config", "dp_world_size"}
_MOST_LEVELS = 2
_MOST_STATE_DICTS = 100
_MOST_MAPPINGS = 1_000  # that are looked at for what a file without a state dict holds
_LONGEST_NAME = 1_000  # of what holds a state dict; mappings without end can share a longer one


def as_key(names: str | Sequence[str] | None) -> Key:
    """What a user names as the state dicts to take; one name in a list is that name alone.

    Raises:
        SelectionError: there is something else.
    """
    several = (names,) if isinstance(names, str) else tuple(names or ())
    if not all(isinstance(name, str) for name in several):
        raise SelectionError(f"`key` must be a string or a list of strings, not {names!r}")
    if len(several) == 1 and several[0] != ALL:
        return several[0]
    return several or None


def find_state_dicts(root: object, path: Path | None = None, key: Key = None) -> StateDicts:
    """Find every state dict in a file, up to two levels down.

    A whole model counts as the state dict that it would give. Tensors at the top, with state dicts
    beside them, are a state dict of their own. State dicts that `key` names are found whatever
    their names say. FormatError for a whole model without end, or with what no model has;
    SelectionError for more state dicts than anybody could choose from.
    """
    finder = _Finder(path)
    if is_module(root):
        root = finder.modules.state_dict(root)
        return {"": root} if finder.is_state_dict(root) else {}
    if not isinstance(root, Mapping):
        return {}
    if finder.is_state_dict(root):
        return {"": root}
    if not key and root.keys() >= {"state", "param_groups"}:
        return {}  # an optimizer's state dict
    finder.search(root)
    names = (key,) if isinstance(key, str) else key or ()
    if len(finder.found) > _MOST_STATE_DICTS and (not any(names) or ALL in names):
        message = f"has more than {_MOST_STATE_DICTS} state dicts in it"
        raise SelectionError(message, path=path, remedy="choose one with `key`")
    found = finder.at_the_top(root) | finder.found
    for name in names:
        if name and name not in found:
            found |= finder.at_path(root, name)
    distinct = {id(value): value for value in found.values()}
    counters = {number for number, value in distinct.items() if _are_counters(value)}
    weights = {name: value for name, value in found.items() if id(value) not in counters}
    return weights or found


def _are_counters(value: Mapping[Any, object]) -> bool:
    """Whether all tensors of a mapping are single numbers, as trainers' counters are."""
    tensors = [item for item in value.values() if is_tensor(item)]
    return bool(tensors) and all(getattr(item, "shape", None) == () for item in tensors)


class _Finder:
    """Looks at each mapping once, however often a file refers to it, or it to itself."""

    def __init__(self, path: Path | None) -> None:
        self.found: StateDicts = {}
        self.modules = ModuleReader(path)
        # What is known of mappings, by their ids and, for the last two, the levels below them.
        self._is_state_dict: dict[int, bool] = {}
        self._holds: dict[tuple[int, int], bool] = {}
        self._barren: set[tuple[int, int]] = set()

    def is_state_dict(self, value: Mapping[Any, object]) -> bool:
        """Whether a mapping has names as keys, some tensors as values, and holds no state dict."""
        known = self._is_state_dict.get(id(value))
        if known is None:
            known = self._is_state_dict[id(value)] = (
                self._holds_tensors(value, 0)
                and all(isinstance(name, str) for name in value)
                and not any(self._holds_state_dict(name, item) for name, item in value.items())
            )
        return known

    def _holds_state_dict(self, name: str, item: object) -> bool:
        """Whether an entry is not part of a state dict, but holds tensors of its own."""
        if name.endswith("_extra_state"):
            return False
        return is_module(item) or self._holds_tensors(item, _MOST_LEVELS)

    def _holds_tensors(self, value: object, levels: int) -> bool:
        """Whether a mapping has tensors as values, or holds such mappings so many levels down."""
        if not isinstance(value, Mapping):
            return False
        known = self._holds.get((id(value), levels))
        if known is None:
            known = self._holds[id(value), levels] = any(map(is_tensor, value.values())) or (
                levels > 0 and any(self._holds_tensors(item, levels - 1) for item in value.values())
            )
        return known

    def search(
        self, node: Mapping[Any, object], prefix: str = "", levels: int = _MOST_LEVELS
    ) -> None:
        """Add the state dicts in a mapping, so many levels down, to `found`."""
        if (id(node), levels) in self._barren:
            return
        before = len(self.found)
        for name, item in node.items():
            if not isinstance(name, str) or len(name) > _LONGEST_NAME or is_training(name):
                continue
            # A model further down is more likely part of a configuration.
            value = self.modules.state_dict(item) if is_module(item) and not prefix else item
            if not isinstance(value, Mapping):
                continue
            if len(self.found) > _MOST_STATE_DICTS:
                return
            if self.is_state_dict(value):
                self.found[prefix + name] = value
            elif levels > 1:
                self.search(value, f"{prefix}{name}.", levels - 1)
        if len(self.found) == before:
            self._barren.add((id(node), levels))

    def at_the_top(self, root: Mapping[Any, object]) -> StateDicts:
        """The tensors that stand at the top beside state dicts, as a state dict of their own.

        There is none if they are only counters, or if a state dict has one of the usual names.
        """
        if self.found.keys() & set(_PLAIN) or not all(isinstance(name, str) for name in root):
            return {}
        entries = {
            name: item
            for name, item in root.items()
            if not (is_training(name) or self._holds_state_dict(name, item))
        }
        has_weights = any(map(is_tensor, entries.values())) and not _are_counters(entries)
        return {"": entries} if has_weights else {}

    def at_path(self, root: Mapping[Any, object], path: str) -> StateDicts:
        """The state dict at a dotted path, whatever its name says."""
        value: object = root
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if is_module(value):
            value = self.modules.state_dict(value)
        return {path: value} if isinstance(value, Mapping) and self.is_state_dict(value) else {}


def is_training(name: str) -> bool:
    """Whether a name says that it holds the state of the training: an optimizer or the like."""
    if name == "frozen_param_fragments":  # DeepSpeed's, of weights that `module` has whole
        return True
    return any(word.startswith(_TRAINING) for word in words_in(name))


def check_kind(path: Path, root: object, found: StateDicts) -> None:
    """Raise an error for weights in other files, and for an object in a state dict's place."""
    if is_deepspeed(root) and (path.name.startswith("zero_pp_rank_") or _is_partitioned(root)):
        raise FormatError(
            "has no complete weights: DeepSpeed's ZeRO stage 3 split them among other files",
            path=path,
            remedy="name the directory with the files of all ranks, or join them with the "
            "zero_to_fp32.py that DeepSpeed leaves beside the checkpoint",
        )
    if found:
        return
    for value in map(root.get, _PLAIN) if isinstance(root, Mapping) else [root]:
        if isinstance(value, Placeholder):
            raise SelectionError(
                f"holds a whole {printable(value.origin)} object, not a state dict",
                path=path,
                remedy="load it where its class can be imported, and save its state_dict()",
            )


def is_deepspeed(root: object) -> TypeGuard[Mapping[Any, object]]:
    """Whether DeepSpeed's engine wrote this, by what stands beside the weights."""
    if not isinstance(root, Mapping) or "module" not in root:
        return False
    return any(mark in root for mark in _DEEPSPEED_MARKS)


def _is_partitioned(root: Mapping[Any, object]) -> bool:
    """Whether ZeRO stage 3 spread the weights over other files: it leaves parameters empty here."""
    match root.get("ds_config"):
        case {"zero_optimization": {"stage": 3}}:
            return True
    module, groups = root["module"], root.get("param_shapes")
    # Names and real shapes, in mappings for groups of trained parameters and for frozen ones.
    mappings = (*(groups if isinstance(groups, list) else ()), root.get("frozen_param_shapes"))
    distinct = {id(mapping): mapping for mapping in mappings if isinstance(mapping, Mapping)}
    shapes = (pair for mapping in distinct.values() for pair in mapping.items())
    return isinstance(module, Mapping) and any(
        getattr(module.get(name), "shape", None) == (0,) != shape for name, shape in shapes
    )


def weights_beside_average(found: StateDicts) -> str | None:
    """The weights in a file whose `state_dict` is an average of them; None in other files.

    Lightning's WeightAveraging and MMEngine's EMAHook put their running average there when they
    save. The hook exchanges it with the weights in its `ema_state_dict`, which has its counter.
    """
    if "state_dict" in found and "current_model_state" in found:
        return "current_model_state"
    names = found.get("ema_state_dict", {}).keys() - {"steps"}
    is_of_hook = names and all(name.startswith("module.") for name in names)
    if "state_dict" in found and is_of_hook and "steps" in found["ema_state_dict"]:
        return "ema_state_dict"
    return None


def is_trainers_average(found: StateDicts, name: str) -> bool:
    """Whether one of a file's state dicts is an average that the trainer made."""
    weights = weights_beside_average(found)
    if weights is not None:
        return name == "state_dict"
    return is_average(name) or "n_averaged" in found[name]


def without_names(path: Path, *names: str) -> SelectionError:
    """The error for a file that is a state dict, where one of several is asked for."""
    return SelectionError(
        f"no state dict {listed(map(repr, names))} in it: the whole file is one",
        path=path,
        remedy="leave `key` out for this file",
    )


def choose_several(path: Path, found: StateDicts, names: tuple[str, ...]) -> tuple[str, ...]:
    """Choose the state dicts of these names, or all; SelectionError where one is not there."""
    named = tuple(choose(path, found, name) for name in dict.fromkeys(names) if name != ALL)
    return tuple(found) if ALL in names and found else named


def without_state_dict(path: Path, root: object) -> NoStateDictError:
    """The error for a file without a state dict, which says what it holds as far as that helps."""
    if isinstance(root, Mapping) and root.keys() >= {"state", "param_groups"}:
        return NoStateDictError("no state dict found in it: it is an optimizer's state", path=path)
    if is_tensor(root):
        return NoStateDictError(
            "no state dict found in it: it is a tensor without a name", path=path
        )
    waiting, known = [("", "", root)], set[int]()
    while waiting and len(known) < _MOST_MAPPINGS:
        holder, name, value = waiting.pop(0)
        if is_tensor(value):
            what = f"no state dict found in it: {printable(name)} is more than two levels deep"
            remedy = f"`key` {printable(holder)} takes the mapping that holds it"
            return NoStateDictError(what, path=path, remedy=remedy)
        if isinstance(value, Placeholder) and value.origin.startswith("numpy."):
            what = f"no state dict found in it: {printable(name)} is a numpy array, not a tensor"
            remedy = "save the arrays as tensors: torch.from_numpy"
            return NoStateDictError(what, path=path, remedy=remedy)
        if isinstance(value, Mapping) and id(value) not in known:
            known.add(id(value))
            few = itertools.islice(value.items(), _MOST_MAPPINGS)
            inside = ((str(key)[:_LONGEST_NAME], inner) for key, inner in few)
            waiting += [
                (name, f"{name}.{key}"[:_LONGEST_NAME] if name else key, inner)
                for key, inner in inside
            ]
    return NoStateDictError("no state dict found in it", path=path)


def place_of(root: object, name: str) -> str:
    """Where a state dict is in a file, with a slash after each key: `models/generator/`."""
    if not name:
        return ""
    is_key = isinstance(root, Mapping) and name in root
    return f"{name}/" if is_key else f"{name.replace('.', '/')}/"


def choose(path: Path, found: StateDicts, key: str | None) -> str:
    """Choose the state dict that is meant; SelectionError where that is unclear."""
    if key is not None and key in found:
        return key
    if not found:
        raise NoStateDictError("no state dict found in it", path=path)
    top = "the tensors at the top" if len(found) > 1 else "the whole file"
    names = listed((name or top for name in found), 20)
    if key is not None and list(found) == [""]:
        raise without_names(path, key)
    if key is not None:
        message = f"no state dict {printable(repr(key))} in it; there are: {names}"
        raise SelectionError(message, path=path, choices=tuple(found))
    weights = weights_beside_average(found)
    if weights is not None:
        return weights
    # In this order: the only one, the only one that is no average, the only one of a usual name.
    no_averages = [name for name in found if not is_average(name)]
    for names_left in (list(found), no_averages, [n for n in no_averages if n in _PLAIN]):
        if len(names_left) == 1:
            return names_left[0]
    raise SelectionError(
        f"several state dicts in it: {names}",
        path=path,
        remedy="choose one with `key`"
        + (" ('' is the top)" if "" in found else "")
        + ("" if path.is_dir() else "; `average` accepts several"),
        choices=tuple(found),
    )
