"""Convert one checkpoint of a training: ckptavg beside the tools that others write.

    python tests/benchmarks/convert.py FOLDER [--gigabytes 1.3] [--runs 3]

The checkpoint is a model with the state of Adam: as `torch.distributed.checkpoint` saves it (which
torch's `dcp_to_torch_save` and accelerate's `merge-weights` join), in the files of one process of
DeepSpeed's ZeRO stage 3 (which `zero_to_fp32.py` joins), as `torch.save` does, and its weights
alone as safetensors. A library that is not installed is left out. We do not wait for the disk, as
the others do not. Whole processes, in turn.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.benchmarks import measure
else:
    import measure  # a script finds what is beside it, and knows of no package

HERE = Path(__file__).parent
_MAKE = """
import sys, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save
warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
weights = load_file(folder / "step_1000.safetensors")
moments = {name: {"m": value * 0.1, "v": value**2} for name, value in weights.items()}
save({"model": weights, "optim": moments}, checkpoint_id=folder / "dcp", no_dist=True)
# accelerate has a directory for the model alone.
save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
torch.save({"state_dict": weights, "optimizer": moments}, folder / "adam.pt")
flat = torch.cat([value.flatten() for value in weights.values()])
model = {
    "module": {name: torch.empty(0) for name in weights},
    "param_shapes": [{name: value.shape for name, value in weights.items()}],
    "buffer_names": [], "shared_params": {}, "ds_version": "0.19.8",
}
optimizer = {
    "fp32_flat_groups": [flat], "partition_count": 1, "zero_stage": 3,
    "optimizer_state_dict": {"m": flat * 0.1, "v": flat**2},
}
rank = folder / "zero" / "zero_pp_rank_0_mp_rank_00_"
rank.parent.mkdir()
torch.save(model, f"{rank}model_states.pt")
torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}, f"{rank}optim_states.pt")
"""
_DCP_TO_TORCH = """
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(*sys.argv[1:])
"""
_MERGE = """
from accelerate.utils import merge_fsdp_weights
merge_fsdp_weights(*sys.argv[1:])
"""
_ZERO = """
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
convert_zero_checkpoint_to_fp32_state_dict(*sys.argv[1:], safe_serialization=True, tag="zero")
"""
_LOAD_SAVE = """
from safetensors.torch import load_file, save_file
save_file(load_file(sys.argv[1]), sys.argv[2])
"""
_TORCH_LOAD = """
import torch
from safetensors.torch import save_file
save_file(torch.load(sys.argv[1], map_location="cpu", mmap=True)["state_dict"], sys.argv[2])
"""


def main() -> None:
    """Make the checkpoint, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where it is made, unless it is there already")
    parser.add_argument("--gigabytes", type=float, default=1.3)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder
    if not folder.exists():
        make = [sys.executable, HERE / "checkpoints.py", folder, "--checkpoints", "1"]
        folder.mkdir()
        subprocess.run([*make, "--gigabytes", str(options.gigabytes)], check=True)
        subprocess.run([sys.executable, "-c", _MAKE, folder], check=True)
    if options.runs:
        _compare(folder, options.runs)


def _compare(folder: Path, runs: int) -> None:
    out, weights = folder / "out", folder / "step_1000.safetensors"
    dcp, zero, adam = folder / "dcp", folder / "zero", folder / "adam.pt"
    joined, copy = out / "a.safetensors", out / "b.safetensors"
    ways = {
        "DCP to .safetensors": _ours(dcp, joined),
        "- dcp_to_torch_save, to .pt": _theirs(_DCP_TO_TORCH, dcp, out / "b.pt"),
        "- accelerate merge-weights": _theirs(_MERGE, folder / "pytorch_model_fsdp_0", out),
        "ZeRO-3 to .safetensors": _ours(zero, joined),
        "- zero_to_fp32.py": _theirs(_ZERO, folder, out),
        ".safetensors to .safetensors": _ours(weights, joined),
        "- load_file, save_file": _theirs(_LOAD_SAVE, weights, copy),
        ".pt with Adam to .safetensors": _ours(adam, joined),
        "- torch.load(mmap), save_file": _theirs(_TORCH_LOAD, adam, copy),
        ".safetensors to .pt": _ours(weights, out / "a.pt"),
        ".safetensors to DCP": [*_ours(weights, f"{out}/dcp/"), "--format", "dcp"],
        "DCP to DCP": [*_ours(dcp, f"{out}/dcp/"), "--format", "dcp"],
    }
    needs = {"merge-weights": "accelerate", "zero_to_fp32": "deepspeed"}
    wanted = {
        name: [str(word) for word in way]
        for name, way in ways.items()
        if all(find_spec(library) for part, library in needs.items() if part in name)
    }
    environment = measure.environment(folder)
    contenders = {name: partial(_run, way, out, environment) for name, way in wanted.items()}
    print(measure.machine())
    print(measure.table(measure.interleaved(contenders, runs), {}))
    shutil.rmtree(out)


def _ours(source: Path, output: Path | str) -> list[Path | str]:
    return [sys.executable, "-m", "ckptavg", "convert", source, "-o", output, "--no-fsync", "-q"]


def _theirs(code: str, *arguments: Path) -> list[Path | str]:
    return [sys.executable, "-W", "ignore", "-c", f"import sys\n{code}", *arguments]


def _run(way: list[str], out: Path, environment: dict[str, str]) -> measure.Run:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return measure.run(way, environment)


if __name__ == "__main__":
    main()
