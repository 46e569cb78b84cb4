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

from llama2.errors import CheckpointError, InputError
from llama2.lazy import door
from llama2.quantization.linear import Fused, PackedLinear
from llama2.quantization.packable import Int8Weight, PackableWeight

LEVELS = 127
_bytes = door("quantization.fused", "Bytes", "The kernels of int8 rows; imports triton.")


class Linear8bit(PackedLinear):
    """A linear layer of int8 rows."""

    @classmethod
    def from_file(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: nn.Parameter | None, config: Any
    ) -> Self:
        """As PackedLinear.from_file: "weight", "SCB" and, where the file has it, "weight_format"."""
        scales = tensors.get("SCB")
        if scales is not None and scales.dtype == torch.float16:  # of releases before 2023
            tensors = {**tensors, "SCB": scales.float()}
        wanted = {"weight": (torch.int8, shape), "SCB": (torch.float32, shape[:1])}
        for name, (dtype, size) in wanted.items():
            found = tensors.get(name)
            if found is None or found.dtype != dtype or tuple(found.shape) != size:
                there = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise CheckpointError(f"{name} is {there}; {dtype} {size} is needed: quantise the model again")
        if stray := sorted(set(tensors) - {*wanted, "weight_format"}):
            raise CheckpointError(f"{stray[0]} is no part of int8 rows ({', '.join(wanted)}); quantise the model again")
        order = tensors.get("weight_format")
        if order is not None and order.numel() != 1:
            raise CheckpointError(f"weight_format has {order.numel()} values; one is needed: save the model again")
        if order is not None and int(order) != 0:
            raise CheckpointError(f"weight_format is {int(order)}; only 0, rows, is supported: save the model again")
        if not bool((tensors["SCB"].isfinite() & (tensors["SCB"] >= 0)).all()):
            raise CheckpointError("SCB holds NaN, inf or values below 0; the file is damaged: fetch it again")
        kept = {name: tensors[name] for name in wanted}
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
        held = self.packed
        return Int8Weight(held["weight"].numpy(), (held["SCB"] / LEVELS).numpy())

    def fused(self) -> Fused:
        """As PackedLinear.fused."""
        made: Fused = _bytes((self.out_features, self.in_features), self.packed["weight"], self.packed["SCB"])
        return made
