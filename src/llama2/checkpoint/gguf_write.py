"""A GGUF version 3 file as a conversion target: complete metadata, then the tensors, each at a multiple of 32 bytes.

Keys and types: llama.cpp, docs/gguf.md and gguf-py/gguf/constants.py.
"""

import math
import struct
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llama2.checkpoint import Checkpoint
from llama2.checkpoint.gguf_config import yarn_attention
from llama2.checkpoint.gguf_mixture import FILE_TYPES, fitting, tensor_type
from llama2.checkpoint.names import hf_to_gguf, rotated_heads, to_pairs
from llama2.checkpoint.parallel_read import in_single_threads
from llama2.checkpoint.writer import Appender, Target, row_blocks, row_ranges
from llama2.config import LlamaConfig
from llama2.errors import InputError
from llama2.quantization.formats import BY_ID
from llama2.quantization.ggml import BlockType, block_type, dequantize
from llama2.quantization.ggml_encode import ENCODERS, quantize
from llama2.rope_types import attention_scaling

ALIGNMENT = 32
_UINT16, _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 2, 4, 5, 6, 7, 8, 9
# The file type that is named where stored types are kept and most of the weights are of this one.
_KEPT = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


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
    """One file. `kind`: its type ("Q4_0", "Q4_K_M", ...), which names that of each matrix (`gguf_mixture`), or None to
    keep what is stored.

    Vectors are float32, which llama.cpp demands. `tokenizer`: keys to store beside the architecture's. `importance`:
    what errors in the columns of a tensor count for, by Hugging Face name; tensors without it are rounded as they are.
    `split_size`: bytes above which another file begins, PREFIX-00001-of-0000N.gguf and on, each with its own directory.
    `calibrated`: whether the types are those that llama.cpp takes with an importance matrix (None: if there is one).
    """

    format = "gguf"

    def __init__(
        self,
        source: Checkpoint,
        names: Sequence[str],
        kind: str | None,
        file: str,
        tokenizer: Mapping[str, Any],
        importance: Mapping[str, Tensor] | None = None,
        calibrated: bool | None = None,
        split_size: int | None = None,
    ) -> None:
        self.config, self._importance = source.config, importance or {}
        self._calibrated = bool(importance) if calibrated is None else calibrated
        if odd := [name for name in names if hf_to_gguf(name) is None]:
            raise InputError(f"GGUF has no place for {odd[0]} ({len(odd)} such tensors); convert to hf instead")
        self.steps = list(names)
        self._entries = {name: self._entry(name, source, kind) for name in names}
        metadata = {"general.name": source.path.resolve().stem, **source.card, **architecture(self.config), **tokenizer}
        metadata["general.file_type"] = _file_type(kind or self._kept())
        metadata["general.quantization_version"] = 2
        self._tables = {"rope_freqs.weight": table} if (table := rope_divisors(self.config)) is not None else {}
        parts = self._parts(split_size)
        self._file_of = {name: i for i, names_of in enumerate(parts) for name in names_of}
        self.files = part_names(file, len(parts))
        self._heads = [
            self._header(self._keys(metadata, i, len(parts)), names_of, i == 0) for i, names_of in enumerate(parts)
        ]
        self.size = sum(map(len, self._heads)) + sum(entry.bytes + ALIGNMENT for entry in self._entries.values())
        self.requantized = {name: kind for name in names if (kind := self._again(name, source))}
        self._errors: dict[str, tuple[float, float]] = {}

    def _again(self, name: str, source: Checkpoint) -> str:
        """The quantised type of a tensor that another quantised type takes the place of, else ""."""
        entry = self._entries[name]
        return "" if entry.packed or entry.block.dense is not None else source.packed_type(name)

    def _parts(self, size: int | None) -> list[list[str]]:
        """The tensors of each file: none above `size` bytes, unless one tensor is."""
        parts: list[list[str]] = [[]]
        filled = 0
        for name, entry in self._entries.items():
            if size is not None and parts[-1] and filled + entry.bytes > size:
                parts.append([])
                filled = 0
            parts[-1].append(name)
            filled += entry.bytes + ALIGNMENT
        return parts

    def _keys(self, metadata: Mapping[str, Any], part: int, count: int) -> dict[str, Any]:
        """The metadata of one file: all of it in the first, and in each of several which of them it is."""
        if count == 1:
            return dict(metadata)
        total = len(self._entries) + len(self._tables)
        split = {"split.no": Short(part), "split.count": Short(count), "split.tensors.count": Signed(total)}
        return {**(metadata if part == 0 else {}), **split}

    def _entry(self, name: str, source: Checkpoint, kind: str | None) -> _Entry:
        shape, stored = source.tensors[name].shape, source.kept_type(name)
        if len(shape) < 2:
            return _Entry(name, shape, block_type("F32"), stored == "F32")
        if kind is None:
            type_name = fitting(block_type("F32" if stored == "F64" else stored).name, shape[-1])
        else:
            type_name = tensor_type(name, shape[-1], kind, self.config, self._calibrated)
        return _Entry(name, shape, block_type(type_name), source.tensors[name].type == type_name)

    def _kept(self) -> str:
        """The file type nearest to what the matrices are stored as."""
        counts: dict[str, int] = {}
        for entry in self._entries.values():
            if len(entry.shape) > 1:
                counts[entry.block.name] = counts.get(entry.block.name, 0) + entry.bytes
        most = max(counts, key=lambda name: counts[name], default="F32")
        return _KEPT.get(most, most)

    def block_of(self, name: str) -> BlockType:
        """The type that a tensor is stored as."""
        return self._entries[name].block

    def _header(self, metadata: Mapping[str, Any], names: Sequence[str], first: bool) -> bytes:
        tables = self._tables if first else {}
        tensors: list[tuple[str, tuple[int, ...], int, int]]
        tensors = [(name, (len(table),), 0, 4 * len(table)) for name, table in tables.items()]
        entries = [(name, self._entries[name]) for name in names]
        tensors += [(hf_to_gguf(name) or "", entry.shape, entry.block.id, entry.bytes) for name, entry in entries]
        head = container_head(metadata, tensors)
        for table in tables.values():
            data = struct.pack(f"<{len(table)}f", *table)
            head += data + bytes(-len(data) % ALIGNMENT)
        return head

    def begin(self, out: Sequence[Appender]) -> None:
        for file, head in zip(out, self._heads, strict=True):
            file.write(head)

    def write(self, name: str, source: Checkpoint, out: Sequence[Appender]) -> None:
        entry, file = self._entries[name], out[self._file_of[name]]
        heads = rotated_heads(name, self.config.num_attention_heads, self.config.num_key_value_heads)
        width = self.config.head_dim

        def encoded(rows: tuple[int, int]) -> tuple[Tensor, float, float]:
            start, stop = rows
            values = _in_pairs(source.read_rows(name, start, stop), None if heads is None else (stop - start) // width)
            blocks = quantize(values, entry.block, self._importance.get(name))
            return blocks, *(
                _squares(values, dequantize(blocks, entry.block)) if name in self.requantized else (0.0, 0.0)
            )

        if entry.packed and (source.format == "gguf" or entry.block.dense is None):
            file.write(_in_pairs(source.raw(name).rows.reshape(entry.shape[0], -1), heads))
        elif entry.block.name in ENCODERS:
            error = energy = 0.0
            for packed, missed, whole in in_single_threads(encoded, row_ranges(entry.shape, width)):
                file.write(packed)
                error, energy = error + missed, energy + whole
            if name in self.requantized:
                self._errors[name] = error, energy
        else:
            for _, rows in row_blocks(source, name, width):
                file.write(quantize(_in_pairs(rows, None if heads is None else len(rows) // width), entry.block))
        file.write(bytes(-entry.bytes % ALIGNMENT))

    def describe(self, folder: Path) -> None:
        return None

    @property
    def state(self) -> Any:
        return {name: list(pair) for name, pair in self._errors.items()}

    def restore(self, state: Any) -> None:
        self._errors = {name: (error, energy) for name, (error, energy) in (state or {}).items()}

    @property
    def loss(self) -> dict[str, Any] | None:
        """Returns what quantising again cost the weights, JSON-ready; None where nothing was quantised before."""
        if not self._errors:
            return None
        kinds = Counter(f"{self.requantized[name]} as {self._entries[name].block.name}" for name in self._errors)
        shares = {name: math.sqrt(error / energy) if energy else 0.0 for name, (error, energy) in self._errors.items()}
        whole = sum(energy for _, energy in self._errors.values())
        worst = max(shares, key=lambda name: shares[name])
        return {
            "kinds": dict(kinds.most_common()),
            "error": math.sqrt(sum(error for error, _ in self._errors.values()) / whole) if whole else 0.0,
            "worst": [hf_to_gguf(worst), shares[worst]],
        }


def _file_type(kind: str) -> int:
    """general.file_type of a file type, or of blocks that are kept."""
    file_type = FILE_TYPES[kind].id if kind in FILE_TYPES else BY_ID[kind].file_type
    assert file_type is not None, kind
    return file_type


def _squares(weights: Tensor, rounded: Tensor) -> tuple[float, float]:
    """Sums of squares: of what rounding changed, and of the weights."""
    wide = weights.double()
    return float((rounded.double() - wide).square().sum()), float(wide.square().sum())


def _in_pairs(rows: Tensor, heads: int | None) -> Tensor:
    return rows if heads is None else to_pairs(rows, heads)


class Short(int):
    """A key of 16 bits without sign."""


class Signed(int):
    """A key of 32 bits with a sign."""


def part_names(file: str, count: int) -> list[str]:
    """The names of the parts of a split file; the file's own where there is one."""
    stem = file.removesuffix(".gguf")
    return [file] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def _aligned(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _text(name) + dims + struct.pack("<IQ", kind, offset)


def container_head(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], int, int]]) -> bytes:
    """All that stands before the data, padded. tensors: name, shape, ggml type and bytes; the data of each begins at a
    multiple of 32 bytes."""
    directory, offset = [], 0
    for name, shape, type_name, size in tensors:
        directory.append(_info(name, shape, type_name, offset))
        offset = _aligned(offset + size)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(key) + encode(key, value) for key, value in metadata.items()) + b"".join(directory)
    return head + bytes(-len(head) % ALIGNMENT)


def encode(key: str, value: Any) -> bytes:
    """A metadata value with its type in front. Whole numbers are u32 alone and i32 in arrays, as llama.cpp writes."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, Short):
        return struct.pack("<IH", _UINT16, value)
    if isinstance(value, Signed):
        return struct.pack("<Ii", _INT32, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value) if value >= 0 else struct.pack("<Ii", _INT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    first = value[0] if value else ""  # an empty list, of a tokenizer without merges, is one of texts
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
    rope_type = rope["rope_type"]
    if rope_type in ("linear", "yarn"):
        keys |= {"llama.rope.scaling.type": rope_type, "llama.rope.scaling.factor": float(rope["factor"])}
        if rope_type == "yarn":
            original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
            keys["llama.rope.scaling.original_context_length"] = original
            keys |= _yarn_betas(rope)
            if rope.get("truncate") is False:
                raise InputError("GGUF has no key for yarn's truncate=False; convert to hf instead")
            scale, own = attention_scaling(rope), yarn_attention(rope["factor"])
            if abs(scale - own) > 1e-6 * own:
                keys["llama.rope.scaling.attn_factor"] = scale / own  # llama.cpp multiplies it with its own
    elif rope_type not in ("default", "llama3"):
        raise InputError(f"GGUF names no RoPE scaling {rope_type!r}; default, linear, yarn and llama3 are written")
    return keys


def _yarn_betas(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of yarn's betas where they are given; warns that llama.cpp reads none of a Llama model."""
    betas = {name: float(rope[name]) for name in ("beta_fast", "beta_slow") if name in rope}
    odd = {name: value for name, value in betas.items() if value != {"beta_fast": 32.0, "beta_slow": 1.0}[name]}
    if odd:
        flags = " ".join(f"--yarn-{name.replace('_', '-')} {value:g}" for name, value in odd.items())
        warnings.warn(
            f"llama.cpp does not read yarn's {' and '.join(odd)} from the file of a Llama model; run it there with "
            f"{flags}, or its answers are wrong",
            stacklevel=6,
        )
    return {f"llama.rope.scaling.yarn_{name}": value for name, value in betas.items()}


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
