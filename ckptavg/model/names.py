"""Match a model's names of tensors with a checkpoint's."""

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
# activation checkpoints; PEFT in a model, but not in its files.
_WRAPPERS = frozenset(
    {
        *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
        *("modules_to_save", "default"),
    }
)


def match_names(wanted: AbstractSet[str], given: AbstractSet[str]) -> dict[str, str]:
    """The names under which a model is given a checkpoint's tensors, and their own.

    Args:
        wanted: names in the model.
        given: names in the checkpoint, which may differ by the prefix on all of them, or by the
            parts that wrappers add.

    Returns:
        Of tensors that the model wants by its names, of others by those without the prefix. Behind
        a prefix only what bears it is the model's; a Lightning module may hold more beside it.

    Raises:
        MismatchError: the checkpoint holds the model several times, under unlike prefixes.
    """
    own, prefix = _prefixes(wanted, given)
    offered = _offered(given, own, prefix)
    ours, theirs = _plain(wanted), _plain(given)
    if len(ours) == len(wanted) and len(theirs) == len(given) and not wanted <= offered.keys():
        plain = _prefixes(ours.keys(), theirs.keys())
        others = _offered(theirs.keys(), *plain)
        if len(ours.keys() & others.keys()) > len(wanted & offered.keys()):
            own, prefix = plain
            offered = {ours.get(name, name): theirs[other] for name, other in others.items()}
    if own or prefix:
        log.info(
            "matched the model's names, %s, to the checkpoint's, %s",
            f"with the prefix {printable(own)!r}" if own else "without a prefix",
            f"with the prefix {printable(prefix)!r}" if prefix else "without a prefix",
        )
    if len(offered) < len(given):
        beside = len(given) - len(offered)
        log.info("left alone %d tensors without the prefix %r", beside, printable(prefix))
    return offered


def _offered(given: Iterable[str], own: str, prefix: str) -> dict[str, str]:
    """Names with the checkpoint's prefix replaced by the model's, and as they are."""
    return {own + name.removeprefix(prefix): name for name in given if name.startswith(prefix)}


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Names without the parts that wrappers add, and as they are."""
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in names
    }


def _prefixes(wanted: AbstractSet[str], given: AbstractSet[str]) -> tuple[str, str]:
    """The prefix that the matched names have in the model alone, and that in the checkpoint alone.

    Raises:
        MismatchError: the checkpoint holds the model several times, under unlike prefixes.
    """
    most, chosen = 0, ("", "")
    rivals: list[str] = []
    for own in _own_prefixes(wanted, given):
        short = {name.removeprefix(own) for name in wanted if name.startswith(own)}
        prefixes = ["", *_fullest_prefixes(short, given)]
        for prefix in prefixes:
            count = sum(prefix + end in given for end in short)
            if count > most:
                most, chosen = count, (own, prefix)
                rivals = prefixes[1:] if prefix and count == len(short) else []
    if len(rivals) > 1:
        raise MismatchError(
            "the checkpoint holds the model more than once, and which is meant is unclear; "
            "let `model` be what holds them all, or name the others in `ignore`. It is there "
            "under the prefixes:",
            [printable(prefix) for prefix in rivals],
        )
    return chosen


def _own_prefixes(wanted: AbstractSet[str], given: AbstractSet[str]) -> list[str]:
    """Prefixes of the model's names that the checkpoint may lack, the shortest first."""
    first, last = min(wanted, default=""), max(wanted, default="")
    ends = (position + 1 for position, character in enumerate(first) if character == ".")
    shared = [first[:end] for end in ends if last.startswith(first[:end])]
    return ["", *shared, *_fullest_prefixes(given, wanted)[:1]]


def _fullest_prefixes(short: AbstractSet[str], long: Iterable[str]) -> list[str]:
    """The prefixes that, put before the short names, give the most of the long ones."""
    found: Counter[str] = Counter()
    for name in long:
        for position, character in enumerate(name):
            if character == "." and name[position + 1 :] in short:
                found[name[: position + 1]] += 1
    most = max(found.values(), default=0)
    return sorted((prefix for prefix in found if found[prefix] == most), key=len)
