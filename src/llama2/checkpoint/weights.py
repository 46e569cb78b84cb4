"""Named tensors that a model is filled from: those of a checkpoint, given ones, a part of others, renamed ones."""

import re
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from llama2.checkpoint import Stored
from llama2.checkpoint.torch_tensors import CODES


class Weights(Protocol):
    """The part of a checkpoint that filling a model uses."""

    @property
    def tensors(self) -> Mapping[str, Stored]: ...

    @property
    def auto_dtype(self) -> str: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor: ...


class GivenWeights:
    """A state dict in memory as Weights."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self.state_dict = state_dict
        self.tensors = {
            name: Stored(tuple(t.shape), CODES.get(t.dtype, str(t.dtype))) for name, t in state_dict.items()
        }

    @property
    def auto_dtype(self) -> str:
        dtypes = (t.dtype for t in self.state_dict.values() if t.is_floating_point())
        return str(next(dtypes, torch.get_default_dtype())).removeprefix("torch.")

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.state_dict[name].detach().to(dtype or self.state_dict[name].dtype)


class Rest:
    """Weights without those that are used already, and with those that were made of them."""

    def __init__(self, weights: Weights, used: set[str], given: Mapping[str, Tensor]) -> None:
        self._weights, self._given = weights, given
        self.tensors = {name: stored for name, stored in weights.tensors.items() if name not in used}
        self.tensors |= {name: Stored(tuple(t.shape), CODES[t.dtype]) for name, t in given.items()}

    @property
    def auto_dtype(self) -> str:
        return self._weights.auto_dtype

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if (made := self._given.get(name)) is not None:
            return made if dtype is None else made.to(dtype)
        return self._weights.read(name, dtype)


class Renamed:
    """Weights whose names have the first pattern of `mapping` that matches replaced."""

    def __init__(self, weights: Weights, mapping: Mapping[str, str]) -> None:
        self._weights = weights
        self._names = {self._renamed(name, mapping): name for name in weights.tensors}
        self.tensors = {new: weights.tensors[name] for new, name in self._names.items()}

    @staticmethod
    def _renamed(name: str, mapping: Mapping[str, str]) -> str:
        for pattern, replacement in mapping.items():
            new, count = re.subn(pattern, replacement, name)
            if count:
                return new
        return name

    @property
    def auto_dtype(self) -> str:
        return self._weights.auto_dtype

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._weights.read(self._names[name], dtype)
