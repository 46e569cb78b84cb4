"""A GGUF file's tensors as the matrices and vectors of the engine. No torch."""

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llama2.architecture import hf_to_gguf, parameter_shapes
from llama2.config import LlamaConfig
from llama2.coverage import cover
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.quantization.formats import BLOCKS

_FLOATS: dict[int, tuple[Any, bool]] = {0: (np.float32, False), 1: (np.float16, False), 30: (np.uint16, True)}
PARTS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
PARTS |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


class Tensor(Protocol):
    """One entry of the file's directory."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def type_id(self) -> int: ...
    @property
    def offset(self) -> int: ...


class GgufSource(Protocol):
    """The interface of a file that the engine needs; `checkpoint.gguf.GgufFile` is one."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> LlamaConfig: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def files(self) -> list[Path]: ...
    @property
    def maps(self) -> list[mmap.mmap]: ...
    @property
    def data_starts(self) -> list[int]: ...
    def place(self, name: str) -> tuple[mmap.mmap, int]: ...
    def check_extents(self) -> None: ...


def unpermute(heads: int, rows: int) -> NDArray[np.int32]:
    """File row of each half-split row: GGUF interleaves the two halves of every q and k head."""
    width = rows // heads
    h, half, i = np.ogrid[:heads, :2, : width // 2]
    return np.ascontiguousarray((h * width + 2 * i + half).reshape(-1), dtype=np.int32)


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix of 4- to 8-bit blocks in the file: what packing starts from."""

    source: GgufSource
    name: str
    type_id: int
    shape: tuple[int, int]
    heads: int | None  # of q and k, whose rows are in another order in the file

    @property
    def rows(self) -> NDArray[np.int32] | None:
        """File row of each row, None where the order is the same."""
        return None if self.heads is None else unpermute(self.heads, self.shape[0])

    def raw(self) -> NDArray[np.uint8]:
        """Its blocks, in the file's map."""
        return file_bytes(self.source, self.name, self._size)

    def release(self) -> None:
        """The packed copy is what will be read: the file's pages need not stay resident beside it."""
        data, start = self.source.place(self.name)
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (start + self._size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            data.madvise(mmap.MADV_DONTNEED, first, length)

    @property
    def _size(self) -> int:
        size = BLOCKS[self.type_id]
        if self.shape[1] % size.weights:
            raise CheckpointError(
                f"tensor {self.name!r} has rows of {self.shape[1]} columns, "
                f"not a multiple of its block of {size.weights}"
            )
        return self.shape[0] * self.shape[1] // size.weights * size.bytes


def block_matrices(source: GgufSource) -> Iterator[BlockMatrix]:
    """The block matrices of a model in the order the engine asks for them: embedding, head, layers."""
    config = source.config
    names: list[tuple[str, str]] = [("token_embd", "")]
    names += [] if config.tie_word_embeddings else [("output", "")]
    names += [(f"blk.{i}.{theirs}", ours) for i in range(config.num_hidden_layers) for ours, theirs in PARTS.items()]
    for stem, linear in names:
        name = f"{stem}.weight"
        if not is_float(source, name):
            yield block_matrix(source, name, _heads(config, linear))


def block_matrix(source: GgufSource, name: str, heads: int | None = None) -> BlockMatrix:
    """One of them. Raises MismatchError, or InputError for a type without blocks or sizes."""
    info = entry(source, name)
    if len(info.shape) != 2:
        raise MismatchError(f"tensor {name!r} has {len(info.shape)} axes; a matrix is needed")
    if info.type_id not in BLOCKS or is_float(source, name):
        raise InputError(
            f"tensor {name!r} is of GGUF type {info.type_id}, which has no native kernel; use runner='torch'"
        )
    return BlockMatrix(source, name, info.type_id, (info.shape[0], info.shape[1]), heads)


def is_float(source: GgufSource, name: str) -> bool:
    """Whether a tensor is float32, float16 or bfloat16, which is used in place."""
    return entry(source, name).type_id in _FLOATS


def entry(source: GgufSource, name: str) -> Tensor:
    """A tensor of the directory. Raises MismatchError where the file lacks it."""
    if name not in source.tensors:
        raise MismatchError(f"the file has no tensor {name!r}, which the configuration needs")
    return source.tensors[name]


def file_bytes(source: GgufSource, name: str, size: int) -> NDArray[np.uint8]:
    """The first `size` bytes of a tensor. Raises CheckpointError where the file ends before."""
    data, start = source.place(name)
    if start + size > len(data):
        raise CheckpointError(
            f"tensor {name!r} ends at byte {start + size}, the file at {len(data)}; fetch the file again"
        )
    return np.frombuffer(data, np.uint8, size, start)


def check_coverage(source: GgufSource) -> None:
    """Raises MismatchError unless every parameter has its tensor of the right shape and every tensor is used.

    A bias that the file leaves out is 0: llama.cpp takes each one for itself.
    """
    config = source.config
    shapes = {hf_to_gguf(name) or name: shape for name, shape in parameter_shapes(config).items()}
    same = {"output.weight": "token_embd.weight"} if config.tie_word_embeddings else {}
    report = cover(shapes, source.tensors, same=same)
    report.refuse(str(source.path), excused=[name for name in report.missing if name.endswith(".bias")])


def _heads(config: LlamaConfig, linear: str) -> int | None:
    return {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(linear)


class MatrixMaker(Protocol):
    """Interface of a builder of matrices: `weights.CpuWeights`."""

    def place(self, matrix: BlockMatrix) -> Any: ...
    def view(self, array: NDArray[Any], bfloat16: bool = False) -> Any: ...


class Reader:
    """The tensors of one file as matrices and vectors of `engine`."""

    def __init__(self, engine: MatrixMaker, source: GgufSource) -> None:
        self.engine, self.source = engine, source

    def matrix(self, name: str, heads: int | None = None) -> Any:
        """A matrix, floats in place; `heads` where its rows are q's or k's."""
        info = entry(self.source, name)
        if not is_float(self.source, name):
            return self.engine.place(block_matrix(self.source, name, heads))
        if len(info.shape) != 2:
            raise MismatchError(f"tensor {name!r} has {len(info.shape)} axes; a matrix is needed")
        dtype, bfloat16 = _FLOATS[info.type_id]
        size = math.prod(info.shape) * np.dtype(dtype).itemsize
        values = file_bytes(self.source, name, size).view(dtype).reshape(info.shape)
        return self.engine.view(values if heads is None else values[unpermute(heads, info.shape[0])], bfloat16)

    def linear(self, stem: str, name: str) -> Any:
        """Matrix and bias, where there is one, of a linear layer; `name` is its name in PARTS."""
        heads = _heads(self.source.config, name)
        matrix = self.matrix(f"{stem}.weight", heads)
        if f"{stem}.bias" in self.source.tensors:
            bias = self.vector(f"{stem}.bias")
            matrix.set_bias(bias if heads is None else np.ascontiguousarray(bias[unpermute(heads, len(bias))]))
        return matrix

    def vector(self, name: str) -> NDArray[np.float32]:
        """A float32 tensor, copied."""
        info = entry(self.source, name)
        if info.type_id != 0:
            raise CheckpointError(f"tensor {name!r} is of GGUF type {info.type_id}; F32 is needed")
        return file_bytes(self.source, name, 4 * math.prod(info.shape)).view(np.float32).copy()
