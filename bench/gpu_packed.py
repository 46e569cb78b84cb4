"""Packed weights on a GPU, for bench/gpu.py: parity of each format, bandwidth of the kernels, packed models.

A product's bandwidth is the bytes of the packed weight over its time, the median of replays of a CUDA graph that goes
through more copies of the weight than the second-level cache holds.
"""

import copy
import math
import statistics
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2 import BitsAndBytesConfig, LlamaForCausalLM
from llama2.quantization.gptq import GptqLinear
from llama2.quantization.int8 import Linear8bit
from llama2.quantization.linear import PackedLinear
from llama2.quantization.nf4 import Linear4bit

Rows = list[dict[str, Any]]
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
# Relative error against float64, norm over norm: W and the sum rounded to 8 bits, or float32 throughout.
BOUNDS = {torch.bfloat16: 6e-3, torch.float32: 1e-5}
ROTATED = 240 << 20  # bytes of weights between two uses of one: several times the cache of an H100


def blocks(shape: tuple[int, int], kind: str = "nf4", double: bool = False) -> PackedLinear:
    """NF4 or FP4 of normal weights."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype="bfloat16",
    )
    return Linear4bit.quantize(torch.randn(shape, device="cuda") * 0.02, None, config)


def groups(shape: tuple[int, int], bits: int = 4, layout: str = "gptq", shuffled: bool = False) -> PackedLinear:
    """GPTQ of random codes in groups of 128. Random words are valid zeros too: those of v1 borrow."""
    (rows, columns), size = shape, 128
    count = -(-columns // size)

    def words(lines: int, width: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, (lines, width), dtype=torch.int32, device="cuda")

    g_idx = torch.arange(columns, dtype=torch.int32, device="cuda") // size
    tensors = {
        "qweight": words(columns * bits // 32, rows),
        "qzeros": words(count, rows * bits // 32),
        "scales": (torch.rand(count, rows, device="cuda") * 0.064 / (1 << bits) + 1e-4).half(),
        "g_idx": g_idx[torch.randperm(columns, device="cuda")] if shuffled else g_idx,
    }
    return GptqLinear.from_file(
        tensors, shape, None, SimpleNamespace(bits=bits, group_size=size, sym=False, format=layout)
    )


def int8(shape: tuple[int, int]) -> PackedLinear:
    """int8 rows of normal weights."""
    return Linear8bit.quantize(torch.randn(shape, device="cuda") * 0.02, None, None).cuda()


FORMATS: dict[str, Callable[[tuple[int, int]], PackedLinear]] = {
    "nf4": blocks,
    "nf4 double": lambda shape: blocks(shape, double=True),
    "gptq 4 bits": groups,
    "gptq 4 bits act-order": lambda shape: groups(shape, shuffled=True),
    "int8": int8,
}
UNPACKED = {
    "fp4 double": lambda shape: blocks(shape, "fp4", True),
    **{f"gptq {bits} bits": lambda shape, b=bits: groups(shape, b) for bits in (2, 3, 8)},
    "gptq 3 bits v2": lambda shape: groups(shape, 3, "gptq_v2"),
    "gptq 4 bits v2": lambda shape: groups(shape, 4, "gptq_v2"),
}


def parity() -> Rows:
    """Products of 1, 3 and 16 rows and the unpacked weight of each format, against torch's unpacking."""
    torch.manual_seed(0)
    found = []
    for name, make in {**FORMATS, **UNPACKED}.items():
        for dtype in (torch.bfloat16, torch.float32) if name in ("nf4", "gptq 4 bits", "int8") else (torch.bfloat16,):
            row = {"format": name, "dtype": str(dtype).removeprefix("torch."), "bound": BOUNDS[dtype]}
            try:
                same, error = compare(make((1056, 2816)), dtype)
                found.append({**row, "unpacked equal": same, "error": error, "ok": same and error < BOUNDS[dtype]})
            except Exception as error:  # the other formats are still to be seen
                traceback.print_exc()
                found.append({**row, "unpacked equal": False, "error": type(error).__name__, "ok": False})
    return found


def compare(layer: PackedLinear, dtype: torch.dtype) -> tuple[bool, float]:
    """(whether the kernel unpacks what torch does, the largest relative error of a product; inf for NaN)."""
    exact, fused = layer.dequantize().double(), layer.fused()
    same, worst = torch.equal(fused.unpack(dtype), layer.dequantize(dtype)), 0.0
    for rows in (rows for rows in (1, 3, 16) if fused.multiplies(rows, dtype)):
        x = torch.randn(rows, layer.in_features, device="cuda").to(dtype)
        wanted = x.double() @ exact.T
        error = float((layer.multiply(x).double() - wanted).norm() / wanted.norm())
        worst = max(worst, math.inf if math.isnan(error) else error)
    return same, worst


def seconds(calls: list[Callable[[], Any]], replays: int = 15) -> float:
    """Median seconds of one call, all of them recorded as a graph."""
    with torch.inference_mode():
        for call in calls:  # compiles kernels; a layer also looks at the order of its groups once
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for _ in range(replays + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[2:])


