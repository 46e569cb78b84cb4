"""W + scale * B A: an adapter merged into the weights permanently. The sum is taken in float32 and rounded once.

With DoRA the rows of the sum get the lengths that the adapter learnt. Parameters that the adapter brings whole take the
place of the model's.
"""

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama2 import lora
from llama2.architecture import EMBEDDING, HEAD
from llama2.checkpoint import Checkpoint, RawTensor, Stored
from llama2.checkpoint.covered import covered
from llama2.checkpoint.packing import RepackedCheckpoint
from llama2.checkpoint.packing_note import read_packing
from llama2.checkpoint.peft import attach
from llama2.checkpoint.peft_adapter import Adapter, read_adapter
from llama2.checkpoint.peft_files import adapted_base
from llama2.checkpoint.quantized import unpacked
from llama2.checkpoint.source import Located, local_path, locate_all, open_source
from llama2.checkpoint.torch_tensors import CODES
from llama2.checkpoint.wrapper import SeenCheckpoint
from llama2.config import LlamaConfig


def merge_into(model: nn.Module, adapter: Adapter) -> None:
    """Adds an adapter to the weights of a LlamaForCausalLM in place. Raises InputError where they are packed."""
    name = "merged"
    attach(model, adapter, name)
    lora.merge(model)


def open_merged(source: str | Path | Located) -> Checkpoint:
    """A path or hub id as `covered` shows it, packed linears unpacked; an adapter's as its model with the adapter
    merged."""
    located = locate_all(source)
    adapter = adapted_base(located.path)
    if adapter is None:
        return covered(unpacked(open_source(located, {})))
    base = locate_all(adapter.base, adapter.revision) if local_path(adapter.base) is None else locate_all(adapter.base)
    return with_adapter(covered(unpacked(open_source(base, {}))), located.path)


def with_adapter(source: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the adapter of a folder merged, into weights that are packed as they were in its training."""
    stored, adapter = source, read_adapter(folder, source.config)
    while isinstance(stored, SeenCheckpoint):
        stored = stored.source
    packing = None if hasattr(stored.config, "quantization_config") else read_packing(folder)
    return MergedCheckpoint(source if packing is None else RepackedCheckpoint(source, packing), adapter)


class MergedCheckpoint(SeenCheckpoint):
    """A checkpoint seen with an adapter merged into it, row by row as it is read."""

    def __init__(self, source: Checkpoint, adapter: Adapter) -> None:
        super().__init__(source)
        self.adapter = adapter
        tied = source.config.tie_word_embeddings and not adapter.untied
        self._changed = adapter.parameters - ({HEAD} if tied else set())

    @cached_property
    def config(self) -> LlamaConfig:
        config = copy.deepcopy(self.source.config)
        config.vocab_size = self.adapter.vocab_size
        config.tie_word_embeddings = config.tie_word_embeddings and not self.adapter.untied
        return config

    @property
    def tokenizer_source(self) -> Path | dict[str, Any]:
        """The adapter's own where its folder has one: it may have tokens that the base lacks."""
        own = self.adapter.path
        files = ("tokenizer.json", "tokenizer.model")
        return own if any((own / name).exists() for name in files) else self.source.tokenizer_source

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        merged = dict(self.source.tensors)
        if self.adapter.untied:
            merged[HEAD] = merged[EMBEDDING]
        for name in self._changed:  # the sum of quantised weights and an adapter is not quantised
            shape, type_name = merged[name]
            whole = self.adapter.full.get(name)
            shape = shape if whole is None else tuple(whole.shape)
            merged[name] = Stored(shape, type_name if type_name in CODES.values() else "F32")
        return merged

    def kept_type(self, name: str) -> str:
        """Of sums with quantised weights what the rest of the model is read in: float32 would double it."""
        stored = self.source.tensors.get(name)
        if name in self._changed and stored is not None and stored.type not in CODES.values():
            return CODES[getattr(torch, self.source.auto_dtype)]
        return super().kept_type(name)

    def packed_type(self, name: str) -> str:
        """The sum with an adapter was never quantised."""
        return "" if name in self._changed else super().packed_type(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._changed and name in self.source.tensors:
            return self.source.read(name, dtype)
        shape = self.tensors[name].shape
        tensor = self.read_rows(name, 0, shape[0])
        return tensor if dtype is None else tensor.to(dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._changed and name in self.source.tensors:
            return self.source.read_rows(name, start, stop)
        if (whole := self.adapter.full.get(name)) is not None:
            rows = whole[start:stop].to(_dtype(self.tensors[name].type))
        else:
            stored = name if name in self.source.tensors else EMBEDDING
            rows = self.source.read_rows(stored, start, stop)
        return self.adapter.changed(name, rows, start)

    def mapped(self, name: str) -> list[Tensor]:
        return self.source.mapped(name) if name in self.source.tensors else []

    def raw(self, name: str) -> RawTensor:
        if name not in self._changed and name in self.source.tensors:
            return self.source.raw(name)
        shape, type_name = self.tensors[name]
        return RawTensor(self.read(name).contiguous().view(torch.uint8), type_name, shape)


def _dtype(code: str) -> torch.dtype:
    return next(dtype for dtype, name in CODES.items() if name == code)
