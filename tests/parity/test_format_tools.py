"""The readers against the formats' own tools, each where it is installed: what the tool wrote is read to the bits that
the tool itself unpacks.

    pip install --no-deps compressed-tensors hqq mlx mlx-cpu autoawq loguru termcolor
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama2.quantization.formats import layer_class, settings_in

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SHAPE = (64, 256)
PATH = "model.layers.0.mlp.up_proj"


def weight() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05


def layer(content: dict[str, Any], tensors: dict[str, torch.Tensor], key: str = "quantization_config") -> Any:
    settings = settings_in({key: content})
    assert settings is not None
    return layer_class(settings).from_file(tensors, SHAPE, None, settings.at(PATH))


# -- compressed-tensors ------------------------------------------------------------------------------------------

SCHEMES: dict[str, dict[str, Any]] = {
    "w4": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "w4 asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "w3": {"num_bits": 3, "strategy": "group", "group_size": 64},
    "w8": {"num_bits": 8, "strategy": "channel"},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_pack_quantized(name: str) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(type="int", **SCHEMES[name])
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    w, group = weight(), SCHEMES[name].get("group_size", SHAPE[1])
    parts = w.unflatten(1, (-1, group))
    top = 2 ** (arguments.num_bits - 1)
    if arguments.symmetric:
        scale, zero = parts.abs().amax(-1) / (top - 0.5), torch.zeros(SHAPE[0], SHAPE[1] // group)
    else:
        scale = (parts.amax(-1) - parts.amin(-1)) / (2 * top - 1)
        zero = (-top - parts.amin(-1) / scale).round().clamp(-top, top - 1)
    state = {"weight": w, "weight_scale": scale.bfloat16(), "weight_zero_point": zero.to(torch.int8)}
    packed = base.PackedQuantizationCompressor.compress(state, scheme)
    groups = {"g": {"targets": ["Linear"], "weights": {"type": "int", **SCHEMES[name]}}}
    content = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    tensors = {key: value for key, value in packed.items() if value is not None}
    found = layer(content, tensors)
    theirs = base.PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
    assert torch.equal(found.dequantize(theirs.dtype), theirs)


# -- AutoAWQ -----------------------------------------------------------------------------------------------------


def _awq_packing() -> Any:
    spec = importlib.util.find_spec("awq")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("autoawq is not installed")
    file = Path(spec.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    made = importlib.util.spec_from_file_location("awq_packing", file)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


def test_awq_gemm() -> None:
    packing, g = _awq_packing(), torch.Generator().manual_seed(1)
    tensors = {
        "qweight": torch.randint(-(2**31), 2**31, (SHAPE[1], SHAPE[0] // 8), generator=g).int(),
        "qzeros": torch.randint(-(2**31), 2**31, (SHAPE[1] // 32, SHAPE[0] // 8), generator=g).int(),
        "scales": (torch.rand(SHAPE[1] // 32, SHAPE[0], generator=g) * 0.01).half(),
    }
    theirs = packing.dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, 32)
    found = layer({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, tensors)
    assert torch.equal(found.dequantize(torch.float16), theirs.T)


# -- HQQ ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_hqq(bits: int, axis: int) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    packed, meta = quantize.Quantizer.quantize(
        weight(), nbits=bits, group_size=64, axis=axis, device="cpu", compute_dtype=torch.float32, optimize=False
    )
    theirs = quantize.Quantizer.dequantize(packed, meta)
    params = {"nbits": bits, "group_size": 64, "axis": axis}
    content = {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}}
    found = layer(content, {"W_q": packed.data, "scale": meta["scale"], "zero": meta["zero"]})
    assert torch.equal(found.dequantize(theirs.dtype), theirs)


# -- MLX ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_affine(bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    q, scales, biases = mx.quantize(mx.array(weight().numpy()), group_size=group, bits=bits)
    theirs = np.array(mx.dequantize(q, scales, biases, group_size=group, bits=bits))
    tensors = {"weight": torch.from_numpy(np.array(q)), "scales": torch.from_numpy(np.array(scales)),
               "biases": torch.from_numpy(np.array(biases))}  # fmt: skip
    found = layer({"bits": bits, "group_size": group}, tensors, "quantization").dequantize().numpy()
    # MLX may fuse the product and the sum: half a unit of the larger of the two.
    np.testing.assert_allclose(found, theirs, rtol=0, atol=2**-23)


@pytest.mark.parametrize(("mode", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_mlx_floats(mode: str, bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    q, scales = mx.quantize(mx.array(weight().numpy()), group_size=group, bits=bits, mode=mode)
    theirs = np.array(mx.dequantize(q, scales, group_size=group, bits=bits, mode=mode).astype(mx.float32))
    tensors = {"weight": torch.from_numpy(np.array(q)), "scales": torch.from_numpy(np.array(scales))}
    found = layer({"bits": bits, "group_size": group, "mode": mode}, tensors, "quantization")
    assert np.array_equal(found.dequantize().numpy(), theirs)
