"""One matrix of a wide model, quantised here and by llama.cpp's encoders: super-blocks and groups of 128.

    python bench/quantise_wide.py [--columns 4096] [--rows 1024] [--tokens 8192]

Without a trained model of such widths, weights are Student's t of 5 degrees (heavier tails than normal), and inputs are
correlated (half of their energy lies in 64 directions) with log-normal column scales. Each row is quantised for itself,
so some stand for all. Calibrated on one half of the inputs, measured on the other: "output" is
|X (W - Q)^T| / |X W^T|, "weighed" the same with X's columns taken as independent, which is what an importance matrix
sees, "weight" |W - Q| / |W|. ggml's rows come from ggml_quantize_chunk of llama-cpp-python's library, which is what
llama.cpp's quantiser calls, with and without the importance matrix. The last line is JSON.
"""

import argparse
import ctypes
import json
import math
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from torch import Tensor

from llama2 import BitsAndBytesConfig, GPTQConfig
from llama2.quantization.ggml import TYPES, dequantize
from llama2.quantization.gptq_solver import Hessian
from llama2.quantization.integer_grid import IntegerGrid
from llama2.quantize.methods import BlockMethod, GgufMethod, GptqMethod, errors
from llama2.quantize.options import QuantizationSettings

PLANE = 64


def inputs(columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Two halves of (tokens, columns)."""
    plane = torch.randn(PLANE, columns) / math.sqrt(PLANE)
    scale = torch.randn(columns).mul(0.7).exp()
    made = [(torch.randn(tokens, PLANE) @ plane + torch.randn(tokens, columns)) * scale for _ in range(2)]
    return made[0], made[1]


def second_moments(x: Tensor) -> Tensor:
    found = Hessian(x.shape[1])
    found.add(x)
    return found.matrix()


def ggml_rows(weight: Tensor, kind: str, importance: Tensor | None) -> Tensor:
    """What llama.cpp stores of the weight, unpacked."""
    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows, columns = weight.shape
    packed = torch.zeros(rows, TYPES[kind].row_bytes(columns), dtype=torch.uint8)
    source, given = weight.contiguous(), None if importance is None else importance.float().contiguous()
    library.ggml_quantize_chunk(
        ctypes.c_int(TYPES[kind].id), ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(columns),
        ctypes.c_void_p(None if given is None else given.data_ptr()),
    )  # fmt: skip
    return dequantize(packed, TYPES[kind])


def rounded(weight: Tensor, group: int) -> Tensor:
    """Four bits by symmetric scales that span each group."""
    grid = IntegerGrid(group, 4)
    parts = [(part.clone(), grid.fit(part, torch.ones(group))) for part in weight.split(group, 1)]
    return torch.cat([steps.nearest(part, axes=1) for part, steps in parts], 1)


def rows_of(weight: Tensor, hessian: Tensor) -> dict[str, Tensor]:
    found, importance = {}, hessian.diagonal().clone()
    for kind in ("Q4_0", "Q4_K", "Q6_K", "Q8_0"):
        found[f"{kind}, llama.cpp"] = ggml_rows(weight, kind, None)
        found[f"{kind}, llama.cpp, importance"] = ggml_rows(weight, kind, importance)
        for name, solve in (("importance", False), ("--solve", True)):
            method = GgufMethod(
                QuantizationSettings(method=f"gguf:{kind}", solve=solve), lambda _, kind=kind: TYPES[kind]
            )
            found[f"{kind}, ours, {name}"] = method.make("x", weight, hessian).weight
    found["4 bits, groups of 128, rounded"] = rounded(weight, 128)
    for search in (False, True):
        options = QuantizationSettings(method="gptq", group_size=128, mse=search)
        made = GptqMethod(GPTQConfig(bits=4, group_size=128), options).make("x", weight, hessian)
        found[f"GPTQ, groups of 128, ours{'' if search else ', --no-mse'}"] = made.weight
    nf4 = BlockMethod(
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), QuantizationSettings(method="nf4")
    )
    found["NF4, ours and bitsandbytes"] = nf4.make("x", weight, None).weight
    found["NF4, ours, --calibrate"] = nf4.make("x", weight, hessian).weight
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    torch.manual_seed(0)
    drawn = np.random.default_rng(0).standard_t(5, (args.rows, args.columns))
    weight = torch.from_numpy(drawn).float().mul_(0.02 / math.sqrt(5 / 3))
    seen, unseen = (second_moments(x) for x in inputs(args.columns, args.tokens))
    summary = {"bench": "quantise_wide", "columns": args.columns, "rows": args.rows}
    for name, made in rows_of(weight, seen).items():
        output, plain = errors(weight, made, unseen)
        weighed, _ = errors(weight, made, torch.diag(unseen.diagonal()))
        print(f"{name:34} output {output:.5f}  weighed {weighed:.5f}  weight {plain:.5f}", flush=True)
        summary[name] = [round(value or 0, 5) for value in (output, weighed, plain)]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
