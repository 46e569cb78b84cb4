"""NF4 and FP4 (Dettmers et al., QLoRA, arXiv 2305.14314) in the files and to the bits of bitsandbytes 0.50.

The weight is taken row by row as one run of values, in blocks of 64 that may end inside a row:
w = table[code] * absmax of its block, in float32. A file holds, after the path of the linear,

    weight                       uint8 (values / 2, 1): two codes a byte, the first in the high nibble; or the same
                                 bytes seen as bnb_4bit_quant_storage (bfloat16, float16, float32)
    weight.absmax                float32 (blocks,); with double quantisation uint8 (blocks,)
    weight.quant_map             float32 (16,), the table
    weight.nested_absmax         float32 (blocks / 256,)     with double quantisation:
    weight.nested_quant_map      float32 (256,)              absmax = map[code] * nested_absmax of 256 + nested_offset
    weight.quant_state.bitsandbytes__nf4 (or __fp4)          uint8, JSON: quant_type, blocksize, dtype, shape, nested_*
"""

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from llama2.compiled import kernels, pool
from llama2.errors import InputError
from llama2.lazy import door
from llama2.quantization.linear import Fused, PackedLinear, arrays_of
from llama2.quantization.nf4_file import STATE, STORAGES, TABLES, State, checked, packed
from llama2.quantization.packable import PackableWeight
from llama2.quantization_config import BitsAndBytesConfig

BLOCK, NESTED = 64, 256
_STORAGES = {name: getattr(torch, name) for name in STORAGES}
_NEAREST = 65536  # steps of [-1, 1] in which bitsandbytes looks for the nearest of the 256 values
_CHUNK = 1 << 20  # values at once: what is between codes and weights stays in the cache of a core
_blocks = door("quantization.fused", "Blocks", "The kernels of two codes a byte; imports triton.")


