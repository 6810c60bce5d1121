"""What each kind of input is made of, for the fuzzer to put in."""

from __future__ import annotations

from ckptavg.formats.tensors import DTYPES

CODES = [dtype.code for dtype in DTYPES if dtype.code]


def _text(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


_GLOBALS = (
    ("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter"),
    ("torch", "Size"), ("torch", "float32"), ("torch", "FloatStorage"), ("torch", "DoubleStorage"),
    ("torch", "ByteStorage"), ("torch.storage", "UntypedStorage"), ("torch", "float4_e2m1fn_x2"),
    ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_sparse_tensor"), ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_wrapper_subclass"), ("torch.distributed.tensor", "DTensor"),
    ("torch.distributed.tensor.placement_types", "Shard"),
    ("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"),
    ("builtins", "set"), ("builtins", "frozenset"), ("builtins", "dict"), ("builtins", "getattr"),
    ("numpy._core.multiarray", "scalar"), ("numpy", "dtype"), ("_codecs", "encode"),
)  # fmt: skip
_STORAGE = b"(" + _text("storage") + _named("torch", "FloatStorage")
_TENSOR = (
    _named("torch._utils", "_rebuild_tensor_v2") + b"(" + _STORAGE + _text("0") + _text("cpu")
    + b"K\x10tQK\0K\2K\3\x86K\3K\1\x86\x89NtR"
)  # fmt: skip
_KEYS = (
    "storage", "0", "1", "cpu", "state_dict", "state_dict_ema", "model", "optimizer",
    "param_groups", "lr", "epoch", "global_step", "step", "module", "ds_config", "ds_version",
    "param_shapes", "frozen_param_fragments", "shared_params", "buffer_names", "partition_count",
    "optimizer_state_dict", "fp32_flat_groups", "single_partition_of_fp32_groups", "zero_stage",
    "zero_optimization", "stage", "frozen_param_shapes", "lr_scheduler", "_last_lr", "last_epoch",
    "_schedulers", "callbacks", "best_k_models", "monitor", "metrics", "val_metrics", "metric",
    "_metadata", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "version",
    "DTensor", "ShardedTensor", "_local_tensor", "_spec", "mesh", "placements", "_layout", "axes",
    "_coordinate_on_dim", "shape", "dim", "split_factor", "shards_metadata", "shard_offsets",
    "_extra_state", "current_model_state", "f8", "f4", "i8", "a/x.ckpt", "conj", "neg",
)  # fmt: skip
PICKLE_WORDS = (
    *(bytes([code]) for code in range(ord("("), 0x98)),
    *(_named(*one) for one in _GLOBALS),
    *(_text(word) for word in _KEYS),
    *(b"K\0", b"K\1", b"K\4", b"M\0\1", b"J\xff\xff\xff\xff", b"\x8a\x08\0\0\0\0\0\0\0\x40"),
    *(b"\x8a\x08\0\0\0\0\0\0\0\x20", b"G\x7f\xf8\0\0\0\0\0\0", b"G\x3f\xe0\0\0\0\0\0\0"),
    *(b"\x8c\x03\xed\xa0\x80", b"h\0", b"h\1", b"h\2", b"q\0", b"q\1", b"\x94"),
    *(b"C\x08" + bytes(8), b"}", b")", b"]"),
    *(b"\x85R", b"\x86R", b"\x87R", b"tR", b"s", b"u", b"e", b"a", b"b", b"Q"),
    _STORAGE + _text("1") + _text("cpu") + b"K\2tQ",
    _TENSOR,
)  # fmt: skip
_DCP_WORDS = (
    "state_dict_metadata", "planner_data", "storage_data", "properties", "size", "chunks",
    "offsets", "sizes", "fqn", "offset", "index", "relative_path", "length", "storage_meta",
    "transform_descriptors", "Metadata", "TensorStorageMetadata", "BytesStorageMetadata",
    "ChunkStorageMetadata", "MetadataIndex", "_StorageInfo", "__0_0.distcp", "train_state",
    "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem",
)  # fmt: skip
_JSON_WORDS = (
    *(f'"{code}"' for code in CODES),
    '"dtype":', '"shape":', '"data_offsets":', '"__metadata__":', "null", "true", "NaN",
    "1e999", "18446744073709551616", "9223372036854775807", "-1", '"', "\\ud800", "\\u0000",
    "{}", "[]", "{", "}", "[", "]", ",", ":", '"":', '"step":', '"global_step":', '"epoch":',
    '"DCP_SHARDING_INFO":', '\\"saved_offsets\\":',
)  # fmt: skip
_INDEX_WORDS = (
    '"weight_map":', '"metadata":', '"total_size":', '"log_history":', '"learning_rate":', "..",
    '"model-00001-of-00002.safetensors"', '"model-00002-of-00002.safetensors"', '"./', '"/', "//",
    '"peft_type":', '"LORA"', '"r":', '"lora_alpha":', '"alpha_pattern":', '"rank_pattern":',
    '"use_rslora":', '"init_lora_weights":', '"loss":', ".*", "q_proj", "(", ")", "|", "?", "\\\\",
)  # fmt: skip
_ZIP_WORDS = (
    b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"/data.pkl", b"/data/0", b"/byteorder",
    b"/version", b"little", b"big", b"ckptavg", b"constants.pkl", b"archive_format",
    b"/data/aotinductor/", b"\xff\xff\xff\xff",
)  # fmt: skip
WORDS: dict[str, tuple[bytes, ...]] = {
    "safetensors": tuple(word.encode() for word in _JSON_WORDS),
    "zip": (*_ZIP_WORDS, *PICKLE_WORDS),
    "pickle": PICKLE_WORDS,
    "legacy": PICKLE_WORDS,
    "shards": tuple(word.encode() for word in _JSON_WORDS),
    "ranks": PICKLE_WORDS,
    "zero": PICKLE_WORDS,
    "dcp": (*(_text(word) for word in _DCP_WORDS), *_ZIP_WORDS, *PICKLE_WORDS),
    "index": tuple(word.encode() for word in (*_JSON_WORDS, *_INDEX_WORDS)),
}
