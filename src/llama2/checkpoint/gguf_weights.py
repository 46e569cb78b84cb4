"""The tensors of a GGUF file, or of all parts of a split one, under Hugging Face names, packed or dequantised."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llama2.architecture import parameter_shapes
from llama2.checkpoint import Checkpoint, RawTensor, Stored
from llama2.checkpoint.gguf import GgufFile, TensorInfo
from llama2.checkpoint.names import gguf_to_hf, rotated_heads, to_half_split
from llama2.config import LlamaConfig
from llama2.coverage import is_table
from llama2.errors import CheckpointError
from llama2.quantization.ggml import BlockType, block_type, dequantize

# Keys general.* that say how a file is written, not whose model it is.
_OF_THE_FILE = ("general.alignment", "general.file_type", "general.quantization_version")


class GgufCheckpoint(Checkpoint):
    """A GGUF file. Every tensor's extent is checked against the file when it is opened."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        self.path = self.file.path
        self.config  # noqa: B018 - a foreign architecture is refused before its tensor names are looked at
        self._infos: dict[str, tuple[TensorInfo, BlockType]] = {}
        for info in self.file.tensors.values():
            if is_table(info.name):  # rope_freqs.weight becomes rope settings in the configuration
                continue
            name, block = gguf_to_hf(info.name), block_type(info.type_id)
            if name is None:
                raise CheckpointError(
                    f"{path}: the tensor {info.name!r} {info.shape} belongs to no Llama model; "
                    "load the file with a library for its architecture"
                )
            self._infos[name] = info, block
        self.file.check_extents()
        # llama.cpp reads each bias of a Llama for itself; one that is left out is 0.
        parameters = parameter_shapes(self.config)
        self._zeros = {name: parameters[name] for name in parameters if name.endswith(".bias")} if self._infos else {}
        self._zeros = {name: shape for name, shape in self._zeros.items() if name not in self._infos}

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        found = {name: Stored(info.shape, block.name) for name, (info, block) in self._infos.items()}
        return {**found, **{name: Stored(shape, "F32") for name, shape in self._zeros.items()}}

    @cached_property
    def config(self) -> LlamaConfig:
        return self.file.config

    @property
    def generation_settings(self) -> dict[str, Any] | None:
        return None

    @property
    def card(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in self.file.metadata.items()
            if key.startswith("general.") and key not in _OF_THE_FILE
        }

    @property
    def tokenizer_source(self) -> dict[str, Any]:
        return self.file.metadata

    @cached_property
    def auto_dtype(self) -> str:
        kinds = {block.name: block for info, block in self._infos.values() if len(info.shape) > 1}
        dense = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        if len(kinds) == 1 and (only := next(iter(kinds))) in dense:
            return dense[only]
        return "float32" if "F32" in kinds and all(kind in dense for kind in kinds) else "bfloat16"

    @cached_property
    def block_types(self) -> list[str]:
        """The types of its quantised matrices, sorted; none where all are floats."""
        return sorted({block.name for info, block in self._infos.values() if len(info.shape) > 1 and not block.dense})

    def stored_name(self, name: str) -> str:
        """GGUF's name of a tensor of the file."""
        return self._infos[name][0].name

    def file_rows(self, name: str) -> torch.Tensor:
        """Rows (rows, row_bytes) of a tensor as the file holds them, in its map: q and k in the file's order."""
        return self._stored(*self._infos[name])

    def mapped(self, name: str) -> list[torch.Tensor]:
        return [] if name in self._zeros else [self._stored(*self._infos[name])]

    def _stored(self, info: TensorInfo, block: BlockType) -> torch.Tensor:
        """Rows (rows, row_bytes) as the file holds them."""
        row_bytes = block.row_bytes(info.shape[-1])
        count, (data, start) = math.prod(info.shape[:-1]) * row_bytes, self.file.place(info.name)
        if count == 0:
            raise CheckpointError(f"{self.path}: tensor {info.name!r} is empty {info.shape}; the file is malformed")
        return torch.frombuffer(data, dtype=torch.uint8, count=count, offset=start).view(-1, row_bytes)

    def raw(self, name: str) -> RawTensor:
        if (shape := self._zeros.get(name)) is not None:
            return RawTensor(torch.zeros((1, 4 * shape[0]), dtype=torch.uint8), "F32", shape)
        info, block = self._infos[name]
        rows = self._stored(info, block)
        heads = rotated_heads(name, self.config.num_attention_heads, self.config.num_key_value_heads)
        if heads is not None:
            rows = self._half_split(rows, info, heads)
        return RawTensor(rows, block.name, info.shape)

    def _half_split(self, rows: torch.Tensor, info: TensorInfo, heads: int) -> torch.Tensor:
        items = rows.view(info.shape[0], -1)  # a bias is one row of F32; its values move, not its bytes
        if info.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{self.path}: tensor {info.name!r} has {info.shape[0]} rows, which {heads} heads do not divide; "
                "the head counts of the file do not fit its tensors"
            )
        return to_half_split(items, heads).reshape(rows.shape)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        raw = self.raw(name)
        block = block_type(raw.type)
        return dequantize(raw.rows, block, dtype or block.dense or torch.float32).view(raw.shape)
