"""Meta's format as a conversion target: consolidated.NN.pth and params.json.

A .pth file is a zip archive of stored entries: data.pkl, the state dict with each storage by number, then data/0,
data/1, ... at multiples of 64 bytes, so that torch.load can map it. It is written here entry by entry, because
torch.save takes the whole state dict at once. Sizes and checksums follow each entry (zip's data descriptor).
"""

import io
import json
import pickle
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.checkpoint import Checkpoint
from llama2.checkpoint.meta import SIDECAR, intermediate_size
from llama2.checkpoint.names import hf_to_meta, meta_axis, rotated_heads, to_pairs
from llama2.checkpoint.writer import Appender, Target, row_blocks
from llama2.config import LlamaConfig
from llama2.errors import InputError
from llama2.files import write_text

_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_ALIGNMENT = 64
_PUBLISHED: tuple[tuple[int, float | None], ...] = (  # Llama 2 7B and 13B; 70B; Llama 3 8B; 3.2 1B
    (256, None),
    (4096, 1.3),
    (1024, 1.3),
    (256, 1.5),
)
_HEADER, _DESCRIPTOR, _ENTRY, _END = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
_STREAMED, _VERSION, _DOS_DAY = 8, 45, 0x21  # sizes follow the data; zip64; 1 January 1980


