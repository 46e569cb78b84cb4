"""Fewer key and value heads, for uptraining (Ainslie et al., GQA, 2023): each new head is the mean of its group."""

import copy
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from llama2.checkpoint import Checkpoint, RawTensor, Stored
from llama2.checkpoint.wrapper import SeenCheckpoint
from llama2.config import LlamaConfig
from llama2.errors import InputError

_POOLED = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")


class PooledCheckpoint(SeenCheckpoint):
    """Another checkpoint seen with `kv_heads` key and value heads. The mean is taken in float32 and rounded once."""

    def __init__(self, source: Checkpoint, kv_heads: int) -> None:
        heads = source.config.num_key_value_heads
        if kv_heads < 1 or heads % kv_heads:
            raise InputError(f"{heads} key and value heads cannot be pooled to {kv_heads}; give a divisor of {heads}")
        super().__init__(source)
        self.format = f"pooled {source.format}"
        self._heads, self._group = kv_heads, heads // kv_heads

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        width, found = self.config.head_dim, {}
        for name, (shape, kind) in self.source.tensors.items():
            pooled = name.endswith(_POOLED)
            found[name] = Stored((self._heads * width, *shape[1:]) if pooled else shape, kind)
        return found

    @cached_property
    def config(self) -> LlamaConfig:
        config = copy.deepcopy(self.source.config)
        config.num_key_value_heads = self._heads
        return config

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self.source.read(name)
        if name.endswith(_POOLED):
            groups = tensor.unflatten(0, (self._heads, self._group, self.config.head_dim))
            tensor = groups.float().mean(1).flatten(0, 1).to(tensor.dtype)
        return tensor if dtype is None else tensor.to(dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if not name.endswith(_POOLED):
            return self.source.read_rows(name, start, stop)
        width = self.config.head_dim
        first, last = start // width, -(-stop // width)
        rows = self.source.read_rows(name, first * self._group * width, last * self._group * width)
        groups = rows.unflatten(0, (last - first, self._group, width))
        return groups.float().mean(1).flatten(0, 1).to(rows.dtype)[start - first * width : stop - first * width]

    def raw(self, name: str) -> RawTensor:
        raise InputError(f"{name}: pooled heads have no packed form; read them")