def copies(layer: PackedLinear, held: int) -> list[PackedLinear]:
    """The layer and as many copies as are not in the cache together."""
    return [layer, *(copy.deepcopy(layer) for _ in range(-(-ROTATED // held)))]


def products(limit: float) -> Rows:
    """GB/s of products with packed weights beside F.linear in bfloat16, by shape and rows of x. limit: of a copy."""
    found = []
    for shape in SHAPES:
        size = 2 * shape[0] * shape[1]
        plain = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(-(-ROTATED // size) + 1)]
        layers = {name: copies(layer, layer.nbytes) for name, make in FORMATS.items() if (layer := make(shape))}
        for rows in (1, 4, 16):
            x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
            base = seconds([lambda w=w, x=x: F.linear(x, w) for w in plain])
            at = {"out x in": f"{shape[0]} x {shape[1]}", "rows": rows}
            rate = size / base / 1e9
            found.append(
                {**at, "weights": "bfloat16", "us": base * 1e6, "GB/s": rate, "of copy": rate / limit, "x": 1.0}
            )
            for name, held in layers.items():
                try:
                    took = seconds([lambda layer=layer, x=x: layer.multiply(x) for layer in held])
                except Exception as error:  # parity has said so too
                    print(f"{name}, {at}: {error!r}")
                    took = math.nan
                rate = held[0].nbytes / took / 1e9
                line = {"us": took * 1e6, "GB/s": rate, "of copy": rate / limit, "x": base / took}
                found.append({**at, "weights": name, **line})
    return found


def unpacking(limit: float) -> Rows:
    """GB/s, read and written, of the kernels that unpack to bfloat16, and their time beside torch's."""
    found, shape = [], SHAPES[2]
    for name, make in {**FORMATS, "gptq 3 bits": UNPACKED["gptq 3 bits"]}.items():
        layer = make(shape)
        held = copies(layer, 2 * shape[0] * shape[1])
        took = seconds([lambda layer=layer: layer.fused().unpack(torch.bfloat16) for layer in held])
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        layer.dequantize(torch.bfloat16)
        start.record()
        layer.dequantize(torch.bfloat16)
        end.record()
        end.synchronize()
        rate = (layer.nbytes + 2 * shape[0] * shape[1]) / took / 1e9
        line = {"us": took * 1e6, "GB/s": rate, "of copy": rate / limit, "torch us": start.elapsed_time(end) * 1e3}
        found.append({"unpacking": name, **line})
    return found


# -- tiles -------------------------------------------------------------------------------------------------------

# Rows of W, spans or bytes of K, warps, stages, programs.
_TILES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "blocks_row": ("nf4", [(8, 16, 4), (4, 32, 4), (8, 16, 4, 1, 264), (4, 16, 2, 3)]),
    "groups_row": ("gptq 4 bits", [(128, 1, 4), (64, 1, 2, 3), (256, 1, 8), (128, 1, 4, 1, 264)]),
    "bytes_row": ("int8", [(8, 512, 4), (4, 1024, 4), (8, 1024, 8), (4, 512, 4, 3)]),
    "blocks_rows": ("nf4", [(64, 1, 4, 4), (64, 1, 4, 4, 264), (128, 1, 8, 4), (32, 1, 2, 4), (64, 1, 4, 2)]),
    "groups_rows": ("gptq 4 bits", [(64, 1, 4, 4), (64, 1, 4, 4, 264), (128, 1, 8, 3), (32, 1, 2, 4), (64, 1, 4, 2)]),
    "bytes_rows": ("int8", [(32, 128, 4, 4), (64, 128, 4, 4), (64, 128, 4, 4, 264), (32, 256, 4, 3)]),
}


def tiles(limit: float) -> Rows:
    """Microseconds of every kernel by its tile, at 4096 x 11008 and 4096 x 4096; "rows" kernels for one row as well.

    The last line of a kernel and a number of rows names its best tile over both. limit: GB/s of a copy.
    """
    from llama2.quantization import fused  # imports triton, which a machine without a GPU need not have

    found = []
    for kernel, (name, tried) in _TILES.items():
        family = kernel.split("_")[0]
        held = {
            shape: copies(layer, layer.nbytes) for shape in (SHAPES[2], SHAPES[0]) if (layer := FORMATS[name](shape))
        }
        kept, from_rows = fused.TILES[kernel], fused.MATRICES[family]
        for rows in (1,) if kernel.endswith("row") else (1, 4, 16):
            # For one row either kernel is tried, whatever is chosen at present.
            fused.MATRICES[family] = 2 if kernel.endswith("row") else 1
            times: dict[str, float] = {}
            for tile in tried:
                fused.TILES[kernel] = fused.Tile(*tile)
                row: dict[str, Any] = {"kernel": kernel, "rows": rows, "tile": str(tile)}
                total = 0.0
                for shape, layers in held.items():
                    x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
                    at = f"us, {shape[0]} x {shape[1]}"
                    try:
                        took = seconds([lambda layer=layer, x=x: layer.fused().product(x) for layer in layers], 5)
                        row[at], row[f"of copy, {shape[1]}"] = took * 1e6, layers[0].nbytes / took / 1e9 / limit
                    except Exception as error:  # too large a tile says so in one of several ways
                        took = math.inf
                        row[at], row[f"of copy, {shape[1]}"] = type(error).__name__, ""
                    total += took
                times[row["tile"]] = total
                found.append(row)
            best = min(times, key=lambda tile: times[tile])
            found.append({**dict.fromkeys(found[-1], ""), "kernel": kernel, "rows": rows, "tile": f"best: {best}"})
        fused.TILES[kernel], fused.MATRICES[family] = kept, from_rows
    return found


# -- whole models ------------------------------------------------------------------------------------------------


def pack_model(model: LlamaForCausalLM, weights: str) -> int:
    """Packs every linear of the layers in place; returns the bytes that a step reads."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in path:
            shape = (module.out_features, module.in_features)
            model.set_submodule(path, FORMATS[weights](shape).eval())
    packed = sum(module.nbytes for module in model.modules() if isinstance(module, PackedLinear))
    return packed + model.lm_head.weight.nbytes