def _table(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(TABLES[kind], device=device)


class Linear4bit(PackedLinear):
    """A linear layer of NF4 or FP4 blocks.

    The product is computed in `compute_dtype` (bnb_4bit_compute_dtype, transformers' default float32) and returned in
    the dtype of x, as by bitsandbytes; float64 is never lowered. The native engine computes in its own way.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: nn.Parameter | None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(shape, tensors, bias)
        self.compute_dtype = compute_dtype
        self.state = State.read(tensors, shape)

    @classmethod
    def from_file(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: nn.Parameter | None, config: Any
    ) -> Self:
        """As PackedLinear.from_file: the tensors that the module's docstring lists."""
        _, names = checked(arrays_of(tensors), shape)
        return cls(shape, {name: tensors[name] for name in names}, bias, _compute_dtype(config))

    @classmethod
    def quantize(cls, weight: Tensor, bias: nn.Parameter | None, config: Any) -> Self:
        """As PackedLinear.quantize: every byte that bitsandbytes writes on a CPU (with torch on as many threads: the
        mean of more than 2 million weights' scales depends on them). config: a BitsAndBytesConfig, None for NF4.

        Raises InputError for a weight that is no float16, bfloat16 or float32, or not finite.
        """
        settings = config or BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        code_type, storage = settings.bnb_4bit_quant_type, _STORAGES.get(settings.bnb_4bit_quant_storage)
        if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise InputError(f"the weight is {weight.dtype}; 4-bit blocks are made of float16, bfloat16 or float32")
        codes, absmax = to_codes(weight.detach(), code_type)
        if storage is None or codes.numel() % storage.itemsize:
            raise InputError(
                f"bnb_4bit_quant_storage is {settings.bnb_4bit_quant_storage!r}; {codes.numel()} bytes go into one of "
                f"{', '.join(name for name, t in _STORAGES.items() if codes.numel() % t.itemsize == 0)}"
            )
        return cls(
            (weight.shape[0], weight.shape[1]),
            _tensors(codes.view(storage)[:, None], absmax, code_type, weight, settings.bnb_4bit_use_double_quant),
            bias,
            _compute_dtype(settings),
        )

    @property
    def absmax(self) -> Tensor:
        """The scale of every block, float32 (blocks,), double quantisation undone. It may then fall below 0."""
        tensors = self.packed
        if not self.state.nested:
            return tensors["weight.absmax"]
        scales = tensors["weight.nested_quant_map"][tensors["weight.absmax"].int()]
        return scaled(scales, tensors["weight.nested_absmax"], self.state.nested) + self.state.offset

    @property
    def codes(self) -> Tensor:
        """Two codes a byte, uint8 (values / 2,), a view."""
        return self.packed["weight"].view(torch.uint8).reshape(-1)

    @property
    def table(self) -> Tensor:
        """The 16 values of the codes, float32."""
        return _table(self.state.kind, self.codes.device)

    def dequantize(self, dtype: torch.dtype = torch.float32, into: Tensor | None = None) -> Tensor:
        """As PackedLinear.dequantize; what bitsandbytes makes of it, but that numbers below bfloat16's smallest normal
        one (1e-38) are kept, which its AVX-512 build makes 0. into: see `from_codes`."""
        shape = (self.out_features, self.in_features)
        return from_codes(self.codes, self.absmax, self.state.kind, self.state.block, shape, dtype, into)

    def packable(self) -> PackableWeight:
        """As PackedLinear.packable."""
        return packed(arrays_of(self.packed), (self.out_features, self.in_features), self.state)

    def fused(self) -> Fused:
        """As PackedLinear.fused."""
        tensors, shape, state = self.packed, (self.out_features, self.in_features), self.state
        tables = (tensors.get("weight.nested_quant_map"), tensors.get("weight.nested_absmax"))
        scales = (tensors["weight.absmax"], *tables, state.nested, state.offset)
        fused_weights: Fused = _blocks(shape, state.kind, state.block, self.codes, *scales)
        return fused_weights

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear, computed in compute_dtype."""
        dtype = x.dtype if x.dtype == torch.float64 else self.compute_dtype
        return super().forward(x.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        """Returns the text that print(model) shows."""
        double = ", double quantisation" if self.state.nested else ""
        return f"{super().extra_repr()}, {self.state.kind}, block={self.state.block}{double}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = STATE + self.state.kind
        if prefix + key in state_dict:  # its length is that of the numbers in it
            self._buffers[key] = torch.empty_like(state_dict[prefix + key], device=self.codes.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.state = State.read(self.packed, (self.out_features, self.in_features))


def _compute_dtype(config: Any) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, getattr(config, "bnb_4bit_compute_dtype", "float32"))
    return dtype


def _tensors(weight: Tensor, absmax: Tensor, kind: str, source: Tensor, double: bool) -> dict[str, Tensor]:
    """The tensors of a file, in bitsandbytes' order. Tables are this layer's own: shared ones are saved only once."""
    said: dict[str, Any] = {"quant_type": kind, "blocksize": BLOCK, "dtype": str(source.dtype).removeprefix("torch.")}
    said["shape"] = list(source.shape)
    tensors = {"weight": weight, "weight.absmax": absmax}
    tensors["weight.quant_map"] = _table(kind, absmax.device)
    if double:
        offset = absmax.mean()
        tensors["weight.absmax"], tensors["weight.nested_absmax"] = to_bytes(absmax - offset)
        tensors["weight.nested_quant_map"] = torch.tensor(dynamic_map(), device=absmax.device)
        said |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset.item()}
    text = json.dumps(said).encode()
    return {**tensors, STATE + kind: torch.tensor(list(text), dtype=torch.uint8, device=absmax.device)}


# -- values and codes --------------------------------------------------------------------------------------------


def scaled(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """values (n,), in place, times the scale of their block; the last block may be short."""
    whole = values.numel() // block
    values[: whole * block].view(-1, block).mul_(scales[:whole, None])
    values[whole * block :].mul_(scales[-1])
    return values


def from_codes(
    codes: Tensor,
    absmax: Tensor,
    kind: str,
    block: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    into: Tensor | None = None,
) -> Tensor:
    """The values (shape) of two codes a byte (n / 2,), products in float32, then rounded to `dtype`.

    into: memory of that shape and dtype, which the compiled module fills; without it there, it is not used.
    """
    table = _table(kind, codes.device)
    if codes.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and block % 32 == 0 and kernels():
        filled = torch.empty(shape, dtype=dtype) if into is None else into
        kernels().unpack4(pool(), codes.contiguous(), absmax.contiguous(), table, block, filled)
        return filled
    # Two values as one element of 8 bytes: looking those up is twice as fast as looking up rows of two.
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1).view(torch.float64)[:, 0]
    count = math.prod(shape)
    out = torch.empty(count, dtype=dtype, device=codes.device)
    step = _CHUNK if codes.device.type == "cpu" else 2 * codes.numel()
    for start in range(0, count, step):
        values = pairs.index_select(0, codes[start // 2 : (start + step) // 2].int()).view(torch.float32)
        values = values[: count - start]
        out[start : start + step] = scaled(values, absmax[start // block :], block)
    return out.view(shape)


def to_codes(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(codes, two a byte, uint8 (n / 2,); absmax float32 (n / 64,)) nearest to a weight.

    Ties go to the smaller value. Zero is code 0 of FP4, and what is above it by less than half a step code 8.
    Raises InputError where the weight is not finite.
    """
    table = _table(kind, weight.device)
    order = torch.argsort(table, stable=True)
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    flat = weight.reshape(-1)
    codes, scales = [], []
    for start in range(0, flat.numel(), _CHUNK):
        values = flat[start : start + _CHUNK].float()
        absmax, shares = _shares(values)
        indices = torch.bucketize(shares, bounds, out_int32=True)
        codes.append((indices if kind == "nf4" else order[indices]).to(torch.uint8))
        scales.append(absmax)
    absmax, every = torch.cat(scales), torch.cat(codes)
    if not bool(absmax.isfinite().all()):
        raise InputError("the weight holds NaN or inf and cannot be quantised; check the checkpoint it comes from")
    if every.numel() % 2:
        zero = torch.tensor([TABLES[kind].index(0.0)], dtype=torch.uint8, device=every.device)
        every = torch.cat((every, zero))
    return every[::2] << 4 | every[1::2], absmax


def _shares(values: Tensor) -> tuple[Tensor, Tensor]:
    """(absmax of each block, every value over its block's). A last short block is divided, whole ones multiplied."""
    whole = values.numel() // BLOCK * BLOCK
    blocks = values[:whole].view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    shares = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).view(-1)
    if whole == values.numel():
        return absmax, shares
    last = values[whole:].abs().amax().clamp(min=1e-38)
    return torch.cat((absmax, last[None])), torch.cat((shares, (values[whole:] / last).clamp(-1, 1)))


