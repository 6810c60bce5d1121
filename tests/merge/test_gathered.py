"""Tensors in another order in every file, and what goes wrong with them."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

import ckptavg
from ckptavg.errors import CkptAvgError, ValueRangeError


def _write(path, tensors):
    header, data = {"__metadata__": {"step": path.stem.split("_")[1]}}, b""
    for name, values in tensors.items():
        raw = np.ascontiguousarray(values).tobytes()
        codes = {"f": "F32", "e": "F16", "q": "I64"}
        header[name] = {
            "dtype": codes[values.dtype.char.replace("l", "q")],
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _run(folder, count=5, tensors=600):
    """Checkpoints whose tensors stand in any order; returns their means by name."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    shapes = [(generator.integers(0, 9), generator.integers(1, 9)) for _ in range(tensors)]
    shapes[7] = (np.int64(300), np.int64(300))
    dtypes = [np.float16 if number % 11 == 0 else np.float32 for number in range(tensors)]
    sums: dict[str, np.ndarray] = {}
    for step in range(count):
        names = [f"layer.{number}.weight" for number in range(tensors)]
        generator.shuffle(names)
        state = {}
        for name in names:
            number = int(name.split(".")[1])
            state[name] = generator.standard_normal(shapes[number]).astype(dtypes[number])
            sums[name] = sums.get(name, 0) + state[name].astype(np.float64)
        state["counter"] = np.array([3], np.int64)
        _write(folder / f"step_{step}.safetensors", state)
    means = {name: (total / count).astype(np.float32) for name, total in sums.items()}
    return {name: mean.astype(dtypes[int(name.split(".")[1])]) for name, mean in means.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathered") / "run"
    return folder, _run(folder)


def test_any_order_has_the_same_mean(run, tmp_path):
    folder, means = run
    ckptavg.average(folder, tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    assert found.pop("counter") == [3]
    assert found.keys() == means.keys()
    for name, mean in means.items():
        assert np.array_equal(found[name], mean), name


def test_a_value_that_is_none_is_named(run, tmp_path):
    folder, means = run
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    wrong = tmp_path / "step_2.safetensors"
    state = load_file(wrong)
    state["layer.7.weight"] = np.full_like(means["layer.7.weight"], np.nan)
    _write(wrong, {name: state[name] for name in sorted(state)})
    with pytest.raises(ValueRangeError, match=r"step_2\.safetensors: layer\.7\.weight: elem"):
        ckptavg.average(tmp_path, tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_another_shape_in_one_of_them_is_an_error(run, tmp_path):
    folder, _ = run
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "step_3.safetensors")
    state["layer.7.weight"] = state["layer.7.weight"].reshape(90_000)
    _write(tmp_path / "step_3.safetensors", state)
    with pytest.raises(CkptAvgError, match=r"layer\.7\.weight: shape"):
        ckptavg.average(tmp_path, tmp_path / "o.safetensors")
