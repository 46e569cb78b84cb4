"""Model files of two programs before GGUF: llama.cpp's GGML (ggml, ggmf, ggjt 1 to 3) and llama2.c's .bin (0 to 2).

GGML: magic (a version behind it from ggmf on), n_vocab, n_embd, n_mult, n_head, n_layer, n_rot, ftype; the vocabulary,
each entry a length, bytes and, from ggmf on, a score; tensors to the end of the file: axes, length of the name, type,
sizes innermost first, name, in ggjt padding to 32 bytes, data. Names and the order of q's and k's rows are Meta's.
Blocks of ggjt 3 are GGUF's; before, Q4 and Q8 had float32 scales, and before ggjt 2 a byte held neighbours.

llama2.c: version 0 is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, negative where the head
is separate, max_seq_len) and float32 tensors, each kind through all layers; 1 and 2 have a magic word, a header of 256
bytes and another order; 2 holds int8 and a float32 scale per group, of all matrices.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.architecture import parameter_shapes
from llama2.checkpoint import Checkpoint, RawTensor, Stored
from llama2.checkpoint.directory import found
from llama2.checkpoint.names import meta_to_hf, rotated_heads, to_half_split
from llama2.checkpoint.torch_tensors import CODES
from llama2.config import LlamaConfig
from llama2.coverage import cover, is_table
from llama2.errors import CheckpointError
from llama2.mapping import mapped
from llama2.quantization.ggml import block_type, dequantize

_MAGIC = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt"}
_DENSE = {0: torch.float32, 1: torch.float16}
_NAMES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_2", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K",
          11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}  # fmt: skip
_LIMIT = 1 << 24
# Blocks before ggjt 3: factors of 4 bytes (True) or 2, how many, bits of a code, weights of a block.
_OLD_SHAPES = {
    2: (True, 1, 4, 32), 3: (True, 2, 4, 32), 4: (False, 1, 4, 16), 6: (False, 1, 5, 32), 7: (False, 2, 5, 32),
    8: (True, 1, 8, 32),
}  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: shape slowest axis first, ggml's type, bytes from the start of the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


class _OldBlocks:
    """Blocks of one type before ggjt 3: float32 factors, and before ggjt 2 neighbours in one byte."""

    def __init__(self, kind: int, pairs: bool) -> None:
        self.wide, self.factors, self.bits, self.weights = _OLD_SHAPES[kind]
        self.pairs = pairs

    @property
    def head(self) -> int:
        """Bytes before the codes."""
        return self.factors * (4 if self.wide else 2) + (4 if self.bits == 5 else 0)

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return self.head + (self.weights if self.bits == 8 else self.weights // 2)

    def decode(self, rows: Tensor) -> Tensor:
        """Weights (N, K) float32 of rows (N, bytes)."""
        b = rows.reshape(-1, self.bytes)
        size = 4 if self.wide else 2
        dtype = torch.float32 if self.wide else torch.float16
        d, *m = (b[:, size * i : size * (i + 1)].contiguous().view(dtype).float() for i in range(self.factors))
        if self.bits == 8:
            return (b[:, self.head :].contiguous().view(torch.int8).float() * d).view(len(rows), -1)
        low, high = b[:, self.head :] & 15, b[:, self.head :] >> 4
        q = (torch.stack((low, high), 2).flatten(1) if self.pairs else torch.cat((low, high), 1)).int()
        if self.bits == 5:
            fifth = b[:, self.head - 4 : self.head]
            q = q | torch.stack([(fifth >> bit) & 1 for bit in range(8)], 2).flatten(1).int() << 4
        if m:
            return (q.float() * d + m[0]).view(len(rows), -1)
        return ((q - (1 << (self.bits - 1))).float() * d).view(len(rows), -1)


class LegacyCheckpoint(Checkpoint):
    """Base class of both formats: Meta's names, rows of q and k in rotary pairs, everything from one mapped file."""

    path: Path
    _places: dict[str, _Place]

    def _rows(self, name: str) -> Tensor:
        """The tensor in the file's order of rows, unpacked."""
        raise NotImplementedError

    def _check(self) -> None:
        expected = parameter_shapes(self.config)
        stored = {name: Stored(placed.shape, "") for name, placed in self._places.items()}
        same = {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}
        cover(expected, stored, same=same).refuse(str(self.path))

    @property
    def generation_settings(self) -> dict[str, Any] | None:
        return None

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        values = self._rows(name)
        heads = rotated_heads(name, self.config.num_attention_heads, self.config.num_key_value_heads)
        if heads is not None:
            values = to_half_split(values, heads)
        return values if dtype is None else values.to(dtype)

    def raw(self, name: str) -> RawTensor:
        tensor = self.read(name).contiguous()
        rows = tensor.reshape(-1, tensor.shape[-1]).view(torch.uint8)
        return RawTensor(rows, CODES[tensor.dtype], tuple(tensor.shape))


