"""A checkpoint seen through something that changes some of its tensors; everything else is the source's."""

from functools import cached_property
from pathlib import Path
from typing import Any

from llama2.checkpoint import Checkpoint
from llama2.config import LlamaConfig


class SeenCheckpoint(Checkpoint):
    """Base class of views of a checkpoint; `source` is the wrapped one."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.format, self.path, self.library = source, source.format, source.path, source.library

    @cached_property
    def config(self) -> LlamaConfig:
        return self.source.config

    @property
    def generation_settings(self) -> dict[str, Any] | None:
        return self.source.generation_settings

    @property
    def tokenizer_source(self) -> Path | dict[str, Any]:
        return self.source.tokenizer_source

    @property
    def auto_dtype(self) -> str:
        return self.source.auto_dtype

    @property
    def card(self) -> dict[str, Any]:
        return self.source.card

    def kept_type(self, name: str) -> str:
        """The source's answer, unless this view changes the tensor's type."""
        kind, there = self.tensors[name].type, self.source.tensors.get(name)
        return kind if there is None or there.type != kind else self.source.kept_type(name)

    def packed_type(self, name: str) -> str:
        """The source's answer; "" for a tensor that only this view has."""
        return self.source.packed_type(name) if name in self.source.tensors else ""

    def mapped(self, name: str) -> list[Any]:
        return self.source.mapped(name)
