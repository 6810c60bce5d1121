"""What is fuzzed: functions that open an input as a checkpoint of some kind, and read from it.

Each takes bytes and a folder of its own. What comes of them must be success or one of the
package's own errors, in one line that a terminal can show, in little time and memory.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ckptavg.cli.inspect import _content
from ckptavg.errors import CkptAvgError, MismatchError, SelectionError
from ckptavg.formats import jsontext, lora_config, open_checkpoint, unpickler
from ckptavg.formats.budget import PickleError
from ckptavg.formats.checkpoint import Checkpoint, span_elements, without_wrappers
from ckptavg.formats.parts import check_unchanged
from ckptavg.formats.recorded import trainer_record, training_record
from ckptavg.formats.statedict import find_state_dicts
from tests.fuzz.containers import safetensors_of, torch_zip_of, unpacked

SECONDS, MEMORY = 5, 300 << 20
_LARGEST_READ = 1 << 20
_MOST_READ = 50
_MOST_CHOICES = 5
_NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}
_STORAGES = {**{str(key): bytes(range(64)) for key in range(8)}, "8": bytes(8)}
_SHARDS = {
    "model-00001-of-00002.safetensors": safetensors_of(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)
    ),
    "model-00002-of-00002.safetensors": safetensors_of(
        {"b": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}, bytes(1)
    ),
}


def run(name: str, data: bytes, folder: Path) -> None:
    """Give an input to a target; AssertionError, or whatever the reader raised, is a failure."""
    memory, started = _peak(), time.process_time()
    with _refusals():
        TARGETS[name](data, folder)
    seconds, memory = time.process_time() - started, _peak() - memory
    assert seconds < SECONDS, f"took {seconds:.1f} s"
    assert memory < MEMORY, f"took {memory >> 20} MB"


def _peak() -> int:
    """The most bytes of memory that this process has had at once."""
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Let the package's own errors pass, in one line each."""
    try:
        yield
    except CkptAvgError as error:
        _check(error)


def _check(error: CkptAvgError) -> None:
    text = str(error)
    if not text.isprintable() and not isinstance(error, MismatchError):
        assert not _NO_TEXT & {*map(unicodedata.category, text)}, repr(text)


def safetensors(data: bytes, folder: Path) -> None:
    """A `.safetensors` file."""
    _open(_written(folder / "x.safetensors", data))


def torch_zip(data: bytes, folder: Path) -> None:
    """A torch file of these days."""
    _open(_written(folder / "x.pt", data))


def legacy(data: bytes, folder: Path) -> None:
    """A torch file as it was before 1.6."""
    _open(_written(folder / "x.pth", data))


def pickled(data: bytes, folder: Path) -> None:
    """A pickle, alone and as that of a torch file which has the storages `0` to `8`."""
    with contextlib.suppress(PickleError), _refusals():
        root = unpickler.load(data)
        training_record(root, "x.ckpt", lambda wanted: dict.fromkeys(wanted, 0.5), whole=False)
        trainer_record({}, root)
        find_state_dicts(root)
    _open(_written(folder / "x.pt", torch_zip_of(data, _STORAGES)))


def shards(data: bytes, folder: Path) -> None:
    """The safetensors files of two ranks."""
    for rank, content in enumerate(unpacked(data, 2), 1):
        _written(folder / "shards" / f"shard-{rank:05}-model-00001-of-00001.safetensors", content)
    _open(folder / "shards")


def ranks(data: bytes, folder: Path) -> None:
    """The pickles of two ranks' DTensors; their files have the storages `0` to `8`."""
    for rank, content in enumerate(unpacked(data, 2)):
        file = folder / "ranks" / f"model_world_size_2_rank_{rank}.pt"
        _written(file, torch_zip_of(content, _STORAGES))
    _open(folder / "ranks")


