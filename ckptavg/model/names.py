"""Match the names of a model's tensors with those of a checkpoint."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from ckptavg.errors import MismatchError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Set as AbstractSet

log = logging.getLogger("ckptavg")

# Parts of names that wrappers of submodules add: torch.compile, DistributedDataParallel, FSDP,
# activation checkpointing, and PEFT, which adds them to models and not to its files.
_WRAPPERS = frozenset(
    {
        *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
        *("modules_to_save", "default"),
    }
)


def match_names(
    model_names: AbstractSet[str], checkpoint_names: AbstractSet[str]
) -> dict[str, str]:
    """Match names that may differ by a prefix on all of them, or by parts that wrappers add.

    If the checkpoint's names of the model have a prefix, only names with this prefix are matched:
    the checkpoint of a Lightning module may hold other tensors beside those of the model.

    Returns:
        The checkpoint's names by the names that a model is to be given. Tensors that the model does
        not have are there too, by their names without the checkpoint's prefix.

    Raises:
        MismatchError: the checkpoint holds the model several times, with different prefixes.
    """
    model_prefix, prefix = _prefixes(model_names, checkpoint_names)
    matched = _with_prefix(checkpoint_names, model_prefix, prefix)
    plain_model, plain_checkpoint = (
        _without_wrappers(model_names),
        _without_wrappers(checkpoint_names),
    )
    are_unique = len(plain_model) == len(model_names) and (
        len(plain_checkpoint) == len(checkpoint_names)
    )
    if are_unique and not model_names <= matched.keys():
        plain_prefixes = _prefixes(plain_model.keys(), plain_checkpoint.keys())
        plain = _with_prefix(plain_checkpoint.keys(), *plain_prefixes)
        if len(plain_model.keys() & plain.keys()) > len(model_names & matched.keys()):
            model_prefix, prefix = plain_prefixes
            matched = {
                plain_model.get(name, name): plain_checkpoint[other]
                for name, other in plain.items()
            }
    if model_prefix or prefix:
        log.info(
            "matched the model's names, %s, to the checkpoint's, %s",
            f"with the prefix {printable(model_prefix)!r}" if model_prefix else "without a prefix",
            f"with the prefix {printable(prefix)!r}" if prefix else "without a prefix",
        )
    if len(matched) < len(checkpoint_names):
        count = len(checkpoint_names) - len(matched)
        log.info("ignored %d tensors without the prefix %r", count, printable(prefix))
    return matched


def _with_prefix(names: Iterable[str], model_prefix: str, prefix: str) -> dict[str, str]:
    """The checkpoint's names with this prefix, by the same names with the model's prefix."""
    return {
        model_prefix + name.removeprefix(prefix): name for name in names if name.startswith(prefix)
    }


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Names, by the same names without the parts that wrappers add."""
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in names
    }


def _prefixes(model_names: AbstractSet[str], checkpoint_names: AbstractSet[str]) -> tuple[str, str]:
    """The prefix that only the model's names have, and the one that only the checkpoint's have.

    Raises:
        MismatchError: the checkpoint holds the model several times, with different prefixes.
    """
    most, chosen = 0, ("", "")
    rivals: list[str] = []
    for model_prefix in _model_prefixes(model_names, checkpoint_names):
        ends = {
            name.removeprefix(model_prefix) for name in model_names if name.startswith(model_prefix)
        }
        prefixes = ["", *_commonest_prefixes(ends, checkpoint_names)]
        for prefix in prefixes:
            count = sum(prefix + end in checkpoint_names for end in ends)
            if count > most:
                most, chosen = count, (model_prefix, prefix)
                rivals = prefixes[1:] if prefix and count == len(ends) else []
    if len(rivals) > 1:
        raise MismatchError(
            f"the checkpoint holds the model {len(rivals)} times; let `model` be the model that "
            "contains all of them, or leave the others out with `ignore`. The prefixes are:",
            [printable(prefix) for prefix in rivals],
        )
    return chosen


def _model_prefixes(model_names: AbstractSet[str], checkpoint_names: AbstractSet[str]) -> list[str]:
    """Prefixes of the model's names that the checkpoint may lack, the shortest first."""
    first, last = min(model_names, default=""), max(model_names, default="")
    ends = (position + 1 for position, character in enumerate(first) if character == ".")
    shared = [first[:end] for end in ends if last.startswith(first[:end])]
    return ["", *shared, *_commonest_prefixes(checkpoint_names, model_names)[:1]]


def _commonest_prefixes(short: AbstractSet[str], long: Iterable[str]) -> list[str]:
    """The prefixes that turn most of the short names into long ones."""
    counts: Counter[str] = Counter()
    for name in long:
        for position, character in enumerate(name):
            if character == "." and name[position + 1 :] in short:
                counts[name[: position + 1]] += 1
    most = max(counts.values(), default=0)
    return sorted((prefix for prefix in counts if counts[prefix] == most), key=len)
