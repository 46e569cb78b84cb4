"""GGUF versions 2 and 3: the container and its metadata, read from a memory map. No torch, no numpy.

Layout (llama.cpp, docs/gguf.md), little endian: "GGUF", u32 version, u64 tensors, u64 keys; the keys, each a string,
a u32 type and a value; the tensor directory; padding; the data. Every count and length is compared with the bytes that
are left before anything of that size is touched.
"""

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llama2.config import LlamaConfig
from llama2.errors import CheckpointError

# GGUF value type -> struct code; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class TensorInfo:
    """One directory entry: shape slowest axis first (the reverse of the file's), ggml type, offset into the data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Every key of a GGUF file: numbers, strings and lists of them. Raises CheckpointError for a malformed file."""
    return GgufFile(path).metadata


class GgufFile:
    """The header of a GGUF file. `tensors` parses the directory, `data` maps the weights; both only when asked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map = _map(self.path)
        reader = _Reader(self._map, self.path)
        self.version, self._tensor_count, key_count = self._read_counts(reader)
        self.metadata = self._read_keys(reader, key_count)
        self._directory = reader.at

    def _read_counts(self, reader: "_Reader") -> tuple[int, int, int]:
        if self._map[:4] != b"GGUF":
            raise CheckpointError(f"{self.path} starts with {self._map[:4]!r}, not b'GGUF'; it is not a GGUF file")
        reader.at = 4
        version: int = reader.scalar("I")
        if version not in (2, 3):
            kind = "big-endian" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise CheckpointError(
                f"{self.path} is a {kind} GGUF file; little-endian versions 2 and 3 are supported. "
                "Convert it again with a current llama.cpp"
            )
        return version, reader.scalar("Q"), reader.scalar("Q")

    def _read_keys(self, reader: "_Reader", count: int) -> dict[str, Any]:
        reader.require(count, 13, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = reader.string()
            if key in metadata:
                raise CheckpointError(f"{self.path} names the key {key!r} twice; the file is malformed")
            metadata[key] = reader.value(reader.scalar("I"))
        return metadata

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensor directory by GGUF name."""
        reader = _Reader(self._map, self.path, self._directory)
        reader.require(self._tensor_count, 24, "tensors")
        found: dict[str, TensorInfo] = {}
        for _ in range(self._tensor_count):
            name, dims = reader.string(), reader.scalar("I")
            if not 1 <= dims <= _MAX_DIMS:
                raise CheckpointError(f"{self.path}: tensor {name!r} has {dims} axes; GGUF allows 1 to {_MAX_DIMS}")
            if name in found:
                raise CheckpointError(f"{self.path} names the tensor {name!r} twice; the file is malformed")
            shape = tuple(reversed([reader.scalar("Q") for _ in range(dims)]))
            found[name] = TensorInfo(name, shape, reader.scalar("I"), reader.scalar("Q"))
        self._data_start = reader.at
        return found

    @cached_property
    def data_start(self) -> int:
        """Where the weights begin, in bytes from the start of the file."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}; it must be a multiple of 8")
        self.tensors  # noqa: B018 - parsing the directory finds its end
        return -(-self._data_start // alignment) * alignment

    @property
    def data(self) -> mmap.mmap:
        """The whole file, mapped copy-on-write: writing to it changes memory only."""
        return self._map

    def floats(self, name: str) -> tuple[float, ...]:
        """A small F32 tensor as numbers."""
        info = self.tensors[name]
        count = math.prod(info.shape)
        start = self.data_start + info.offset
        if info.type_id != 0 or start + 4 * count > len(self._map):
            raise CheckpointError(f"{self.path}: tensor {name!r} is not F32 within the file; fetch the file again")
        return struct.unpack_from(f"<{count}f", self._map, start)

    @cached_property
    def config(self) -> LlamaConfig:
        """The architecture of the model in the file."""
        return config_from(self)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise CheckpointError(f"{path} has {size} bytes; a GGUF header alone has 24. Fetch the file again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; give the path of a GGUF file") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder; give the path of the GGUF file in it") from error


class _Reader:
    """A cursor over the header that refuses to pass the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path, at: int = 0) -> None:
        self.data, self.path, self.at, self.size = data, path, at, len(data)

    def require(self, count: int, each: int, what: str) -> None:
        """Raises CheckpointError unless `count` items of at least `each` bytes are left."""
        left = self.size - self.at
        if count * each > left:
            raise CheckpointError(
                f"{self.path} is truncated or malformed: at byte {self.at} it announces {count} {what} "
                f"(at least {count * each} bytes), but {left} bytes are left. Fetch the file again"
            )

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.require(1, size, "number")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.require(length, 1, "bytes of text")
        start, self.at = self.at, self.at + length
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: the text at byte {start} is not UTF-8; fetch the file again"
            ) from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        return self.scalar(self._code(kind))

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: value type {kind} at byte {self.at} is unknown (arrays of arrays are not supported); "
                "the file is malformed or of a newer format"
            )
        return _SCALARS[kind]

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return self._strings(count)
        code = self._code(kind)
        size = struct.calcsize("<" + code)
        self.require(count, size, "array items")
        start, self.at = self.at, self.at + count * size
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))

    def _strings(self, count: int) -> list[str]:
        # A vocabulary is 50,000 to 200,000 strings: one tight loop over plain bytes, bounds checked once per string.
        self.require(count, 8, "strings")
        data, at, size = self.data, self.at, self.size
        length_at = struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(data, at)[0]
                if at > size:
                    break
                found.append(data[start:at].decode())
        except (struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: the strings at byte {self.at} are malformed ({error})") from error
        if at > size:
            raise CheckpointError(
                f"{self.path} is truncated or malformed: a string ends at byte {at}, the file at byte {size}. "
                "Fetch the file again"
            )
        self.at = at
        return found


def config_from(file: GgufFile) -> LlamaConfig:
    """LlamaConfig from the keys of a GGUF file. Raises CheckpointError for another architecture or a missing key."""
    keys = _Keys(file.metadata, file.path)
    keys.refuse_foreign()
    heads = keys.integer("llama.attention.head_count")
    width = keys.integer("llama.embedding_length")
    head_dim = keys.integer("llama.attention.key_length", width // max(heads, 1))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: {key} is {file.metadata[key]} but heads are {head_dim} wide; "
                "models that rotate or value only a part of each head are not supported"
            )
    context = keys.integer("llama.context_length")
    return LlamaConfig(
        vocab_size=_vocab_size(file, keys),
        hidden_size=width,
        intermediate_size=keys.integer("llama.feed_forward_length"),
        num_hidden_layers=keys.integer("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("llama.attention.head_count_kv", heads),
        max_position_embeddings=context,
        rms_norm_eps=keys.number("llama.attention.layer_norm_rms_epsilon"),
        head_dim=None if head_dim * heads == width else head_dim,
        rope_theta=keys.number("llama.rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, keys, head_dim, context),
        bos_token_id=keys.optional_id("tokenizer.ggml.bos_token_id"),
        eos_token_id=keys.optional_id("tokenizer.ggml.eos_token_id"),
        pad_token_id=keys.optional_id("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        architectures=["LlamaForCausalLM"],
    )


class _Keys:
    """Metadata with the type of each value checked."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata, self.path = metadata, path

    def refuse_foreign(self) -> None:
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(
                f"{self.path}: general.architecture is {architecture!r}, but this library runs 'llama' only; "
                "load that file with a library for its architecture"
            )
        for key in ("llama.expert_count", "llama.attention.sliding_window"):
            if self.metadata.get(key):
                raise CheckpointError(
                    f"{self.path}: {key} is {self.metadata[key]!r}; mixtures of experts and sliding windows are not "
                    "Llama models. Load the file with a library for its architecture"
                )

    def _get(self, key: str, default: Any, kinds: tuple[type, ...]) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: the key {key} is missing; the file does not describe a Llama model")
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key} is {value!r}; one {kinds[-1].__name__} is needed")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._get(key, default, (int,)))

    def number(self, key: str, default: float | None = None) -> float:
        # The file holds float32; seven digits give back what its maker wrote (1e-05, not 9.999999747378752e-06).
        return float(f"{self._get(key, default, (int, float)):.7g}")

    def optional_id(self, key: str) -> int | None:
        return None if key not in self.metadata else self.integer(key)


def _vocab_size(file: GgufFile, keys: _Keys) -> int:
    if "token_embd.weight" in file.tensors:
        return file.tensors["token_embd.weight"].shape[0]
    return keys.integer("llama.vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())) or None)


def _rope_scaling(file: GgufFile, keys: _Keys, head_dim: int, context: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, keys, head_dim)
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    if kind == "none" and "llama.rope.scale_linear" in file.metadata:
        return {"rope_type": "linear", "factor": keys.number("llama.rope.scale_linear")}
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{file.path}: rope scaling {kind!r} is not supported; none, linear and yarn are")
    settings: dict[str, Any] = {"rope_type": kind, "factor": keys.number("llama.rope.scaling.factor")}
    if kind == "yarn":
        original = keys.integer("llama.rope.scaling.original_context_length", context)
        settings["original_max_position_embeddings"] = original
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if f"llama.rope.scaling.{theirs}" in file.metadata:
                settings[ours] = keys.number(f"llama.rope.scaling.{theirs}")
    return settings


def _llama3_scaling(file: GgufFile, keys: _Keys, head_dim: int) -> dict[str, Any]:
    """The settings behind a table of frequency divisors. llama.cpp writes the table of Llama 3.1 and 3.2 only, whose
    settings differ in the factor alone; a table that they do not explain is refused rather than guessed at."""
    divisors = file.floats("rope_freqs.weight")
    low, high = 1.0, 4.0
    original = keys.integer("llama.rope.scaling.original_context_length", 8192)
    factor, theta = max(divisors, default=1.0), keys.number("llama.rope.freq_base", 10000.0)
    expected = []
    for i in range(head_dim // 2):
        turns = original * theta ** (-2 * i / head_dim) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if len(expected) != len(divisors) or any(abs(a - b) > 1e-4 * b for a, b in zip(divisors, expected, strict=True)):
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight is not the table of Llama 3.1 (low 1, high 4, context {original}) "
            "for any factor; load the Hugging Face checkpoint of this model instead"
        )
    return {
        "rope_type": "llama3",
        "factor": float(f"{factor:.6g}"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
