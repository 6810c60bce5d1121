"""The provenance in a file, read back: whoever wrote the file may have altered it."""

from __future__ import annotations

from typing import Any

from ckptavg.formats.jsontext import from_text

_MOST_LEVELS = 20  # of lists and dicts in each other; what writes JSON again follows them


def read_provenance(text: str) -> dict[str, Any] | None:
    """The entry of ckptavg in a file's metadata; None if ckptavg did not write it in this form.

    Entries that only the provenance of an average has are checked by `merge.record.Record`.
    """
    try:
        entry = from_text(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or _is_deep(entry, _MOST_LEVELS):
        return None
    state, sources = entry.get("norm_stats", {}), entry.get("sources")
    keys = [entry, *(sources if isinstance(sources, list) else ())]
    if not all(is_key(each.get("key")) for each in keys if isinstance(each, dict)):
        return None
    is_state = isinstance(state, dict) and isinstance(state.get("state", ""), str)
    if not is_state or not all(is_names(state.get(name, [])) for name in ("frozen", "stale")):
        return None
    return entry


def averaged_steps(provenance: dict[str, Any]) -> tuple[str, tuple[int, int]] | None:
    """The unit of the steps of an average's members, and the first and the last of them.

    None if a member records no step, or they record different units.
    """
    sources = provenance.get("sources")
    steps: dict[str, list[int]] = {}
    for source in sources if isinstance(sources, list) else ():
        match source:
            case {"step": [str(unit), int(number)]}:
                steps.setdefault(unit, []).append(number)
            case _:
                return None
    if len(steps) != 1:
        return None
    [(unit, numbers)] = steps.items()
    return unit, (min(numbers), max(numbers))


def is_key(value: object) -> bool:
    """Whether it is the name of a state dict, a list of several, or None."""
    return value is None or isinstance(value, str) or (bool(value) and is_names(value))


def is_names(value: object) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_deep(value: object, levels: int) -> bool:
    """Whether a value has more than so many levels of lists and dicts."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deep(each, levels - 1) for each in inner)
