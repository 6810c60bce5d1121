"""Make the corpus to begin with: `python -m tests.fuzz.seeds`, tiny files of the real libraries.

Files that are named `seed-...` are made anew; what fuzzing has found stays.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.fuzz.containers import (
    Record,
    packed,
    safetensors_of,
    torch_zip_of,
    zip64_extra,
    zip_of,
)

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    """Write all of them."""
    torch.manual_seed(0)
    for name, seeds in {
        "safetensors": _safetensors(),
        "zip": _zips(),
        "pickle": _pickles(),
        "legacy": _legacy(),
        "shards": _shards(),
        "ranks": _ranks(),
        "zero": _zero(),
        "dcp": _dcp(),
        "index": _index(),
    }.items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("seed-*"):
            path.unlink()
        for label, data in seeds.items():
            (folder / f"seed-{label}").write_bytes(data)


def _safetensors() -> dict[str, bytes]:
    mixed = {
        "a.weight": torch.ones(2, 3),
        "a.half": torch.zeros(2, dtype=torch.bfloat16),
        "a.steps": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    last = {"dtype": "U8", "shape": [1], "data_offsets": [8, 9]}
    return {
        "mixed": safetensors.torch.save(mixed, {"format": "pt", "step": "3"}),
        "numpy": safetensors.numpy.save({"x": np.arange(3, dtype=np.int8)}),
        "empty": safetensors_of({}),
        "metadata-last": safetensors_of({"a": entry, "__metadata__": {"a": "b"}}, bytes(8)),
        "escaped": safetensors_of({"\u00e9\n": entry, "z": last}, bytes(9)),
        "ours": safetensors_of(
            {
                "__metadata__": {"ckptavg": json.dumps({"scheme": "uniform"}), "epoch": "1"},
                "a": entry,
            },
            bytes(8),
        ),
    }


def _roots() -> dict[str, Any]:
    """What is saved, by a label."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    tied = torch.ones(4)
    tensor = torch.arange(6.0).reshape(2, 3)
    training = {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2",
        "state_dict": {"w": tensor, "n": torch.tensor(3)},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
        "callbacks": {
            "ModelCheckpoint": {
                "monitor": "val_loss",
                "best_k_models": {"/run/x.ckpt": torch.tensor(0.5), "/run/x.pt": 0.25},
            }
        },
        "val_metrics": {"accuracy": np.float64(0.5), "loss": torch.tensor(0.75)},
    }
    return {
        "state-dict": model.state_dict(),
        "training": training,
        "views": {
            "a": tied,
            "b": tied[1:3],
            "c": tensor.T,
            "d": torch.ones(1).expand(3),
            "e": tied,
            "f": tensor.T.unsqueeze(0),
        },
        "two": {"state_dict": {"w": tied}, "state_dict_ema": {"w": tied}, "net": {"w": tied}},
        "module": torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1)),
        "dtypes": {
            str(dtype): torch.zeros(2, dtype=dtype)
            for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64)
        },
        "parameter": {"p": torch.nn.Parameter(tied), "_extra_state": {"x": [tied, 1, "y"]}},
        "deepspeed": {
            "module": {"w": torch.zeros(2)},
            "ds_version": "0.1",
            "ds_config": {"zero_optimization": {"stage": 1}},
            "param_shapes": [collections.OrderedDict(w=torch.Size([2]))],
        },
        "zero-3": {
            "module": {},
            "dp_world_size": 2,
            "ds_config": {"zero_optimization": {"stage": 3}},
        },
        "unreadable": {"model": {"w": tied}, "s": torch.eye(2).to_sparse(), "q": torch.quint8},
        "attributes": {
            "a": _with_attribute(tied),
            "b": torch.nn.Buffer(tensor),
            "c": torch.Size([2]),
        },
        "scheduler": scheduler.state_dict(),
        "containers": {
            "a": {1, 2},
            "b": frozenset("x"),
            "c": collections.defaultdict(list),
            1: (2,),
        },
    }


def _with_attribute(tensor: torch.Tensor) -> Any:
    made: Any = tensor.clone()
    made.note = "x"
    return made


