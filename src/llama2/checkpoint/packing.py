"""How the weights beneath an adapter were packed when it was trained (QLoRA): a file of its folder besides peft's.

An adapter is measured on packed weights, and on others its answers are worse. Loading or merging it packs the
model in the same way.
"""

import json
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.checkpoint import Checkpoint, RawTensor, Stored, read_json
from llama2.checkpoint.hf import CODES
from llama2.checkpoint.wrapper import SeenCheckpoint
from llama2.files import saving, write_text
from llama2.quantization.formats import layer_class, parse
from llama2.quantization_config import QuantizationConfig

PACKING = "base_quantization.json"


def write_packing(folder: Path, content: Mapping[str, Any] | None) -> None:
    """Writes the quantization_config of the model that an adapter was trained on, or removes that of an earlier save.

    Models that are stored packed (GPTQ) are so wherever the adapter is loaded, and need no note.
    """
    if content is None or content.get("quant_method") != "bitsandbytes":
        with saving(folder) as save:
            save.remove([PACKING])
        return
    write_text(folder / PACKING, json.dumps(dict(content), indent=2, sort_keys=True) + "\n")


def read_packing(folder: Path) -> QuantizationConfig | None:
    """How the model beneath an adapter is to be packed; None for an adapter that was trained on plain weights."""
    return parse(read_json(folder / PACKING)) if (folder / PACKING).is_file() else None


def warn_of_packing(folder: Path, config: Any) -> None:
    """Warns where an adapter that was trained on packed weights is put on others."""
    if read_packing(folder) is not None and getattr(config, "quantization_config", None) is None:
        warnings.warn(
            f"{folder} was trained on packed weights (QLoRA) and is put on plain ones, where its answers are worse: "
            f"load the folder itself, or the model with quantization_config as in its {PACKING}",
            stacklevel=3,
        )


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
