"""A checkpoint as it is after packing, for an adapter that was trained on packed weights (`packing_note`)."""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from llama2.checkpoint import Checkpoint, RawTensor, Stored
from llama2.checkpoint.torch_tensors import CODES
from llama2.checkpoint.wrapper import SeenCheckpoint
from llama2.quantization.formats import layer_class
from llama2.quantization_config import QuantizationConfig


class RepackedCheckpoint(SeenCheckpoint):
    """A checkpoint seen as it is after its linears are packed and unpacked again, for an adapter to be merged into."""

    def __init__(self, source: Checkpoint, settings: QuantizationConfig) -> None:
        super().__init__(source)
        self._settings = settings
        self._kind = layer_class(settings)

    def _packs(self, name: str) -> bool:
        path = name.removesuffix(".weight")
        linear = name.endswith("_proj.weight") or path in ("lm_head", "score")
        return linear and not self._settings.skips(path)

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        return {
            name: Stored(stored.shape, stored.type if stored.type in CODES.values() else "F32")
            if self._packs(name)
            else stored
            for name, stored in self.source.tensors.items()
        }

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if not self._packs(name):
            return self.source.read(name, dtype)
        weight = self.source.read(name)
        if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            weight = weight.float()
        layer = self._kind.quantize(weight, None, self._settings)
        return layer.dequantize(weight.dtype if dtype is None else dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop] if self._packs(name) else self.source.read_rows(name, start, stop)

    def mapped(self, name: str) -> list[Tensor]:
        return self.source.mapped(name)

    def raw(self, name: str) -> RawTensor:
        if not self._packs(name):
            return self.source.raw(name)
        shape, kind = self.tensors[name]
        return RawTensor(self.read(name).contiguous().view(torch.uint8), kind, shape)
