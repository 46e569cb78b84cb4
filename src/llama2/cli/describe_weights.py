"""What the tensors of packed linears count as, from the names and sizes in a header alone."""

from collections.abc import Container, Mapping
from typing import Any

from llama2.quantization_config import GPTQConfig


class Packing:
    """quantization_config of a checkpoint whose tensors have these names; None where nothing is packed."""

    def __init__(self, config: Mapping[str, Any] | None, names: Container[str]) -> None:
        self.config, self.names = config or {}, names
        self._share = {"gptq": self._gptq, "bitsandbytes": self._bitsandbytes}.get(self.config.get("quant_method", ""))

    def share(self, name: str, size: int) -> tuple[str, int] | None:
        """The type of a tensor of `size` bytes and the weights of the model that it stands for, 0 for the parts that
        only describe others; None for a tensor that is what it seems."""
        return None if self._share is None else self._share(name, size)

    def _gptq(self, name: str, size: int) -> tuple[str, int] | None:
        module, _, part = name.rpartition(".")
        if part not in ("qweight", "qzeros", "scales", "g_idx") or f"{module}.qweight" not in self.names:
            return None
        settings = GPTQConfig.from_dict(self.config).at(module)
        bits, group = settings.bits, settings.group_size
        kind = f"GPTQ {bits}-bit" + ("" if group == -1 else f" g{group}")
        return kind, size * 8 // bits if part == "qweight" else 0

    def _bitsandbytes(self, name: str, size: int) -> tuple[str, int] | None:
        module, _, part = name.rpartition(".")
        if f"{module}.SCB" in self.names and part in ("weight", "SCB", "weight_format"):
            return "INT8 rows", size if part == "weight" else 0
        owner, inside, _ = name.partition(".weight.")
        if f"{owner.removesuffix('.weight')}.weight.absmax" not in self.names or (not inside and part != "weight"):
            return None
        kind = str(self.config.get("bnb_4bit_quant_type", "4-bit")).upper()
        return kind, 0 if inside else 2 * size