# -- scales of scales --------------------------------------------------------------------------------------------


@cache
def dynamic_map() -> tuple[float, ...]:
    """The 256 values of bitsandbytes' dynamic tree (Dettmers, arXiv 1511.04561), ascending.

    For each power of ten from -6 to 0, both signs, the middles of 1, 2, 4, .. 64 equal parts of [0.1, 1]; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (10 ** (i - 6)) * ((ends[:-1] + ends[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return tuple(sorted(values))


@cache
def _nearest() -> Tensor:
    """For each of 65536 equal steps of [-1, 1] the code of the value of `dynamic_map` nearest to it, uint8."""
    steps = torch.arange(_NEAREST, dtype=torch.float64) / (_NEAREST - 1) * 2 - 1
    values = torch.tensor(dynamic_map(), dtype=torch.float64)
    return torch.bucketize(steps, (values[1:] + values[:-1]) / 2).to(torch.uint8)


def to_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 (n,), largest magnitude of every 256 float32) of float32 values (n,), as bitsandbytes on a CPU: not
    the nearest value, but that of the nearest of 65536 steps. A block of zeros takes code 0."""
    blocks = -(-values.numel() // NESTED)
    padded = nn.functional.pad(values, (0, blocks * NESTED - values.numel())).view(blocks, NESTED)
    absmax = padded.abs().amax(1)
    steps = ((padded * (1 / absmax)[:, None]).clamp(-1, 1) + 1) * 0.5 * (_NEAREST - 1) + 0.5
    steps = torch.where(absmax[:, None] > 0, steps, 0.0)
    return _nearest().to(values.device)[steps.int()].view(-1)[: values.numel()].contiguous(), absmax