def _saved(root: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(root, buffer, **options)
    return buffer.getvalue()


def _pickle_of(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read("archive/data.pkl")


def _zips() -> dict[str, bytes]:
    seeds = {label: _saved(root) for label, root in _roots().items()}
    pickled = _pickle_of(_saved({"a": torch.ones(4)}))
    seeds["compact"] = torch_zip_of(pickled, {"0": bytes(16)})
    seeds["ours"] = zip_of(
        [
            Record(b"x/data.pkl", pickled),
            Record(b"x/data/0", bytes(16)),
            Record(b"x/ckptavg", b'{"scheme": "uniform"}'),
        ],
        b"comment",
    )
    first, big = Record(b"x/data.pkl", pickled), 2**32 - 1
    extra = zip64_extra(16, zip_of([first]).index(b"PK\1\2"))
    storage = Record(b"x/data/0", bytes(16), size=big, offset=big, extra=extra)
    seeds["zip64"] = zip_of([first, storage])
    return seeds


def _pickles() -> dict[str, bytes]:
    seeds = {label: _pickle_of(_saved(root)) for label, root in _roots().items()}
    for protocol in (1, 3, 4, 5):
        root = _roots()["views" if protocol % 2 else "training"]
        seeds[f"protocol-{protocol}"] = _pickle_of(_saved(root, pickle_protocol=protocol))
    values = {
        "a": [1, -(2**40), 2**80, 1.5, None, True],
        "b": (b"x", bytearray(b"y"), {1}, "\u00e9"),
    }
    for protocol in range(1, 6):
        seeds[f"values-{protocol}"] = pickle.dumps(values, protocol)
    return seeds


def _shards() -> dict[str, bytes]:
    """The files of two ranks: rows, columns, and a tensor that only the second has."""
    files = []
    for rank in range(2):
        state = {"rows": torch.ones(2, 3), "columns": torch.ones(4, 1), "n": torch.tensor(rank)}
        places = {"rows": [2 * rank, 0], "columns": [0, rank], "n": []}
        if rank == 0:
            del state["n"], places["n"]
        sharding = {name: {"saved_offsets": place} for name, place in places.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(sharding), "format": "pt"}
        files.append(safetensors.torch.save(state, metadata))
    return {"two": packed(*files), "one": packed(files[0], b"")}


def _ranks() -> dict[str, bytes]:
    """What two ranks save of DTensors."""
    files = []
    for rank in range(2):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        value = torch.ones(3, 2)
        state = {
            "rows": distribute_tensor(value, mesh, [Shard(0)]),
            "columns": distribute_tensor(value, mesh, [Shard(1)]),
            "whole": distribute_tensor(value, mesh, [Replicate()]),
            "n": torch.tensor(3),
        }
        files.append(_pickle_of(_saved(state)))
        dist.destroy_process_group()
    return {"two": packed(*files), "twice": packed(files[0], files[0])}


def _zero() -> dict[str, bytes]:
    """What a rank saves of the model and of the optimizer."""
    model = {
        "module": {"w": torch.empty(0), "v": torch.empty(0), "b": torch.ones(2), "extra": 3},
        "buffer_names": ["b"],
        "param_shapes": [{"w": torch.Size([5])}],
        "frozen_param_shapes": {"v": torch.Size([1])},
        "frozen_param_fragments": {"v": torch.ones(1)},
        "shared_params": {"tied": "w"},
        "global_steps": 3,
        "ds_version": "0.19.8",
    }
    optimizer = {
        "optimizer_state_dict": {
            "fp32_flat_groups": [torch.ones(1), torch.ones(2)],
            "partition_count": 2,
            "zero_stage": 3,
        }
    }
    groups = {
        "optimizer_state_dict": {
            "single_partition_of_fp32_groups": [torch.ones(3)],
            "param_alignment_paddings": [[1]],
            "partition_count": [2],
            "zero_stage": 2,
        }
    }
    first = _pickle_of(_saved(model))
    return {
        "stage3": packed(first, _pickle_of(_saved(optimizer))),
        "stage2": packed(first, _pickle_of(_saved(groups))),
    }


def _legacy() -> dict[str, bytes]:
    with warnings.catch_warnings(action="ignore"):
        return {
            label: _saved(root, _use_new_zipfile_serialization=False)
            for label, root in _roots().items()
            if label != "module"  # which comes with the source of its classes
        }


def _dcp() -> dict[str, bytes]:
    states: dict[str, Any] = {
        "flat": {"w": torch.ones(2, 3), "n": torch.tensor(3)},
        "nested": {"model": {"a": {"w": torch.ones(2)}}, "optim": {"m": torch.ones(2)}, "epoch": 3},
        "strided": {
            "state_dict": {"t": torch.arange(6.0).reshape(2, 3).T},
            "step": torch.tensor(4),
        },
        "half": {"w": torch.ones(3, dtype=torch.bfloat16), "empty": torch.zeros(0)},
        "titan": {"w": torch.ones(1), "train_state": {"step": torch.tensor(5), "x": "y"}},
    }
    return {label: _dcp_of(state) for label, state in states.items()}


def _dcp_of(state: dict[str, Any]) -> bytes:
    folder = Path(tempfile.mkdtemp())
    try:
        with warnings.catch_warnings(action="ignore"):
            save(state, checkpoint_id=folder / "x", no_dist=True)
        [shard] = (folder / "x").glob("*.distcp")
        return packed((folder / "x" / ".metadata").read_bytes(), shard.read_bytes())
    finally:
        shutil.rmtree(folder)


def _index() -> dict[str, bytes]:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    index = {"metadata": {"total_size": 9}, "weight_map": {"a": first, "b": second}}
    state = {
        "global_step": 20,
        "epoch": 1.0,
        "log_history": [
            {"step": 10, "loss": 2.0, "learning_rate": 0.1},
            {"step": 20, "eval_loss": 1.0, "learning_rate": 0.05},
        ],
    }
    adapter = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "init_lora_weights": True,
        "alpha_pattern": {"layers.1.q_proj": 2, "q_proj|k_proj": 3, ".*v_proj": 4},
        "rank_pattern": {},
    }
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0).state_dict()
    pickled = _pickle_of(_saved(schedule))
    texts = [json.dumps(value).encode() for value in (index, state, adapter)]
    return {
        "index": texts[0],
        "state": b"\0".join([texts[0], texts[1]]),
        "scheduler": b"\0".join([b"", texts[1], b"", pickled]),
        "adapter": b"\0".join([b"", b"", texts[2]]),
        "all": b"\0".join([*texts, pickled]),
        "paths": json.dumps({"weight_map": {"a": f"./{first}", "b": f"x/../{second}"}}).encode(),
    }


if __name__ == "__main__":
    main()