class GgmlCheckpoint(LegacyCheckpoint):
    """A GGML file. Context, epsilon and RoPE base are not stored: Llama 2's are taken."""

    format = "ggml"

    def __init__(self, path: Path) -> None:
        self.path = path
        with found(path) as file:
            self._data = mapped(file)
        self._at = 0
        magic = bytes(self._take(4))
        if magic not in _MAGIC:
            raise CheckpointError(f"{path} starts with {magic!r}, which is no GGML file")
        self.kind = _MAGIC[magic]
        self.version = 0 if self.kind == "ggml" else self._number()
        if self.kind == "ggjt" and self.version not in (1, 2, 3):
            raise CheckpointError(f"{path} is ggjt version {self.version}; 1, 2 and 3 are read")
        self.sizes = [self._number() for _ in range(7)]
        self.vocabulary = list(self._words())
        self._places = dict(self._directory())
        self._check()

    # -- the file ------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> memoryview:
        if count < 0 or self._at + count > len(self._data):
            raise CheckpointError(
                f"{self.path} is truncated or malformed: {count} bytes are needed at byte {self._at}, the file has "
                f"{len(self._data)}; fetch it again"
            )
        self._at += count
        return memoryview(self._data)[self._at - count : self._at]

    def _number(self) -> int:
        return int(struct.unpack("<I", self._take(4))[0])

    def _words(self) -> Iterator[tuple[bytes, float]]:
        count = self.sizes[0]
        if not 0 < count <= _LIMIT or count * 4 > len(self._data):
            raise CheckpointError(f"{self.path} announces {count} tokens; it is malformed: fetch it again")
        for i in range(count):
            word = bytes(self._take(self._number()))
            yield word, -float(i) if self.kind == "ggml" else float(struct.unpack("<f", self._take(4))[0])

    def _directory(self) -> Iterator[tuple[str, _Place]]:
        names: set[str] = set()
        while self._at < len(self._data):
            axes, length, code = (self._number() for _ in range(3))
            if axes not in (1, 2) or length > 4096 or code not in _NAMES:
                raise CheckpointError(
                    f"{self.path}: a tensor of {axes} axes, type {code} at byte {self._at}; the file is malformed, or "
                    f"of a type that is not read ({', '.join(_NAMES.values())} are)"
                )
            shape = tuple(reversed([self._number() for _ in range(axes)]))
            try:
                said = bytes(self._take(length)).decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{self.path}: a name at byte {self._at} is no text; fetch it again") from error
            if self.kind == "ggjt":
                self._at += -self._at % 32
            start = self._at
            self._take(math.prod(shape[:-1]) * self._row_bytes(code, shape[-1]))
            if is_table(said):
                continue
            name = meta_to_hf(said)
            if name is None or name in names:
                raise CheckpointError(f"{self.path}: the tensor {said!r} belongs to no Llama model, or comes twice")
            names.add(name)
            yield name, _Place(shape, code, start)

    def _old(self, kind: int) -> _OldBlocks | None:
        """The layout of a type where it is not GGUF's."""
        if self.kind == "ggjt" and self.version == 3:
            return None
        pairs = not (self.kind == "ggjt" and self.version == 2)
        if kind in (6, 7):  # from the first day as GGUF's but for the order
            return _OldBlocks(kind, pairs)
        return _OldBlocks(kind, pairs) if kind in _OLD_SHAPES else None

    def _row_bytes(self, kind: int, columns: int) -> int:
        old = self._old(kind)
        weights, size = (old.weights, old.bytes) if old else (0, 0)
        if not old:
            block = block_type(_NAMES[kind])
            weights, size = block.weights, block.bytes
        if columns % weights:
            raise CheckpointError(f"{self.path}: rows of {columns} weights are no whole blocks of {_NAMES[kind]}")
        return columns // weights * size

    def _rows(self, name: str) -> Tensor:
        place = self._places[name]
        size = self._row_bytes(place.kind, place.shape[-1])
        count = math.prod(place.shape[:-1]) * size
        rows = torch.frombuffer(self._data, dtype=torch.uint8, count=count, offset=place.start).view(-1, size)
        if (dense := _DENSE.get(place.kind)) is not None:
            aligned = rows if place.start % dense.itemsize == 0 else rows.clone()
            return aligned.view(dense).view(place.shape)
        old = self._old(place.kind)
        values = old.decode(rows) if old else dequantize(rows, _NAMES[place.kind])
        return values.view(place.shape)

    # -- what it is ----------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> LlamaConfig:
        vocabulary, width, _, heads, layers, _, _ = self.sizes
        gate = self._places.get("model.layers.0.mlp.gate_proj.weight")
        keys = self._places.get("model.layers.0.self_attn.k_proj.weight")
        if gate is None or keys is None or not 0 < heads <= width <= _LIMIT or width % heads or not 0 < layers < 1000:
            raise CheckpointError(f"{self.path} has sizes {self.sizes[:6]} of no Llama model; fetch it again")
        head_dim = width // heads
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, keys.shape[0] // head_dim),
            intermediate_size=gate.shape[0],
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            tie_word_embeddings="lm_head.weight" not in self._places,
        )

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        return {
            name: Stored(p.shape, _NAMES[p.kind] if p.kind in _DENSE else "F32") for name, p in self._places.items()
        }

    def packed_type(self, name: str) -> str:
        type_name = self._places[name].kind
        return "" if type_name in _DENSE else _NAMES[type_name]

    def kept_type(self, name: str) -> str:
        """Blocks become what "auto" means: float32 would double the size."""
        return "F16" if self._places[name].kind not in _DENSE else self.tensors[name].type

    @property
    def auto_dtype(self) -> str:
        kinds = {placed.kind for placed in self._places.values() if len(placed.shape) > 1}
        return "float32" if kinds == {0} else "float16"

    @property
    def tokenizer_source(self) -> Path | dict[str, Any]:
        """The folder where tokenizer.model lies in it, else the vocabulary of the file as GGUF's keys."""
        if (self.path.parent / "tokenizer.model").exists():
            return self.path.parent
        return vocabulary_keys(self.vocabulary)