def zero(data: bytes, folder: Path) -> None:
    """The pickles of the model's and the optimizer's state of two ranks: of stage 3, and of 2."""
    model, optimizer = (torch_zip_of(content, _STORAGES) for content in unpacked(data, 2))
    for stage in ("2", "3"):
        _written(folder / "2" / "mp_rank_00_model_states.pt", model)
        for rank in range(2):
            name = f"zero_pp_rank_{rank}_mp_rank_00_"
            _written(folder / "3" / f"{name}model_states.pt", model)
            _written(folder / stage / f"{name}optim_states.pt", optimizer)
        with _refusals():
            _open(folder / stage)


def dcp(data: bytes, folder: Path) -> None:
    """The `.metadata` of torch.distributed.checkpoint, and the file of its only rank."""
    metadata, shard = unpacked(data, 2)
    _written(folder / "dcp" / ".metadata", metadata)
    _written(folder / "dcp" / "__0_0.distcp", shard)
    _open(folder / "dcp")


def index(data: bytes, folder: Path) -> None:
    """What stands beside the shards of Hugging Face's libraries: JSON, and a scheduler's pickle.

    The input is divided by zeros: the index, the Trainer's state, an adapter's configuration, the
    pickle; the files that are empty are left out. Without an index the weights are one file.
    """
    names = ("model.safetensors.index.json", "trainer_state.json", "adapter_config.json")
    pieces = [*data.split(b"\0", 3), b"", b"", b""]
    folder = folder / "huggingface"
    for name, content in _SHARDS.items():
        if not (folder / name).exists():
            _written(folder / name, content)
    scheduler = torch_zip_of(pieces[3], {}) if pieces[3] else b""
    whole = b"" if pieces[0] else next(iter(_SHARDS.values()))
    beside = {"scheduler.pt": scheduler, "model.safetensors": whole}
    for name, content in {**dict(zip(names, pieces, strict=False)), **beside}.items():
        if content:
            _written(folder / name, content)
        else:
            (folder / name).unlink(missing_ok=True)
    with _refusals():
        path = folder / lora_config.CONFIG
        config = lora_config.Config(path, jsontext.read_json(path))
        config.check_kind()
        config.scale("base_model.model.layers.0.self_attn.q_proj", 4)
    _open(folder)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "safetensors": safetensors,
    "zip": torch_zip,
    "pickle": pickled,
    "legacy": legacy,
    "shards": shards,
    "ranks": ranks,
    "zero": zero,
    "dcp": dcp,
    "index": index,
}


def _written(path: Path, data: bytes) -> Path:
    try:
        path.write_bytes(data)
    except FileNotFoundError:
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    return path


def _open(path: Path) -> None:
    """Open it as the commands do, whichever state dict they may ask for, and read from it."""
    try:
        opened = [open_checkpoint(path)]
    except SelectionError as error:
        if not error.choices:
            raise
        opened = []
        for choice in error.choices[:_MOST_CHOICES]:
            with _refusals():
                opened.append(open_checkpoint(path, key=choice))
    for checkpoint in opened:
        with _refusals():
            _read(checkpoint)
        without_wrappers(checkpoint, keep_prefix=False)
        jsontext.to_text(_content(checkpoint))


def _read(checkpoint: Checkpoint) -> None:
    """Read the first tensors, each whole and a piece of it, as the loop does."""
    check_unchanged(checkpoint.parts)
    for name in itertools.islice(checkpoint.tensors, _MOST_READ):
        tensor = checkpoint.tensors[name]
        span = span_elements(tensor.shape, tensor.element_strides) * tensor.dtype.itemsize
        if max(tensor.nbytes, span) > _LARGEST_READ:
            continue
        whole = checkpoint.read(name)
        assert whole.nbytes == tensor.nbytes
        if tensor.strides is None:
            first, last = tensor.nbytes // 3, (tensor.nbytes + 1) // 2
            piece = np.zeros(last - first, np.uint8)
            checkpoint.parts[tensor.part].read_into(tensor.offset + first, piece.data)
            assert piece.tobytes() == whole.tobytes()[first:last], name