class MetaTarget(Target):
    """`shards` files. Raises InputError for what Meta's code cannot express: biases, other RoPE scaling, odd heads."""

    format = "meta"

    def __init__(self, source: Checkpoint, dtypes: Mapping[str, torch.dtype], shards: int) -> None:
        self.config = source.config
        _check(self.config, dtypes, shards)
        self._params = params_of(self.config)
        self._generation = source.generation_settings
        self.files = [f"consolidated.{i:02d}.pth" for i in range(shards)]
        self._dtypes = dict(dtypes)
        self.steps = list(dtypes)
        if self.config.tie_word_embeddings:  # Meta's code always reads a head
            self.steps.append("lm_head.weight")
            self._dtypes["lm_head.weight"] = dtypes["model.embed_tokens.weight"]
        self._shapes = {name: source.tensors[_stored_as(name, source)].shape for name in self.steps}
        self._archives = [_Archive(f"consolidated.{i:02d}") for i in range(shards)]
        whole = sum(self._bytes(name, i) for name in self.steps for i in range(shards))
        self.size = whole + shards * (4096 + 512 * len(self.steps))

    def _range(self, name: str, shard: int) -> tuple[int, int]:
        """The rows or columns of the tensor that this shard holds; the first shards take what does not divide."""
        axis = meta_axis(name)
        assert axis is not None
        base, more = divmod(self._shapes[name][axis], len(self.files))
        start = shard * base + min(shard, more)
        return start, start + base + (shard < more)

    def _shape(self, name: str, shard: int) -> tuple[int, ...]:
        shape, axis = list(self._shapes[name]), meta_axis(name)
        if axis is not None:
            start, stop = self._range(name, shard)
            shape[axis] = stop - start
        return tuple(shape)

    def _bytes(self, name: str, shard: int) -> int:
        return torch.empty(self._shape(name, shard), dtype=self._dtypes[name], device="meta").nbytes

    def begin(self, out: Sequence[Appender]) -> None:
        for i, (archive, file) in enumerate(zip(self._archives, out, strict=True)):
            entries = {hf_to_meta(name) or "": (self._shape(name, i), self._dtypes[name]) for name in self.steps}
            archive.add(file, "data.pkl", [pickle_state_dict(entries)])
            archive.add(file, "byteorder", [b"little"])

    def write(self, name: str, source: Checkpoint, out: Sequence[Appender]) -> None:
        stored, dtype, axis = _stored_as(name, source), self._dtypes[name], meta_axis(name)
        key = f"data/{self.steps.index(name)}"
        heads = rotated_heads(name, self.config.num_attention_heads, self.config.num_key_value_heads)
        for archive, file in zip(self._archives, out, strict=True):
            archive.open(file, key)
        for start, rows in row_blocks(source, stored, self.config.head_dim):
            rows = rows.to(dtype)
            if heads is not None:
                rows = to_pairs(rows, len(rows) // self.config.head_dim)
            for i, (archive, file) in enumerate(zip(self._archives, out, strict=True)):
                if axis is None:
                    archive.append(file, rows)
                    continue
                low, high = self._range(name, i)
                if axis == 1:
                    archive.append(file, rows[:, low:high])
                elif low < start + len(rows) and start < high:
                    archive.append(file, rows[max(low - start, 0) : high - start])
        for archive, file in zip(self._archives, out, strict=True):
            archive.close(file)

    def end(self, out: Sequence[Appender]) -> None:
        for archive, file in zip(self._archives, out, strict=True):
            archive.add(file, "version", [b"3\n"])
            archive.finish(file)

    def describe(self, folder: Path) -> str:
        fields = self.config.to_diff_dict()
        dtype = str(self._dtypes["model.embed_tokens.weight"]).removeprefix("torch.")
        write_text(folder / SIDECAR, json.dumps({**fields, "dtype": dtype, "torch_dtype": dtype}, indent=2) + "\n")
        if self._generation is not None:
            write_text(folder / "generation_config.json", json.dumps(self._generation, indent=2) + "\n")
        write_text(folder / "params.json", json.dumps(self._params) + "\n")
        return "params.json"

    @property
    def state(self) -> Any:
        return [archive.entries for archive in self._archives]

    def restore(self, state: Any) -> None:
        for archive, entries in zip(self._archives, state, strict=True):
            archive.entries = [tuple(entry) for entry in entries]


def _stored_as(name: str, source: Checkpoint) -> str:
    return name if name in source.tensors else "model.embed_tokens.weight"


def _check(config: LlamaConfig, dtypes: Mapping[str, torch.dtype], shards: int) -> None:
    if odd := [name for name in dtypes if hf_to_meta(name) is None]:
        raise InputError(
            f"Meta's format has no place for {odd[0]} ({len(odd)} such tensors: biases or another head); "
            "convert to hf or gguf instead"
        )
    if wrong := [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in _STORAGES]:
        raise InputError(f"Meta's format holds float16, bfloat16 and float32, not {wrong[0]}; choose with dtype")
    heads = config.num_attention_heads
    if heads % shards:
        raise InputError(
            f"{heads} attention heads do not divide into {shards} shards; give a divisor, such as "
            f"{max(n for n in range(1, min(heads, shards) + 1) if heads % n == 0)}"
        )
    if heads * config.head_dim != config.hidden_size:
        raise InputError(
            f"Meta's format fixes the head width to dim / n_heads, but {heads} heads of {config.head_dim} are not "
            f"{config.hidden_size} wide; convert to hf or gguf instead"
        )
    if config.vocab_size % shards or config.intermediate_size % shards:
        warnings.warn(
            f"{config.vocab_size} tokens or {config.intermediate_size} feed-forward rows do not divide into {shards} "
            "shards; the parts differ by one row, which this library reads and Meta's code does not",
            stacklevel=5,
        )


def params_of(config: LlamaConfig) -> dict[str, Any]:
    """The content of params.json, keys of Meta's ModelArgs alone, with a feed-forward rule that gives our width."""
    multiple_of, multiplier = feed_forward_rule(config.hidden_size, config.intermediate_size)
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "multiple_of": multiple_of,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    rope = {key: value for key, value in config.rope_parameters.items() if key not in ("rope_type", "rope_theta")}
    if config.rope_parameters["rope_type"] == "llama3":
        params["use_scaled_rope"] = True
        if rope.pop("factor") != 8.0:
            params["rope_scaling_factor"] = config.rope_parameters["factor"]
        known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if rope == known:
            return params
    elif config.rope_parameters["rope_type"] == "default":
        return params
    raise InputError(
        f"Meta's code has no RoPE scaling {config.rope_parameters}; it has none, or Llama 3.1's. "
        "Convert to hf or gguf instead"
    )


def feed_forward_rule(dim: int, inner: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give this width: the published pairs first, then the shortest."""
    nearest = inner / int(8 * dim / 3)
    powers = [2**n for n in range(12, 0, -1) if inner % 2**n == 0]
    guesses = [(m, round(nearest - m / 2 / int(8 * dim / 3), digits)) for m in powers for digits in range(1, 5)]
    for multiple_of, multiplier in (*_PUBLISHED, *((m, None) for m in powers), *guesses):
        if intermediate_size(dim, multiple_of, multiplier) == inner:
            return multiple_of, multiplier
    exact = (inner + 0.5) / int(8 * dim / 3)  # int() cuts the half off again
    if intermediate_size(dim, 1, exact) != inner:
        raise InputError(f"no multiple_of and ffn_dim_multiplier give {inner} feed-forward rows for width {dim}")
    return 1, exact


# -- the archive -------------------------------------------------------------------------------------------------


class _Rebuilt:
    """Stands for a tensor in the pickle: its storage's number, shape and dtype."""

    def __init__(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.key, self.shape, self.dtype = key, shape, dtype
        self.count = torch.empty(shape, device="meta").numel()

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (_Storage(self), 0, self.shape, stride, False, OrderedDict())


class _Storage:
    def __init__(self, tensor: _Rebuilt) -> None:
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        tensor = value.tensor
        return "storage", _STORAGES[tensor.dtype], tensor.key, "cpu", tensor.count


def pickle_state_dict(entries: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    """data.pkl of a state dict of contiguous tensors with a storage each, numbered in order."""
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump({n: _Rebuilt(str(i), *entry) for i, (n, entry) in enumerate(entries.items())})
    return out.getvalue()


class _Archive:
    """A zip64 archive of stored entries that is written in one direction. `entries`: (name, crc, size, offset)."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.entries: list[tuple[str, int, int, int]] = []
        self._name, self._crc, self._size, self._at = "", 0, 0, 0

    def add(self, file: Appender, name: str, parts: Sequence[bytes]) -> None:
        self.open(file, name)
        for part in parts:
            self.append(file, part)
        self.close(file)

    def open(self, file: Appender, name: str) -> None:
        self._name, self._crc, self._size, self._at = f"{self.folder}/{name}", 0, 0, file.size
        path = self._name.encode()
        # The zip64 field makes readers expect sizes of eight bytes behind the data; "FB" is torch's name for padding.
        fixed = 30 + len(path) + 20 + 4
        padding = -(file.size + fixed) % _ALIGNMENT
        extra = struct.pack("<HHQQ", 1, 16, 0, 0) + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        none = 0xFFFFFFFF
        head = struct.pack("<5H3I2H", _VERSION, _STREAMED, 0, 0, _DOS_DAY, 0, none, none, len(path), len(extra))
        file.write(_HEADER + head + path + extra)

    def append(self, file: Appender, data: Tensor | bytes) -> None:
        if isinstance(data, Tensor):
            data = data.contiguous()
        file.write(data)
        view: Any = data
        if isinstance(data, Tensor):
            view = data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b""
        self._crc = zlib.crc32(view, self._crc)
        self._size += len(view)

    def close(self, file: Appender) -> None:
        file.write(_DESCRIPTOR + struct.pack("<IQQ", self._crc, self._size, self._size))
        self.entries.append((self._name, self._crc, self._size, self._at))

    def finish(self, file: Appender) -> None:
        """The directory, with every offset and size in eight bytes."""
        start, none = file.size, 0xFFFFFFFF
        for name, crc, size, at in self.entries:
            path, extra = name.encode(), struct.pack("<HHQQQ", 1, 24, size, size, at)
            head = struct.pack("<6H3I5H2I", _VERSION, _VERSION, _STREAMED, 0, 0, _DOS_DAY, crc, none, none,
                               len(path), len(extra), 0, 0, 0, 0, none)  # fmt: skip
            file.write(_ENTRY + head + path + extra)
        end, count = file.size, len(self.entries)
        file.write(_END64 + struct.pack("<Q2H2I4Q", 44, _VERSION, _VERSION, 0, 0, count, count, end - start, start))
        file.write(_LOCATOR64 + struct.pack("<IQI", 0, end, 1))
        file.write(_END + struct.pack("<4H2IH", 0, 0, 0xFFFF, 0xFFFF, none, none, 0))
