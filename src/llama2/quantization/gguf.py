"""GGUF's blocks as layers of a torch model: a linear and an embedding whose rows stay as the file packs them.

A tensor of the file is one buffer, uint8 (rows, row_bytes), called "weight.Q4_0" after its type, so that a state dict
says by itself how it is read. The buffer may be a view of the mapped file: q and k then lie in the file's order of rows
(`heads` says of how many heads) until the weight or the state dict is read, which are in the model's order.
A float matrix of another dtype than the model computes in is a block type as well: F16, BF16, F32.

The head of a tied model holds nothing itself: it reads the rows of the embedding.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llama2.errors import CheckpointError, InputError
from llama2.quantization.ggml import TYPES, dequantize
from llama2.quantization.linear import Fused, PackedLinear, PackedTensors

PREFIX = "weight."


class FilePlace(NamedTuple):
    """Where the rows of a layer lie in a mapped file, a `cpu.gguf_reader.GgufSource`, under GGUF's name."""

    file: Any
    name: str


# Beside the layers and not in them: a layer stays what torch can copy and pickle.
_ORIGINS: WeakKeyDictionary[nn.Module, tuple[FilePlace, int]] = WeakKeyDictionary()


def remember(layer: nn.Module, origin: FilePlace) -> None:
    """Notes that the rows of `layer` are those of a file, in its map."""
    _ORIGINS[layer] = origin, rows_of(layer).data_ptr()


def origin_of(layer: nn.Module) -> FilePlace | None:
    """The file in whose map the rows of `layer` still lie unchanged; None for rows of their own."""
    origin, address = _ORIGINS.get(layer, (None, 0))
    if origin is None:
        return None
    rows = rows_of(layer)
    return origin if rows.data_ptr() == address and not rows.is_inference() and rows._version == 0 else None


def rows_of(layer: nn.Module) -> Tensor:
    """The packed rows (rows, row_bytes) of one of the two layers, as they lie in memory."""
    assert isinstance(layer, GgufLinear | GgufEmbedding)
    return layer.packed[PREFIX + layer.kind]


def checked(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[str, Tensor]:
    """The type and the rows among the tensors of a file. Raises CheckpointError where they are not of that shape."""
    if len(tensors) != 1 or not (name := next(iter(tensors))).startswith(PREFIX) or name[len(PREFIX) :] not in TYPES:
        raise CheckpointError(
            f"it has {', '.join(sorted(tensors)) or 'no tensor'}; one tensor called weight.TYPE is needed, TYPE one of "
            f"{', '.join(TYPES)}: save the model again"
        )
    kind, rows = name[len(PREFIX) :], tensors[name]
    wanted = (shape[0], TYPES[kind].row_bytes(shape[1]))
    if rows.dtype != torch.uint8 or tuple(rows.shape) != wanted:
        raise CheckpointError(
            f"{name} is {rows.dtype} {tuple(rows.shape)}; torch.uint8 {wanted} is needed: save the model again"
        )
    return kind, rows


def in_order(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k as half-split rotation takes them, from GGUF's order, in which the halves of a head alternate."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else rows


class GgufLinear(PackedLinear):
    """A linear layer of GGUF's blocks."""

    def __init__(
        self,
        shape: tuple[int, int],
        kind: str,
        rows: Tensor | None,
        bias: nn.Parameter | None,
        heads: int = 0,
        tied: "GgufEmbedding | None" = None,
    ) -> None:
        """rows: None with `tied`, whose rows are read."""
        super().__init__(shape, {} if rows is None else {PREFIX + kind: rows}, bias)
        self.kind, self.heads = kind, heads
        self.__dict__["tied"] = tied  # not as a part: it is the model's embedding

    @classmethod
    def from_file(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: nn.Parameter | None, config: Any
    ) -> Self:
        """As PackedLinear.from_file: one tensor, "weight.TYPE"."""
        kind, rows = checked(tensors, shape)
        return cls(shape, kind, rows, bias)

    @classmethod
    def quantize(cls, weight: Tensor, bias: nn.Parameter | None, config: Any) -> Self:
        """GGUF's types are not made while a model is loaded: raises InputError."""
        raise InputError(
            "a model is not quantised to GGUF's blocks while it is loaded; write a GGUF file with `llama2 quantize SRC "
            "x.gguf --method gguf:q4_k_m` and load that"
        )

    @property
    def packed(self) -> dict[str, Tensor]:
        """As PackedLinear.packed; of a tied head the embedding's."""
        tied: GgufEmbedding | None = self.__dict__["tied"]
        return super().packed if tied is None else tied.packed

    @property
    def packed_count(self) -> int:
        """As PackedLinear.packed_count; a tied head has none of its own."""
        return super().packed_count if self.__dict__["tied"] is None else 0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As PackedLinear.dequantize: ggml's own numbers in float32, rounded once to another dtype."""
        return unpacked(rows_of(self), self.kind, self.heads, dtype)

    def packable(self) -> None:
        """Never asked for: the engine takes blocks as they are (`cpu.modules.blocks_of`)."""
        raise AssertionError("GGUF's blocks are packed by their type")

    def has_kernels(self, dtype: torch.dtype, device: torch.device) -> bool:
        """None of GGUF's types has kernels on a GPU."""
        return False

    def fused(self) -> Fused:
        """Never asked for: `has_kernels` is false."""
        raise AssertionError("GGUF's blocks have no kernels on a GPU")

    def extra_repr(self) -> str:
        """Returns the text that print(model) shows."""
        return f"{super().extra_repr()}, {self.kind}{'' if self.__dict__['tied'] is None else ', tied'}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + PREFIX + self.kind] = in_order(rows_of(self), self.heads)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.__dict__["tied"] is not None:
            return
        name = PREFIX + self.kind
        if prefix + name in state_dict and (self.heads or origin_of(self) is not None):
            self._buffers[name], self.heads = torch.empty_like(rows_of(self)), 0  # its own memory, in the model's order
        super()._load_from_state_dict(state_dict, prefix, *rest)


class GgufEmbedding(PackedTensors, nn.Embedding):  # type: ignore[override]
    """An embedding of GGUF's blocks: the rows of the asked ids are unpacked, to the dtype that the model computes in.

    It takes no gradient. `model.dequantize()` makes it a plain one.
    """

    def __init__(
        self, shape: tuple[int, int], kind: str, rows: Tensor, dtype: torch.dtype, padding: int | None
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx, self.max_norm, self.norm_type = padding, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.kind = kind
        self._buffers[PREFIX + kind] = rows
        # Follows `.to(dtype)` as a parameter would.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=rows.device), persistent=False)

    @property
    def packed_count(self) -> int:
        """Weights that are packed here."""
        return self.num_embeddings * self.embedding_dim

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (V, D) in `dtype`."""
        return unpacked(rows_of(self), self.kind, 0, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Embedding."""
        like = self._buffers["like"]
        assert like is not None
        chosen = rows_of(self)[input.reshape(-1)]
        return dequantize(chosen, self.kind, like.dtype).view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Returns the text that print(model) shows."""
        return f"{super().extra_repr()}, {self.kind}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        name = PREFIX + self.kind
        if prefix + name in state_dict and origin_of(self) is not None:
            self._buffers[name] = torch.empty_like(rows_of(self))  # its own memory, not the file's
        super()._load_from_state_dict(state_dict, prefix, *rest)


def unpacked(rows: Tensor, kind: str, heads: int, dtype: torch.dtype) -> Tensor:
    """The weight of packed rows, in the model's order; memory of its own."""
    found = dequantize(in_order(rows, heads), kind, dtype)
    return found.clone() if found.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr() else found
