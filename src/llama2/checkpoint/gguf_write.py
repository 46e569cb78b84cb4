"""A GGUF version 3 file as a conversion target: complete metadata, then the tensors, each at a multiple of 32 bytes.

Keys and types: llama.cpp, docs/gguf.md and gguf-py/gguf/constants.py.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.checkpoint import Checkpoint
from llama2.checkpoint.load import in_single_threads
from llama2.checkpoint.names import hf_to_gguf, rotated_heads, to_pairs
from llama2.checkpoint.target import Appender, Target, row_blocks, row_ranges
from llama2.config import LlamaConfig
from llama2.errors import InputError
from llama2.quant.ggml import BlockType, block_type
from llama2.quant.ggml_encode import ENCODERS, quantize

ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
# general.file_type, enum llama_ftype: what most tensors are.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
# What llama.cpp takes for rows that super-blocks do not divide, and then for those that no block divides.
_NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
WRITABLE = ("F32", "F16", "BF16", *ENCODERS)


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    block: BlockType
    packed: bool  # stored with this type already: rows are copied, not encoded again

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.block.row_bytes(self.shape[-1])


class GgufTarget(Target):
    """One file. `kind`: the type of the matrices ("Q4_0", ...), or None to keep what is stored.

    Vectors are float32, which llama.cpp demands. The head (the embedding where they are tied) of a type below six
    bits is Q6_K, llama.cpp's own choice. `tokenizer`: keys to store beside the architecture's.
    """

    format = "gguf"

    def __init__(
        self, source: Checkpoint, names: Sequence[str], kind: str | None, file: str, tokenizer: Mapping[str, Any]
    ) -> None:
        self.config = source.config
        if odd := [name for name in names if hf_to_gguf(name) is None]:
            raise InputError(f"GGUF has no place for {odd[0]} ({len(odd)} such tensors); convert to hf instead")
        self.files, self.steps = [file], list(names)
        self._entries = {name: self._entry(name, source, kind) for name in names}
        metadata = {**architecture(self.config), **tokenizer}
        counts: dict[str, int] = {}
        for entry in self._entries.values():
            if len(entry.shape) > 1:
                counts[entry.block.name] = counts.get(entry.block.name, 0) + entry.bytes
        metadata["general.name"] = source.path.resolve().stem
        metadata["general.file_type"] = _FILE_TYPES.get(max(counts, key=lambda name: counts[name], default="F32"), 1)
        metadata["general.quantization_version"] = 2
        self._tables = {"rope_freqs.weight": table} if (table := rope_divisors(self.config)) is not None else {}
        self._head = self._header(metadata)
        self.size = len(self._head) + sum(entry.bytes + ALIGNMENT for entry in self._entries.values())

    def _entry(self, name: str, source: Checkpoint, kind: str | None) -> _Entry:
        shape, stored = source.tensors[name]
        if len(shape) < 2:
            return _Entry(name, shape, block_type("F32"), stored == "F32")
        if kind is None:
            wanted = "F32" if stored == "F64" else stored
        else:
            wanted = kind
            head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
            if name == head and kind in ENCODERS and block_type(kind).bits_per_weight < 6.5625:
                wanted = "Q6_K"
        if shape[-1] % block_type(wanted).weights:
            wanted = _NARROWER.get(wanted, wanted)
        if shape[-1] % block_type(wanted).weights:
            wanted = "F16"
        return _Entry(name, shape, block_type(wanted), stored == wanted)

    def _header(self, metadata: Mapping[str, Any]) -> bytes:
        directory, at = [], 0
        for name, table in self._tables.items():
            directory.append(_info(name, (len(table),), 0, at))
            at = _aligned(at + 4 * len(table))
        for name, entry in self._entries.items():
            directory.append(_info(hf_to_gguf(name) or "", entry.shape, entry.block.id, at))
            at = _aligned(at + entry.bytes)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(directory), len(metadata))
        head += b"".join(_text(key) + encode(key, value) for key, value in metadata.items()) + b"".join(directory)
        head += bytes(-len(head) % ALIGNMENT)
        for table in self._tables.values():
            data = struct.pack(f"<{len(table)}f", *table)
            head += data + bytes(-len(data) % ALIGNMENT)
        return head

    def begin(self, out: Sequence[Appender]) -> None:
        out[0].write(self._head)

    def write(self, name: str, source: Checkpoint, out: Sequence[Appender]) -> None:
        entry, file = self._entries[name], out[0]
        heads = rotated_heads(name, self.config.num_attention_heads, self.config.num_key_value_heads)
        width = self.config.head_dim

        def encoded(rows: tuple[int, int]) -> Tensor:
            start, stop = rows
            part = source.read_rows(name, start, stop)
            return quantize(_in_pairs(part, None if heads is None else (stop - start) // width), entry.block)

        if entry.packed and source.format == "gguf":
            file.write(_in_pairs(source.raw(name).rows.reshape(entry.shape[0], -1), heads))
        elif entry.block.name in ENCODERS:
            for packed in in_single_threads(encoded, row_ranges(entry.shape, width)):
                file.write(packed)
        else:
            for _, rows in row_blocks(source, name, width):
                file.write(quantize(_in_pairs(rows, None if heads is None else len(rows) // width), entry.block))
        file.write(bytes(-entry.bytes % ALIGNMENT))

    def describe(self, folder: Path) -> None:
        return None


def _in_pairs(rows: Tensor, heads: int | None) -> Tensor:
    return rows if heads is None else to_pairs(rows, heads)


def _aligned(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _text(name) + dims + struct.pack("<IQ", kind, offset)


def encode(key: str, value: Any) -> bytes:
    """A metadata value with its type in front. Whole numbers are u32 alone and i32 in arrays, as llama.cpp writes."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value) if value >= 0 else struct.pack("<Ii", _INT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    first = value[0]
    head = struct.pack("<I", _ARRAY)
    if isinstance(first, str):
        return head + struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(first, bool):
        return head + struct.pack(f"<IQ{len(value)}?", _BOOL, len(value), *value)
    if isinstance(first, int):
        return head + struct.pack(f"<IQ{len(value)}i", _INT32, len(value), *value)
    if isinstance(first, float):
        return head + struct.pack(f"<IQ{len(value)}f", _FLOAT32, len(value), *value)
    raise InputError(f"the metadata key {key} holds a {type(first).__name__}, which GGUF cannot")


