"""Folders in the formats of other programs, packed by hand from their specifications, with the weights that they mean.

Nothing here uses the readers: bits are laid out value by value, and each weight is computed from the numbers drawn.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]
Packer = Callable[[tuple[int, int], torch.Generator], tuple[Tensors, torch.Tensor]]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M1 = [*E2M1, *(-v for v in E2M1)]


def run_of_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as words of 32 bits: code i lies at bit i * bits of the row, counted from the lowest."""
    words = []
    for row in codes.tolist():
        number = sum(code << (i * bits) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append([(number >> (32 * w)) & 0xFFFFFFFF for w in range(count)])
    return torch.tensor(words, dtype=torch.int64).where(torch.tensor(words) < 2**31, torch.tensor(words) - 2**32).int()


def draw(generator: torch.Generator, shape: tuple[int, ...], top: int) -> torch.Tensor:
    return torch.randint(0, top, shape, generator=generator)


def scales_of(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> torch.Tensor:
    return ((torch.rand(shape, generator=generator) + 0.2) / 2**bits).to(dtype)


def spread(each: torch.Tensor, group: int) -> torch.Tensor:
    return each.float().repeat_interleave(group, 1)


# -- AWQ ---------------------------------------------------------------------------------------------------------


def awq(version: str, group: int = 32) -> Packer:
    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        q, z = draw(g, (n, k), 16), draw(g, (n, k // group), 16)
        s = scales_of(g, (n, k // group), torch.float16, 4)
        weight = (q - spread(z, group)) * spread(s, group)
        if version == "gemm":
            order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of word c holds output 8 c + order[i]
            moved = torch.tensor([8 * c + order[i] for c in range(n // 8) for i in range(8)])
            return {
                "qweight": run_of_bits(q.T[:, moved], 4),
                "qzeros": run_of_bits(z.T[:, moved], 4),
                "scales": s.T.contiguous(),
            }, weight
        step = 1 if group >= 128 else 2 if group == 64 else 4
        words_of_zeros = -(-(k // group) // 8)
        padded = -(-words_of_zeros // step) * step
        if version == "gemv":
            filled = torch.zeros(n, 8 * padded, dtype=torch.int64)
            filled[:, : k // group] = z
            scales = torch.zeros(n, 8 * padded, dtype=torch.float16)
            scales[:, : k // group] = s
            return {"qweight": run_of_bits(q, 4), "qzeros": run_of_bits(filled, 4), "scales": scales}, weight
        words = torch.zeros(n // 4, k, dtype=torch.int64)
        for row in range(n):
            for at in range(k):
                chunk, block, within = at // 64, at % 64 // 32, at % 32
                word = 64 * chunk + 16 * (row % 4) + 8 * block + within % 8
                words[row // 4, word] |= int(q[row, at]) << 4 * (within // 8)
        minima = -(z.half() * s)
        both = [torch.zeros(8 * padded, n, dtype=torch.float16) for _ in range(2)]
        both[0][: k // group], both[1][: k // group] = s.T, minima.T
        tensors = {"qweight": words.to(torch.int16), "scales": both[0], "qzeros": both[1]}
        return tensors, q * spread(s, group) + spread(minima, group)

    return pack


# -- compressed-tensors ------------------------------------------------------------------------------------------


def ct_packed(bits: int, group: int, symmetric: bool, dtype: torch.dtype = torch.bfloat16) -> Packer:
    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        width, middle = k if group == -1 else group, 2 ** (bits - 1)
        q, s = draw(g, (n, k), 2**bits), scales_of(g, (n, k // width), dtype, bits)
        z = torch.full((n, k // width), middle) if symmetric else draw(g, (n, k // width), 2**bits)
        tensors = {
            "weight_packed": run_of_bits(q, bits),
            "weight_scale": s,
            "weight_shape": torch.tensor(shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = run_of_bits(z.T, bits).T.contiguous()
        return tensors, (q - spread(z, width)) * spread(s, width)

    return pack


def ct_old(bits: int, group: int, plain_zeros: bool) -> Packer:
    """Files before version 0.17, whose words hold whole codes only, and before 0.9.4, whose zeros are plain bytes."""

    def words(codes: torch.Tensor) -> torch.Tensor:
        per = 32 // bits
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per)).unflatten(1, (-1, per))
        return sum(padded[..., i] << (bits * i) for i in range(per)).to(torch.int32)  # type: ignore[union-attr]

    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        q, z = draw(g, (n, k), 2**bits), draw(g, (n, k // group), 2**bits)
        s = scales_of(g, (n, k // group), torch.float16, bits)
        zeros = (z - 2 ** (bits - 1)).to(torch.int8) if plain_zeros else words(z.T).T.contiguous()
        tensors = {"weight_packed": words(q), "weight_scale": s, "weight_zero_point": zeros}
        return tensors, (q - spread(z, group)) * spread(s, group)

    return pack


def ct_ordered(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """4 bits whose columns belong to groups of 32 in any order (actorder "group")."""
    n, k = shape
    q, s = draw(g, (n, k), 16), scales_of(g, (n, k // 32), torch.bfloat16, 4)
    index = (torch.arange(k) // 32)[torch.randperm(k, generator=g)]
    tensors = {"weight_packed": run_of_bits(q, 4), "weight_scale": s, "weight_shape": torch.tensor(shape),
               "weight_g_idx": index.int()}  # fmt: skip
    return tensors, (q - 8) * s.float()[:, index]


def ct_int8(symmetric: bool) -> Packer:
    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        q, s = draw(g, (n, k), 256) - 128, scales_of(g, (n, 1), torch.float32, 8)
        tensors = {"weight": q.to(torch.int8), "weight_scale": s}
        if symmetric:
            return {**tensors, "input_scale": torch.tensor([0.1])}, q * s
        z = draw(g, (n, 1), 20) - 10
        return {**tensors, "weight_zero_point": z.to(torch.int8)}, (q - z) * s

    return pack


def float8(names: tuple[str, ...], block: tuple[int, int] | None, dtype: torch.dtype = torch.float32) -> Packer:
    """block: rows and columns of a scale, None for one number, (1, 0) for whole rows."""

    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        w = (torch.randn(shape, generator=g) * 100).to(torch.float8_e4m3fn)
        rows, columns = shape if block is None else (block[0], block[1] or k)
        s = scales_of(g, (-(-n // rows), -(-k // columns)), dtype, 9)
        weight = w.float() * spread(s, columns)[:, :k].repeat_interleave(rows, 0)[:n]
        held = {names[0]: w, names[1]: s.flatten() if block is None else s}
        return {**held, **{name: torch.tensor([0.5]) for name in names[2:]}}, weight

    return pack


def float8_exponents(block: tuple[int, int]) -> Packer:
    """fp8 with scale_fmt ue8m0: powers of two as bytes of exponents."""

    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        w = (torch.randn(shape, generator=g) * 100).to(torch.float8_e4m3fn)
        e = draw(g, (-(-n // block[0]), -(-k // block[1])), 4) + 116
        scales = spread(2.0 ** (e - 127.0), block[1])[:, :k].repeat_interleave(block[0], 0)[:n]
        return {"weight": w, "weight_scale_inv": e.to(torch.uint8)}, w.float() * scales

    return pack


def fp4(kind: str) -> Packer:
    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        group = 32 if kind == "mx" else 16
        q = draw(g, (n, k), 16)
        values = torch.tensor(E2M1)[q]
        byte = (q[:, 0::2] | q[:, 1::2] << 4).to(torch.uint8)
        if kind == "mx":
            e = draw(g, (n, k // group), 6) + 118
            return {"weight_packed": byte, "weight_scale": e.to(torch.uint8)}, values * spread(
                2.0 ** (e - 127.0), group
            )
        s = (torch.rand(n, k // group, generator=g) * 4 + 0.5).to(torch.float8_e4m3fn)
        if kind == "ct":
            tensors = {"weight_packed": byte, "weight_scale": s, "weight_global_scale": torch.tensor([64.0])}
            return tensors, values * spread(s.float() / 64, group)
        tensors = {
            "weight": byte,
            "weight_scale": s,
            "weight_scale_2": torch.tensor(0.015625),
            "input_scale": torch.ones(()),
        }
        return tensors, values * spread(s.float() / 64, group)

    return pack


# -- the others --------------------------------------------------------------------------------------------------


def mlx(bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> Packer:
    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        q, s = draw(g, (n, k), 2**bits), scales_of(g, (n, k // group), dtype, bits)
        b = -(torch.rand(n, k // group, generator=g) * 0.6).to(dtype)
        tensors = {"weight": run_of_bits(q, bits).view(torch.uint32), "scales": s, "biases": b}
        return tensors, q * spread(s, group) + spread(b, group)

    return pack


def mlx_floats(mode: str) -> Packer:
    """MLX's modes without biases: codes from the lowest bits of words on, a scale a group."""
    group = 16 if mode == "nvfp4" else 32

    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        if mode == "mxfp8":
            w = torch.randn(shape, generator=g).to(torch.float8_e4m3fn)
            words, values = run_of_bits(w.view(torch.uint8).long(), 8), w.float()
        else:
            q = draw(g, (n, k), 16)
            words, values = run_of_bits(q, 4), torch.tensor(E2M1)[q]
        e = draw(g, (n, k // group), 5) + 120
        scales, held = 2.0 ** (e - 127.0), e.to(torch.uint8)
        if mode == "nvfp4":
            s = (torch.rand(n, k // group, generator=g) * 0.1 + 0.02).to(torch.float8_e4m3fn)
            scales, held = s.float(), s.view(torch.uint8)
        return {"weight": words.view(torch.uint32), "scales": held}, values * spread(scales, group)

    return pack


def hqq(bits: int, group: int, axis: int, dtype: torch.dtype = torch.float32) -> Packer:
    runs = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]

    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        view = (n * k // group, group) if axis == 1 else (group, n * k // group)
        q = draw(g, view, 2**bits)
        each = (view[0], 1) if axis == 1 else (1, view[1])
        s = scales_of(g, each, dtype, bits)
        z = (torch.rand(each, generator=g) * 2**bits).to(dtype)
        height = -(-view[0] // runs)
        width = 3 if bits == 3 else 8 // runs
        words = torch.zeros(height, view[1], dtype=torch.int64)
        for row in range(view[0]):  # run r of rows lies in the r-th highest bits
            words[row % height] |= q[row] << width * (runs - 1 - row // height)
        packed = words.to(torch.int32 if bits == 3 else torch.uint8)
        return {"W_q": packed, "scale": s, "zero": z}, ((q.to(dtype) - z) * s).float().reshape(shape)

    return pack


def exl2(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    n, k = shape
    plan = [(8, 32), (5, 32), *([(4, k - 64)] if k > 64 else [])]
    if k == 64:
        plan = [(6, 16), (4, 16), (3, 32)]
    rows, groups, first, parts, scales, maxima = [], [], 0, [], [], []
    for bits, count in plan:
        q = draw(g, (n, count), 2**bits)
        words = run_of_bits(q, bits).T
        groups += [bits, first]
        first += len(words)
        rows.append(words)
        code, top = draw(g, (n,), 16), torch.rand(1, generator=g).half()[0] + 0.5
        scale = (code + 1).half() ** 2 * (top.float() / 256).half()
        parts.append((q - 2 ** (bits - 1)).float() * scale.float()[:, None])
        scales.append(code)
        maxima.append(top)
    order = torch.randperm(k, generator=g)
    tensors = {
        "q_weight": torch.cat(rows).contiguous(),
        "q_scale": run_of_bits(torch.stack(scales), 4),
        "q_scale_max": torch.stack(maxima),
        "q_groups": torch.tensor(groups, dtype=torch.int16),
        "q_invperm": order.int(),
    }
    return tensors, torch.cat(parts, 1)[:, order]


def torchao_float8(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    n, _ = shape
    w = (torch.randn(shape, generator=g) * 100).to(torch.float8_e4m3fn)
    s = scales_of(g, (n, 1), torch.float32, 9)
    return {"_weight_qdata": w, "_weight_scale": s}, w.float() * s


def torchao(bits: int, group: int) -> Packer:
    def pack(shape: tuple[int, int], g: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = shape
        width, low = k if group == -1 else group, -(2 ** (bits - 1))
        q, s = draw(g, (n, k), 2**bits) + low, scales_of(g, (n, k // width), torch.bfloat16, bits)
        z = draw(g, (n, k // width), 3) - 1
        tensors = {"_weight_qdata": q.to(torch.int8), "_weight_scale": s, "_weight_zero_point": z.to(torch.int8)}
        return tensors, (q - spread(z, width)) * spread(s, width)

    return pack


def _ct(fmt: str, strategy: str = "group", **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
_HQQ = {"nbits": 4, "group_size": 32, "axis": 1}
_FP8 = ("weight", "weight_scale")
FORMATS: dict[str, tuple[dict[str, Any], Packer]] = {
    "awq-gemm": ({**_AWQ, "version": "GEMM"}, awq("gemm")),
    "awq-gemv": ({**_AWQ, "version": "gemv"}, awq("gemv")),
    "awq-fast": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv_fast"}, awq("gemv_fast", 64)),
    "auto-round-awq": ({**_AWQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, awq("gemm")),
    "ct-w4": (_ct("pack-quantized", num_bits=4, group_size=32), ct_packed(4, 32, True)),
    "ct-w4-asym": (_ct("pack-quantized", num_bits=4, group_size=32, symmetric=False), ct_packed(4, 32, False)),
    "ct-w3": (_ct("pack-quantized", num_bits=3, group_size=32, symmetric=False), ct_packed(3, 32, False)),
    "ct-w8": (_ct("pack-quantized", "channel"), ct_packed(8, -1, True)),
    "ct-w2": (_ct("pack-quantized", num_bits=2, group_size=32, symmetric=False), ct_packed(2, 32, False)),
    "ct-w5-old": (_ct("pack-quantized", num_bits=5, group_size=32, symmetric=False), ct_old(5, 32, True)),
    "ct-w3-old": (_ct("pack-quantized", num_bits=3, group_size=32, symmetric=False), ct_old(3, 32, False)),
    "ct-w6": (_ct("pack-quantized", num_bits=6, group_size=32), ct_packed(6, 32, True, torch.float16)),
    "ct-actorder": (_ct("pack-quantized", num_bits=4, group_size=32, actorder="group"), ct_ordered),
    "auto-round-ct": (
        {**_ct("pack-quantized", num_bits=4, group_size=32), "quant_method": "auto-round",
         "packing_format": "auto_round:llm_compressor"}, ct_packed(4, 32, True)
    ),
    "ct-int8": (_ct("int-quantized", "channel"), ct_int8(True)),
    "ct-int8-asym": (_ct("int-quantized", "channel", symmetric=False), ct_int8(False)),
    "ct-fp8-tensor": (_ct("float-quantized", "tensor", type="float"), float8((*_FP8, "input_scale"), None)),
    "ct-fp8-channel": (_ct("float-quantized", "channel", type="float"), float8(_FP8, (1, 0), torch.bfloat16)),
    "ct-fp8-block": (_ct("naive-quantized", "block", type="float", block_structure=[48, 48]), float8(_FP8, (48, 48))),
    "ct-nvfp4": (_ct("nvfp4-pack-quantized", "tensor_group", num_bits=4, type="float", group_size=16), fp4("ct")),
    "ct-mxfp4": (_ct("mxfp4-pack-quantized", "group", num_bits=4, type="float", group_size=32), fp4("mx")),
    "modelopt-nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, fp4("modelopt")),
    "fp8-block": (
        {"quant_method": "fp8", "weight_block_size": [48, 32]}, float8(("weight", "weight_scale_inv"), (48, 32))
    ),
    "fp8-scalar": ({"quant_method": "fp8", "activation_scheme": "static"}, float8((*_FP8, "input_scale"), None)),
    "fp8-e8m0": (
        {"quant_method": "fp8", "weight_block_size": [48, 32], "scale_fmt": "ue8m0"}, float8_exponents((48, 32))
    ),
    "auto-round-fp8": (
        {"quant_method": "auto-round", "packing_format": "auto_round:fp8_static", "bits": 8, "data_type": "fp8"},
        float8((*_FP8, "input_scale"), (1, 0)),
    ),
    "modelopt-fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, float8((*_FP8, "input_scale"), None)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, float8((*_FP8, "input_scale_ub"), (1, 0))),
    "torchao-int8": ({"quant_method": "torchao"}, torchao(8, -1)),
    "torchao-int4": ({"quant_method": "torchao"}, torchao(4, 32)),
    "torchao-fp8": ({"quant_method": "torchao"}, torchao_float8),
    "hqq-1": ({"quant_method": "hqq", "quant_config": {"nbits": 1, "group_size": 32, "axis": 1}}, hqq(1, 32, 1)),
    "hqq-2": ({"quant_method": "hqq", "quant_config": {"nbits": 2, "group_size": 32, "axis": 1}}, hqq(2, 32, 1)),
    "hqq-6": ({"quant_method": "hqq", "quant_config": {"nbits": 6, "group_size": 64, "axis": 0}}, hqq(6, 64, 0)),
    "hqq-4": ({"quant_method": "hqq", "quant_config": {"weight_quant_params": _HQQ}},
              hqq(4, 32, 1)),
    "hqq-3": ({"quant_method": "hqq", "quant_config": {"nbits": 3, "group_size": 64, "axis": 0}}, hqq(3, 64, 0)),
    "hqq-8-half": ({"quant_method": "hqq", "quant_config": {"nbits": 8, "group_size": 64, "axis": 1}},
                   hqq(8, 64, 1, torch.float16)),
    "exl2": ({"quant_method": "exl2", "bits": 4.5}, exl2),
    **{f"mlx-{bits}": ({"bits": bits, "group_size": 32}, mlx(bits, 32)) for bits in (2, 3, 4, 5, 6, 8)},
    **{f"mlx-{mode}": ({"bits": 8 if mode == "mxfp8" else 4, "group_size": 16 if mode == "nvfp4" else 32, "mode": mode},
                       mlx_floats(mode)) for mode in ("mxfp4", "mxfp8", "nvfp4")},
}  # fmt: skip


def write(kind: str, folder: Path, sizes: dict[str, Any] | None = None) -> Tensors:
    """The tiny model in a format; returns the weight of each linear that it means, float32."""
    settings, pack = FORMATS[kind]
    model = tiny_model(torch.float32, **(sizes or SIZES))
    model.save_pretrained(folder)
    tensors, weights, g = load_file(folder / "model.safetensors"), {}, torch.Generator().manual_seed(0)
    whole = kind.startswith("mlx")
    for name in sorted(tensors):
        path = name.removesuffix(".weight")
        matrix = name.endswith("_proj.weight") or (whole and name in ("lm_head.weight", "model.embed_tokens.weight"))
        if not matrix:
            continue
        n, k = tensors.pop(name).shape
        parts, weights[path] = pack((n, k), g)
        tensors |= {f"{path}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    file = {"exl2": "output.safetensors"}.get(kind, "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / file, None if whole else {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization" if whole else "quantization_config"] = {k: v for k, v in settings.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return weights
