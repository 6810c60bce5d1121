"""The words in names of files and state dicts that say what these are, in one table."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Kind = Literal["unfinished", "no weights", "piece", "average", "pointer", "start", "run"]


class Word(NamedTuple):
    """A word in names.

    Attributes:
        word: in lower case.
        kind: what a file with the word in its name is.
        meaning: what the word says.
        example: a name with the word, as trainers write it.
    """

    word: str
    kind: Kind
    meaning: str
    example: str


_STATE = "state of the training, if the name has nothing else but numbers"
_RANK = "a number after it counts the pieces of one model"
_AVERAGE = "an average that the training or a tool made"
_COPY = "a copy of or a link to another checkpoint, or a later save without a number"
_START = "the weights that the training started from"
_RUN = "a number after it counts trainings, not checkpoints"

WORDS = (
    Word("tmp", "unfinished", "a save that was interrupted", "tmp-checkpoint-12"),
    Word("incomplete", "unfinished", "a save that was interrupted", "step_3.incomplete.pt"),
    Word("optim", "no weights", _STATE, "optim.pt"),
    Word("optimizer", "no weights", _STATE, "optimizer_1.bin"),
    Word("optim_states", "no weights", _STATE, "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    Word("scheduler", "no weights", _STATE, "scheduler.pt"),
    Word("lr_scheduler", "no weights", _STATE, "lr_scheduler.pt"),
    Word("rng_state", "no weights", _STATE, "rng_state_0.pth"),
    Word("random_states", "no weights", _STATE, "random_states_0.pkl"),
    Word("training_args", "no weights", _STATE, "training_args.bin"),
    Word("scaler", "no weights", _STATE, "scaler.pt"),
    Word("grad_scaler", "no weights", _STATE, "grad_scaler.pt"),
    Word("sampler", "no weights", _STATE, "sampler_1.bin"),
    Word("rank", "piece", _RANK, "model_rank0.pt"),
    Word("tp", "piece", _RANK, "model_tp0.pt"),
    Word("pp", "piece", _RANK, "model_tp0_pp1.pt"),
    Word("sdp", "piece", _RANK, "model/pp_00/tp_00/sdp_00.pt"),
    Word("shard", "piece", _RANK, "model-shard-0.pt"),
    Word("part", "piece", _RANK, "model-rank-0-part-0.safetensors"),
    Word("gpu", "piece", _RANK, "checkpoint_gpu_0.pt"),
    Word("consolidated", "piece", _RANK, "consolidated.00.pth"),
    Word("of", "piece", "numbers around it count the pieces", "model-00001-of-00002.safetensors"),
    Word("ema", "average", _AVERAGE, "ema_0.9999_001000.pt"),
    Word("swa", "average", _AVERAGE, "swa_model.pt"),
    Word("avg", "average", _AVERAGE, "avg_2.pt"),
    Word("ave", "average", _AVERAGE, "valid.acc.ave_2best.pth"),
    Word("average", "average", _AVERAGE, "average_model.pt"),
    Word("averaged", "average", _AVERAGE, "averaged-5.pt"),
    Word("polyak", "average", _AVERAGE, "polyak.pt"),
    Word("shadow", "average", _AVERAGE, "shadow_params.pt"),
    Word("teacher", "average", _AVERAGE, "teacher_checkpoint.pth"),
    Word("soup", "average", _AVERAGE, "greedy_soup.pt"),
    Word("last", "pointer", _COPY, "last.ckpt"),
    Word("latest", "pointer", _COPY, "latest.pth"),
    Word("recent", "pointer", _COPY, "most_recent.pt"),
    Word("current", "pointer", _COPY, "current.pt"),
    Word("best", "pointer", _COPY, "model_best.pth.tar"),
    Word("final", "pointer", _COPY, "model_final.pth"),
    Word("init", "start", _START, "init.pt"),
    Word("initial", "start", _START, "initial_model.pt"),
    Word("pretrained", "start", _START, "pretrained.pth"),
    Word("run", "run", _RUN, "run1_epoch_3.pt"),
    Word("exp", "run", _RUN, "exp2/weights/best.pt"),
    Word("experiment", "run", _RUN, "experiment_0/checkpoint.pth.tar"),
    Word("seed", "run", _RUN, "seed_0.pt"),
    Word("fold", "run", _RUN, "fold_1/checkpoint_final.pth"),
    Word("trial", "run", _RUN, "trial_7/epoch_3.pt"),
    Word("version", "run", _RUN, "version_1.ckpt"),
    Word("v", "run", "at the end: Lightning's second file of that name", "epoch=3-v1.ckpt"),
)  # fmt: skip
"""What the words say; docs/members.md shows this table."""

KINDS: Mapping[str, Kind] = {each.word: each.kind for each in WORDS}
"""What each word, in lower case, says."""
# Words of letters: `modelEma` is two of them, `ema2` is the word and a number.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_WHOLE = "|".join(each.word for each in WORDS if each.kind == "no weights")
_NO_WEIGHTS = re.compile(
    rf"({_WHOLE})([_-][A-Za-z_-]*\d+)?(\.(pt|pth|bin|pkl))?|.*_optim_states\.pt"
)

_SHARD = re.compile(
    r"shard-(?P<shard>\d{1,9})-model-(?P<model>\d{1,9})-of-(?P<models>\d{1,9})\.safetensors"
    r"|model_world_size_(?P<ranks>\d{1,9})_rank_(?P<rank>\d{1,9})\.pt"
)


class ShardName(NamedTuple):
    """The numbers in the name of a file that one rank wrote.

    Attributes:
        rank: number of the rank.
        ranks: how many there are; None where the name does not tell.
        model: number of the output file that its tensors are meant for.
        models: how many of these there are.
    """

    rank: int
    ranks: int | None
    model: int = 1
    models: int = 1


def parse_shard_name(name: str) -> ShardName | None:
    """The numbers in the name of a rank's file, as torch's or verl's writers give it."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return None
    if match["ranks"]:
        return ShardName(int(match["rank"]), int(match["ranks"]))
    return ShardName(int(match["shard"]), None, int(match["model"]), int(match["models"]))


def words_in(name: str) -> Iterator[str]:
    """The words of a name, in lower case."""
    return (match[0].lower() for match in _WORD.finditer(name))


def is_no_checkpoint(name: str) -> bool:
    """Whether trainers give this name to optimizers, schedulers and the like."""
    return _NO_WEIGHTS.fullmatch(name) is not None


def is_average(name: str) -> bool:
    """Whether the name of a file or a state dict says that it is an average of others."""
    return any(KINDS.get(word) == "average" for word in words_in(name))
