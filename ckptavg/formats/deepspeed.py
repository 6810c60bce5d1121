"""What DeepSpeed writes as `mp_rank_00_model_states.pt`, as far as it matters for the weights.

https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html. The weights are in `module`,
and the real shapes of the parameters in `param_shapes`: a list of mappings, one for each group of
the optimizer. ZeRO's stage 3 leaves each parameter empty there, and its pieces in other files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from ckptavg.formats.pickled import PickledTensor

_MARKS = ("ds_version", "ds_config", "dp_world_size")


def is_deepspeed(root: object) -> TypeGuard[Mapping[Any, object]]:
    """Whether DeepSpeed's engine wrote this, by what stands beside the weights."""
    return isinstance(root, Mapping) and "module" in root and any(mark in root for mark in _MARKS)


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