class Llama2cCheckpoint(LegacyCheckpoint):
    """A .bin file of llama2.c."""

    format = "llama2.c"

    def __init__(self, path: Path) -> None:
        self.path = path
        with found(path) as file:
            self._data = mapped(file)
        head = bytes(self._data[:256])
        self.group = 0
        if head[:4] == b"24ka":
            if len(head) < 256:
                raise CheckpointError(f"{path} is truncated: its header has 256 bytes; fetch it again")
            self.version, *self.sizes = struct.unpack_from("<8i", head, 4)
            if self.version not in (1, 2):
                raise CheckpointError(f"{path} is llama2.c version {self.version}; 0, 1 and 2 are read")
            tied, start = head[36] == 1, 256
            if self.version == 2:
                (self.group,) = struct.unpack_from("<i", head, 37)
        else:
            if len(head) < 28:
                raise CheckpointError(f"{path} has {len(head)} bytes; a header alone has 28. Fetch it again")
            self.version, start = 0, 28
            self.sizes = list(struct.unpack_from("<7i", head))
            tied = self.sizes[5] > 0
            self.sizes[5] = abs(self.sizes[5])
        width, inner, layers, heads, kv_heads, vocabulary, context = self.sizes
        if min(self.sizes) < 1 or max(self.sizes) > _LIMIT or width % heads or heads % kv_heads or layers > 1000:
            raise CheckpointError(f"{path} has sizes {self.sizes} of no Llama model; fetch it again")
        self.config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, intermediate_size=inner, max_position_embeddings=context,
            rms_norm_eps=1e-5, tie_word_embeddings=tied,
        )  # fmt: skip
        self._places = dict(self._place(start))
        self._check()

    def _order(self) -> Iterator[tuple[str, bool]]:
        """Names in the order of the file, and whether of all layers."""
        norms = [("input_layernorm", True), ("post_attention_layernorm", True)]
        attention = [(f"self_attn.{name}_proj", True) for name in "qkvo"]
        mlp = [(f"mlp.{name}_proj", True) for name in ("gate", "down", "up")]
        if self.version == 0:
            yield from [("model.embed_tokens", False), norms[0], *attention, norms[1], *mlp, ("model.norm", False)]
        else:
            yield from [*norms, ("model.norm", False), ("model.embed_tokens", False), *attention, *mlp]

    def _place(self, at: int) -> Iterator[tuple[str, _Place]]:
        shapes, c = parameter_shapes(self.config), self.config
        for name, layered in self._order():
            for i in range(c.num_hidden_layers if layered else 1):
                full = f"model.layers.{i}.{name}.weight" if layered else f"{name}.weight"
                yield full, _Place(shapes[full], 0, at)
                at += self._size(shapes[full])
        if self.version == 0:
            at += 4 * c.max_position_embeddings * c.head_dim  # cosines and sines
        if not c.tie_word_embeddings:
            yield "lm_head.weight", _Place(shapes["lm_head.weight"], 0, at)
            at += self._size(shapes["lm_head.weight"])
        if at != len(self._data):
            raise CheckpointError(
                f"{self.path} has {len(self._data)} bytes, its header announces {at}; it is truncated or another file"
            )

    def _size(self, shape: tuple[int, ...]) -> int:
        count = math.prod(shape)
        if self.version < 2 or len(shape) == 1:
            return 4 * count
        if self.group < 1 or count % self.group:
            raise CheckpointError(f"{self.path}: groups of {self.group} do not divide {count} weights; fetch it again")
        return count + 4 * (count // self.group)

    def _floats(self, count: int, at: int) -> Tensor:
        data = torch.frombuffer(self._data, dtype=torch.uint8, count=4 * count, offset=at)
        return (data if at % 4 == 0 else data.clone()).view(torch.float32)

    def _rows(self, name: str) -> Tensor:
        place = self._places[name]
        count = math.prod(place.shape)
        if self.version < 2 or len(place.shape) == 1:
            return self._floats(count, place.start).view(place.shape)
        codes = torch.frombuffer(self._data, dtype=torch.int8, count=count, offset=place.start)
        scales = self._floats(count // self.group, place.start + count)
        return (codes.view(-1, self.group).float() * scales[:, None]).view(place.shape)

    @cached_property
    def config(self) -> LlamaConfig:  # set where the header is read
        raise AssertionError("the header comes first")

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        return {name: Stored(placed.shape, "F32") for name, placed in self._places.items()}

    def packed_type(self, name: str) -> str:
        return "int8" if self.version == 2 and len(self._places[name].shape) > 1 else ""

    def kept_type(self, name: str) -> str:
        """bfloat16 of matrices that were bytes."""
        return "BF16" if self.version == 2 and len(self._places[name].shape) > 1 else "F32"

    @property
    def auto_dtype(self) -> str:
        return "bfloat16" if self.version == 2 else "float32"

    @property
    def tokenizer_source(self) -> Path | dict[str, Any]:
        """tokenizer.model beside the file, else its tokenizer.bin as GGUF's keys."""
        folder = self.path.parent
        if (folder / "tokenizer.bin").exists() and not (folder / "tokenizer.model").exists():
            return vocabulary_keys(_tokenizer_bin(folder / "tokenizer.bin", self.config.vocab_size))
        return folder


def _tokenizer_bin(path: Path, count: int) -> list[tuple[bytes, float]]:
    """Entries of llama2.c's tokenizer.bin: the longest length; a score, a length and bytes each."""
    with found(path) as file:
        data = file.read()
    offset = 4
    entries: list[tuple[bytes, float]] = []
    for _ in range(count):
        if offset + 8 > len(data):
            raise CheckpointError(f"{path} ends after {len(entries)} of {count} tokens; it is of another model")
        score, length = struct.unpack_from("<fi", data, offset)
        if length < 0 or offset + 8 + length > len(data):
            raise CheckpointError(f"{path}: a token at byte {offset} has {length} bytes; the file is damaged")
        entries.append((data[offset + 8 : offset + 8 + length], score))
        offset += 8 + length
    return entries


def vocabulary_keys(words: list[tuple[bytes, float]]) -> dict[str, Any]:
    """Llama's vocabulary as the keys of a GGUF file: ids 0 to 2 are <unk>, <s>, </s>, 3 to 258 the bytes."""
    tokens, types = [], []
    for i, (word, _) in enumerate(words):
        if i < 3:
            tokens.append(("<unk>", "<s>", "</s>")[i])
            types.append(2 if i == 0 else 3)
        elif i < 259 and len(words) >= 259:
            tokens.append(f"<0x{i - 3:02X}>")
            types.append(6)
        else:
            tokens.append(word.decode("utf-8", errors="replace").replace(" ", "\u2581"))
            types.append(1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [score for _, score in words],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
