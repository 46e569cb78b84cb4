"""LLM.int8() (Dettmers et al., arXiv 2208.07339): a weight of 8 bits, with one scale for each row.

w = weight * SCB / 127, as bitsandbytes' files hold it: "weight" int8 (out, in), "SCB" float32 (out,), and a number for
the order of the weight, 0 for rows.

bitsandbytes also rounds the activations to 8 bits, row by row, and so has to take columns of x with a magnitude of
llm_int8_threshold (6.0) or more out of that product and multiply them in floating point. Here x is never rounded: W is
unpacked and the product is that of x, outliers and all, so the threshold has nothing to decide. The native engine's
fast mode rounds x in spans of 32 columns, which keeps an outlier from its neighbours in other spans (docs/native.md).
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from llama2.errors import InputError
from llama2.lazy import door
from llama2.quantization.int8_file import LEVELS, checked, packed
from llama2.quantization.linear import Fused, PackedLinear, arrays_of
from llama2.quantization.packable import PackableWeight

_bytes = door("quantization.fused", "Bytes", "The kernels of int8 rows; imports triton.")


class Linear8bit(PackedLinear):
    """A linear layer of int8 rows."""

    @classmethod
    def from_file(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: nn.Parameter | None, config: Any
    ) -> Self:
        """As PackedLinear.from_file: "weight", "SCB" and, where the file has it, "weight_format"."""
        held = checked(arrays_of(tensors), shape)
        scales = tensors["SCB"] if tensors["SCB"].dtype == torch.float32 else torch.from_numpy(held["SCB"])
        kept = {"weight": tensors["weight"], "SCB": scales}
        return cls(shape, {**kept, "weight_format": torch.zeros((), dtype=torch.uint8)}, bias)

    @classmethod
    def quantize(cls, weight: Tensor, bias: nn.Parameter | None, config: Any) -> Self:
        """As PackedLinear.quantize: each row by its largest magnitude, to the nearest of 255 values.

        The weight goes through float16, as in bitsandbytes, so that the bytes are the same. Raises InputError for one
        that is not finite there.
        """
        rows = weight.detach().to(torch.float16).float()
        peaks = rows.abs().amax(1)
        if not bool(peaks.isfinite().all()):
            raise InputError(
                "the weight holds NaN, inf or magnitudes above 65504 and cannot be quantised to int8; "
                "check the checkpoint it comes from"
            )
        scale = torch.where(peaks > 0, LEVELS / peaks, 0.0)
        codes = (rows * scale[:, None]).round().to(torch.int8)
        order = torch.zeros((), dtype=torch.uint8, device=codes.device)
        return cls(tuple(weight.shape), {"weight": codes, "SCB": peaks, "weight_format": order}, bias)  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As PackedLinear.dequantize, rounded as in bitsandbytes: times SCB, then times the float32 next to 1/127."""
        held = self.packed
        return (held["weight"] * held["SCB"][:, None]).mul_(1 / LEVELS).to(dtype)

    def packable(self) -> PackableWeight:
        """As PackedLinear.packable."""
        return packed(arrays_of(self.packed))

    def fused(self) -> Fused:
        """As PackedLinear.fused."""
        made: Fused = _bytes((self.out_features, self.in_features), self.packed["weight"], self.packed["SCB"])
        return made
