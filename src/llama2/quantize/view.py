"""The quantised model as a checkpoint: what the job has made so far, over everything else of the source."""

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llama2.checkpoint import Checkpoint, RawTensor, Stored
from llama2.checkpoint.hf import map_safetensors
from llama2.checkpoint.torch_tensors import CODES
from llama2.checkpoint.wrapper import SeenCheckpoint
from llama2.config import LlamaConfig
from llama2.quantization_config import QuantizationConfig


class QuantizedCheckpoint(SeenCheckpoint):
    """`source` with the tensors of the files `made` in place of the weights they replace.

    config: what config.json is to say. blocks: of GGUF, {tensor: block type}, and `made` holds packed rows.
    """

    def __init__(
        self,
        source: Checkpoint,
        made: list[Path],
        replaced: Mapping[str, list[str]],
        settings: QuantizationConfig | None,
        blocks: Mapping[str, str],
    ) -> None:
        super().__init__(source)
        self._made: dict[str, Tensor] = {}
        for file in made:
            self._made |= map_safetensors(file)
        self._replaced, self._settings, self._blocks = replaced, settings, blocks
        if blocks:
            self.format = "gguf"  # so that packed rows are copied as they are

    @cached_property
    def config(self) -> LlamaConfig:
        config = copy.deepcopy(self.source.config)
        if self._settings is not None:
            config.quantization_config = self._settings.to_dict()
        return config

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        found: dict[str, Stored] = {}
        for name, stored in self.source.tensors.items():
            if name in self._blocks:
                found[name] = Stored(stored.shape, self._blocks[name])
                continue
            for part in self._replaced.get(name, ()):
                tensor = self._made[part]
                found[part] = Stored(tuple(tensor.shape), CODES[tensor.dtype])
            if name not in self._replaced:
                found[name] = stored
        return found

    def made(self, name: str) -> bool:
        """Whether the job has made this tensor."""
        return name in self._made

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        held = self._made.get(name)
        if held is None or name in self._blocks:
            return self.source.read(name, dtype)
        return held if dtype is None else held.to(dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        held = self._made.get(name)
        return self.source.read_rows(name, start, stop) if held is None else held[start:stop]

    def mapped(self, name: str) -> list[Tensor]:
        held = self._made.get(name)
        return self.source.mapped(name) if held is None else [held]

    def raw(self, name: str) -> RawTensor:
        if name in self._blocks:
            return RawTensor(self._made[name], self._blocks[name], self.source.tensors[name].shape)
        return self.source.raw(name)
