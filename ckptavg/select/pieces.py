"""Files that each hold a piece of one model, and are not checkpoints."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from ckptavg.errors import FormatError, listed
from ckptavg.select.names import parse_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.select.series import Candidate

_TOOLS = (
    (r"consolidated", "transformers' convert_llama_weights_to_hf.py joins them"),
    (r"mp_rank|model_optim_rng", "Megatron-LM's tools/checkpoint/convert.py joins them"),
    (r"rank-\d+-part", "vLLM split them from a checkpoint: average that"),
    (r"-of-\d", "name their directory with its index"),
)
_OTHER_TOOL = "join them with the tool of the trainer that wrote them"
_FLAT = "save with FSDP's FULL_STATE_DICT, or join them with the trainer's tool"


def mark_pieces(candidates: Sequence[Candidate]) -> FormatError | None:
    """Leave out the pieces of models among candidates, and return the error about them.

    Files are pieces if their names differ in a number of ranks or shards, or if they hold the flat
    parameters of FSDP.
    """
    groups: defaultdict[str, list[Candidate]] = defaultdict(list)
    pieces: dict[Candidate, str] = {}
    for each in candidates:
        if each.checkpoint and _is_flat(each.checkpoint):
            pieces[each] = _FLAT
        if is_piece(each.name):
            groups[_without_rank(each.name)].append(each)
    for group in groups.values():
        if len(group) > 1:
            for each in group:
                pieces.setdefault(each, remedy_by_name(each.name))
    if not pieces:
        return None
    for each in pieces:
        each.leave_out("piece", "a piece of one model")
    first, names = next(iter(pieces)), listed(each.name for each in pieces)
    return FormatError(
        f"holds pieces of one model, not checkpoints: {names}",
        path=first.folder or first.path,
        remedy=pieces[first],
    )


def _without_rank(name: str) -> str:
    parsed = parse_name(name)
    return parsed.joined(["#" if n.role == "piece" else n.text for n in parsed.numbers])


def is_piece(name: str) -> bool:
    """Whether a name has the number of a rank or a shard."""
    return any(number.role == "piece" for number in parse_name(name).numbers)


def remedy_by_name(name: str) -> str:
    """What joins the pieces of which one has this name."""
    return next((tool for pattern, tool in _TOOLS if re.search(pattern, name)), _OTHER_TOOL)


def _is_flat(checkpoint: Checkpoint) -> bool:
    """Whether it has flat parameters of FSDP, each of which holds many parameters."""
    return any(name.rpartition(".")[2].startswith("_flat_param") for name in checkpoint.tensors)