def architecture(config: LlamaConfig) -> dict[str, Any]:
    """The keys from which a reader builds the model. Raises InputError for RoPE scaling that GGUF does not name."""
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "general.alignment": ALIGNMENT,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        keys |= {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
            keys["llama.rope.scaling.original_context_length"] = original
            for ours in ("beta_fast", "beta_slow"):
                if ours in rope:
                    keys[f"llama.rope.scaling.yarn_{ours}"] = float(rope[ours])
            if odd := set(rope) & {"attention_factor", "mscale", "mscale_all_dim", "truncate"}:
                raise InputError(f"GGUF has no key for yarn's {sorted(odd)[0]}; convert to hf instead")
    elif kind not in ("default", "llama3"):
        raise InputError(f"GGUF names no RoPE scaling {kind!r}; default, linear, yarn and llama3 are written")
    return keys


def rope_divisors(config: LlamaConfig) -> list[float] | None:
    """The table rope_freqs.weight by which llama.cpp divides each frequency for Llama 3.1's scaling, else None."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    if (low, high, original) != (1.0, 4.0, 8192):
        raise InputError(
            f"RoPE scaling {rope} is not that of Llama 3.1 (low 1, high 4, context 8192), the only llama3 table that "
            "GGUF readers can take back; convert to hf instead"
        )
    table = []
    for i in range(config.head_dim // 2):
        turns = original * config.rope_theta ** (-2 * i / config.head_dim) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        table.append(1 / ((1 - smooth) / factor + smooth))
    if abs(max(table) - factor) > 1e-4 * factor:
        raise InputError(
            f"with base {config.rope_theta:g} no frequency is slow enough to show the factor {factor} of {rope} in "
            "GGUF's table; convert to hf instead"
        )
    return table
