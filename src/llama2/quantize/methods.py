"""Result of a method for one linear: the tensors of the file, and the weight that they mean."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.quantization.awq import pack_nibbles
from llama2.quantization.codebook_grids import solved
from llama2.quantization.formats import layer_class
from llama2.quantization.ggml import BlockType, dequantize
from llama2.quantization.ggml_grid import gguf_rows
from llama2.quantization.gptq import GptqLinear, grid_of, pack
from llama2.quantization.gptq_solver import solve
from llama2.quantization.int8 import Linear8bit
from llama2.quantization.integer_grid import Steps
from llama2.quantization.nf4 import Linear4bit
from llama2.quantization.settings import AwqConfig, CompressedTensorsConfig
from llama2.quantization_config import GPTQConfig, QuantizationConfig
from llama2.quantize.options import SOLVED, QuantizationSettings


class Made(NamedTuple):
    """tensors: by what follows the path of the linear in the file, or packed rows alone for GGUF. weight: what they
    mean, float32 (out, in). damp: what the solver needed, 0 without it. kind: a name for the report."""

    tensors: dict[str, Tensor]
    weight: Tensor
    kind: str
    damp: float = 0.0


class Method(ABC):
    """One of the formats with its settings."""

    @abstractmethod
    def make(self, path: str, weight: Tensor, hessian: Tensor | None) -> Made:
        """Quantises the weight (out, in) of the linear at `path`; `hessian` (in, in): what is known of its inputs."""

    def make_group(self, paths: Sequence[str], weights: Sequence[Tensor], hessian: Tensor | None) -> list[Made]:
        """As `make`, of linears that share their input."""
        return [self.make(path, weight, hessian) for path, weight in zip(paths, weights, strict=True)]


class BlockMethod(Method):
    """The packed formats of bitsandbytes: NF4, FP4, int8 rows. With a Hessian the solver chooses the codes."""

    def __init__(self, config: QuantizationConfig, options: QuantizationSettings) -> None:
        self.config, self.options = config, options
        self._layer = layer_class(config)

    def make(self, path: str, weight: Tensor, hessian: Tensor | None) -> Made:
        """As Method.make."""
        kind, damp = self.options.method, 0.0
        layer = self._layer.quantize(weight, None, self.config)
        if hessian is not None:
            assert isinstance(layer, Linear4bit | Linear8bit)
            layer, found = solved(layer, weight, hessian, self.options.damp)
            damp = found.damp
        return Made(layer.packed, layer.dequantize(), kind, damp)


class Float8Method(Method):
    """compressed-tensors' floats of 8 bits: each row by its largest magnitude, which becomes 448."""

    def make(self, path: str, weight: Tensor, hessian: Tensor | None) -> Made:
        """As Method.make."""
        rows = weight.float()
        peaks = rows.abs().amax(1, keepdim=True)
        if not bool(peaks.isfinite().all()):
            raise InputError(f"{path} holds NaN or infinity and cannot be quantised; check the checkpoint")
        scale = torch.where(peaks > 0, peaks / 448, 1.0)
        values = (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return Made({"weight": values, "weight_scale": scale}, values.float() * scale, "fp8")


def _awq_tensors(layer: GptqLinear) -> dict[str, Tensor]:
    """AWQ's gemm layout of the same integers."""
    codes_KN, zeros_GN = layer.codes()
    return {"qweight": pack_nibbles(codes_KN), "qzeros": pack_nibbles(zeros_GN), "scales": layer.packed["scales"]}


def _compressed_tensors(layer: GptqLinear) -> dict[str, Tensor]:
    """compressed-tensors' pack-quantized layout of the same symmetric integers."""
    codes_KN, _ = layer.codes()
    shape = torch.tensor([layer.out_features, layer.in_features])
    return {
        "weight_packed": pack(codes_KN, layer.bits).mT.contiguous(),
        "weight_scale": layer.packed["scales"].mT.contiguous(),
        "weight_shape": shape,
    }


_LAYOUTS = {"awq": _awq_tensors, "w4a16": _compressed_tensors}


class GptqMethod(Method):
    """GPTQ's integers. Linears that share an input are solved as one, for which H is factored once."""

    def __init__(self, config: GPTQConfig, options: QuantizationSettings) -> None:
        self.config, self.options = config, options

    def make(self, path: str, weight: Tensor, hessian: Tensor | None) -> Made:
        """As Method.make."""
        return self.make_group([path], [weight], hessian)[0]

    def make_group(self, paths: Sequence[str], weights: Sequence[Tensor], hessian: Tensor | None) -> list[Made]:
        """As Method.make_group."""
        assert hessian is not None
        options, columns = self.options, weights[0].shape[1]
        grid = grid_of(self.config, columns, options.mse)
        found = solve(
            torch.cat([weight.float() for weight in weights]),
            hessian,
            grid,
            damp=options.damp,
            act_order=options.act_order,
            static_groups=options.static_groups,
            passes=options.passes,
        )
        made, start = [], 0
        for weight in weights:
            rows = slice(start, start + len(weight))
            params = [_rows(steps, rows) for steps in found.params]
            layer = GptqLinear.of_values(found.weight[rows], params, found.order, None, self.config)
            tensors = _LAYOUTS[options.kind](layer) if options.kind in _LAYOUTS else layer.packed
            name = options.kind if options.kind in _LAYOUTS else f"gptq {self.config.bits}"
            made.append(Made(tensors, found.weight[rows], name, found.damp))
            start = rows.stop
        return made


def _rows(steps: Steps, rows: slice) -> Steps:
    low, high = (part[rows] if isinstance(part, Tensor) else part for part in (steps.low, steps.high))
    return Steps(steps.scale[rows], steps.zero[rows], low, high, steps.dtype)


class GgufMethod(Method):
    """ggml's blocks; block_of: the type that the file gives a tensor. With a Hessian the solver chooses the codes, or
    its diagonal weighs the errors where the options want no solver."""

    def __init__(self, options: QuantizationSettings, block_of: Callable[[str], BlockType]) -> None:
        self.options, self.block_of = options, block_of

    def make(self, path: str, weight: Tensor, hessian: Tensor | None) -> Made:
        """As Method.make."""
        block = self.block_of(f"{path}.weight")
        importance = None if hessian is None else hessian.diagonal()
        # The embedding, where it is the head too, is looked up row by row: compensation would spoil it.
        whole = hessian if self.options.solve and not path.endswith("embed_tokens") else None
        rows = gguf_rows(weight.float(), block, importance, whole, damp=self.options.damp)
        return Made({"weight": rows}, dequantize(rows, block), block.name, 0.0 if whole is None else self.options.damp)


def make_method(
    options: QuantizationSettings, config: QuantizationConfig | None, block_of: Callable[[str], BlockType] | None
) -> Method:
    """The method that the options name."""
    if block_of is not None:
        return GgufMethod(options, block_of)
    assert config is not None
    if options.kind == "fp8":
        return Float8Method()
    if options.kind in SOLVED:
        return GptqMethod(options.grid(_group(config)), options)
    return BlockMethod(config, options)


def _group(config: QuantizationConfig) -> int:
    """Columns of a group, -1 for rows, of one of the formats of solved integers."""
    if isinstance(config, CompressedTensorsConfig):
        return int(config.weights.get("group_size") or -1)
    assert isinstance(config, GPTQConfig | AwqConfig)
    return config.group_size


# -- how good it is ----------------------------------------------------------------------------------------------

_ROWS = 1024  # rows that the output error is measured on, evenly spread


class Errors(NamedTuple):
    """Relative errors of a linear: |X (W - Q)^T| / |X W^T| over the calibration, None without; |W - Q| / |W|."""

    output: float | None
    weight: float


def errors(weight: Tensor, rounded: Tensor, hessian: Tensor | None) -> Errors:
    """The errors of a weight (out, in) that became `rounded`, from H: |X E^T|^2 is n/2 tr(E H E^T)."""
    change = weight - rounded
    plain = _ratio(change.square().sum().item(), weight.square().sum().item())
    if hessian is None:
        return Errors(None, plain)
    step = max(1, -(-len(weight) // _ROWS))
    lost, whole = (((part[::step] @ hessian) * part[::step]).sum().item() for part in (change, weight))
    return Errors(_ratio(lost, whole), plain)


def _ratio(part: float, whole: float) -> float:
    return (max(part, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
