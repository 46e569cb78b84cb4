"""The Triton kernels beside torch's unpacking: on the GPU where there is one, else in Triton's interpreter."""

import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from llama2.quantization.gptq import GptqLinear, pack, pack_zeros
from llama2.quantization.int8 import Linear8bit
from llama2.quantization.linear import PackedLinear
from llama2.quantization.nf4 import Linear4bit, from_codes
from llama2.quantization_config import BitsAndBytesConfig

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU and "triton" in sys.modules:
    pytest.skip("Triton was imported without its interpreter: run this file alone", allow_module_level=True)
if not GPU and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("Triton's interpreter needs numpy below 2.4: `make triton-check`", allow_module_level=True)
MODE = {} if GPU else {"TRITON_INTERPRET": "1"}
with patch.dict(os.environ, MODE):  # read while Triton is imported, and again later
    pytest.importorskip("triton", reason="Triton is not installed: `make triton-check` installs and runs it")
    from llama2.quantization import fused

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# A sum of 4,096 float32 products; W and the sum rounded to 8 and 11 bits.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3 if GPU else 1e-2, torch.float16: 8e-4}


def blocks(kind: str, double: bool, shape: tuple[int, int], storage: str = "uint8") -> Linear4bit:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )
    return Linear4bit.quantize(torch.randn(shape) * torch.rand(shape[0], 1), None, config)


def groups(
    bits: int,
    layout: str,
    shape: tuple[int, int],
    size: int,
    shuffled: bool = False,
    dtype: torch.dtype = torch.float16,
) -> GptqLinear:
    """Random codes, zeros and scales; zeros from 1, which both layouts hold."""
    rows, columns = shape
    count, top = (1 if size == -1 else -(-columns // size)), 1 << bits
    g_idx = torch.arange(columns, dtype=torch.int32) // (columns if size == -1 else size)
    tensors = {
        "qweight": pack(torch.randint(0, top, (columns, rows)), bits),
        "qzeros": pack_zeros(torch.randint(1, top, (count, rows), dtype=torch.int32), bits, layout == "gptq_v2"),
        "scales": (torch.rand(count, rows) * 0.01 + 1e-3).to(dtype),
        "g_idx": g_idx[torch.randperm(columns)] if shuffled else g_idx,
    }
    config = SimpleNamespace(bits=bits, group_size=size, sym=False, format=layout)
    return GptqLinear.from_file(tensors, shape, None, config)


MAKERS: dict[str, Callable[[tuple[int, int]], PackedLinear]] = {
    "nf4": lambda shape: blocks("nf4", False, shape),
    "nf4 double": lambda shape: blocks("nf4", True, shape),
    "fp4": lambda shape: blocks("fp4", False, shape),
    "fp4 double, in bfloat16": lambda shape: blocks("fp4", True, shape, "bfloat16"),
    **{
        f"gptq {bits} bits {layout}{' act-order' if shuffled else ''}": (
            lambda shape, b=bits, f=layout, s=shuffled: groups(b, f, shape, 64, s)
        )
        for bits in (2, 3, 4, 8)
        for layout in ("gptq", "gptq_v2")
        for shuffled in (False, True)
    },
    "gptq one group": lambda shape: groups(4, "gptq", shape, -1),
    "gptq groups of 128": lambda shape: groups(4, "gptq", shape, 128),
    "gptq groups of 32, bfloat16 scales": lambda shape: groups(4, "gptq", shape, 32, dtype=torch.bfloat16),
    "gptq groups of 48": lambda shape: groups(4, "gptq_v2", shape, 48),
    "int8": lambda shape: Linear8bit.quantize(torch.randn(shape), None, None),
}
MULTIPLIED = [name for name in MAKERS if not name.startswith("gptq") or " 4 bits" in name or "group" in name]


@pytest.fixture(autouse=True)
def kernels_for_this_device() -> Iterator[None]:
    """Layers take the kernels on the CPU too, where the interpreter runs them."""
    torch.manual_seed(0)
    with patch.dict(os.environ, MODE), patch("llama2.quantization.linear.kernels_run", lambda device: True):
        yield


def values(layer: PackedLinear, dtype: torch.dtype) -> Tensor:
    """What torch unpacks. Triton's interpreter cuts float32 off for bfloat16, where torch and a GPU round."""
    if GPU or dtype != torch.bfloat16:
        return layer.dequantize(dtype)
    return (layer.dequantize().view(torch.int32) & -65536).view(torch.float32).to(dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_unpacks_to_the_same_values(name: str, dtype: torch.dtype) -> None:
    layer = MAKERS[name]((96, 576)).to(DEVICE)
    assert torch.equal(layer.fused().unpack(dtype), values(layer, dtype))


@pytest.mark.parametrize("shape", [(7, 33), (5, 64), (64, 5), (1, 1), (3, 100)])
@pytest.mark.parametrize("name", ["nf4", "nf4 double", "int8"])
def test_unpacks_any_shape(name: str, shape: tuple[int, int]) -> None:
    layer = MAKERS[name](shape).to(DEVICE)
    assert torch.equal(layer.fused().unpack(torch.float32), layer.dequantize())


def test_unpacks_zeros_that_borrow() -> None:
    """A v1 zero of 0 is stored as -1 and takes from its neighbour; three bits wrap in their field."""
    for bits in (2, 3, 4, 8):
        layer = groups(bits, "gptq", (64, 64), 32)
        words = layer.packed["qzeros"]
        words.copy_(torch.randint(-(1 << 31), 1 << 31, words.shape, dtype=torch.int32))
        layer.to(DEVICE)
        assert torch.equal(layer.fused().unpack(torch.float32), layer.dequantize()), bits


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", MULTIPLIED)
def test_products(name: str, dtype: torch.dtype, rows: int) -> None:
    shape = (96, 576)
    layer = MAKERS[name](shape).to(DEVICE)
    if not layer.fused().multiplies(rows, torch.bfloat16):
        pytest.skip("unpacked for several rows")
    x = torch.randn(rows, shape[1], device=DEVICE).to(dtype)
    found = layer.fused().product(x)
    assert found.dtype == dtype and found.shape == (rows, shape[0])
    assert relative(found, x.double() @ layer.dequantize().double().T) < BOUNDS[dtype]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("shape", [(32, 1536), (64, 4096), (32, 32)])
@pytest.mark.parametrize("name", ["nf4 double", "gptq 4 bits gptq", "gptq 4 bits gptq act-order", "int8"])
def test_products_of_other_shapes(name: str, shape: tuple[int, int], rows: int) -> None:
    layer = MAKERS[name](shape).to(DEVICE)
    x = torch.randn(rows, shape[1], device=DEVICE)
    wanted = x.double() @ layer.dequantize().double().T
    packed = layer.fused()
    found = packed.product(x) if packed.multiplies(rows, torch.bfloat16) else layer.multiply(x)
    assert relative(found, wanted) < BOUNDS[torch.float32]


@pytest.mark.parametrize("name", ["nf4 double", "gptq 4 bits gptq", "gptq 4 bits gptq act-order", "int8"])
def test_one_row_as_a_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MATRICES", dict.fromkeys(fused.MATRICES, 1))
    layer = MAKERS[name]((96, 576)).to(DEVICE)
    x = torch.randn(1, 576, device=DEVICE)
    assert relative(layer.fused().product(x), x.double() @ layer.dequantize().double().T) < BOUNDS[torch.float32]


def test_sorted_codes_follow_the_file() -> None:
    """The copy that act-order makes is made again where the layer's tensors changed."""
    layer, other = (MAKERS["gptq 4 bits gptq act-order"]((96, 576)).to(DEVICE) for _ in range(2))
    x = torch.randn(3, 576, device=DEVICE)
    for _ in range(2):
        assert relative(layer.fused().product(x), x.double() @ layer.dequantize().double().T) < BOUNDS[torch.float32]
        layer.load_state_dict(other.state_dict())
    uneven = MAKERS["gptq 4 bits gptq act-order"]((96, 576)).to(DEVICE)
    uneven.packed["g_idx"].copy_(torch.randint(0, 9, (576,)))
    assert not uneven.fused().multiplies(3, torch.bfloat16)
    for rows in (1, 3):
        wanted = x[:rows].double() @ uneven.dequantize().double().T
        assert relative(uneven.multiply(x[:rows]), wanted) < BOUNDS[torch.float32]


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_blocks(block: int) -> None:
    """Files of bitsandbytes have blocks of other sizes; a row may hold a part of one."""
    shape, count = (6, 1088), 6 * 1088
    codes = torch.randint(0, 256, (count // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-count // block))
    made = fused.Blocks(shape, "nf4", block, codes.to(DEVICE), absmax.to(DEVICE))
    wide = made.unpack(torch.float32).double()
    assert torch.equal(wide.float().cpu(), from_codes(codes, absmax, "nf4", block, shape, torch.float32))
    for rows in (1, 4):
        x = torch.randn(rows, shape[1], device=DEVICE)
        assert relative(made.product(x), x.double() @ wide.T) < BOUNDS[torch.float32]


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
@pytest.mark.parametrize("name", ["nf4", "gptq 4 bits gptq", "gptq 3 bits gptq", "int8"])
def test_layers(name: str, rows: int) -> None:
    """Bias, leading dimensions and the gradient, as without kernels."""
    layer = MAKERS[name]((96, 576)).to(DEVICE)
    layer.bias = torch.nn.Parameter(torch.randn(96, device=DEVICE))
    x = torch.randn(1, rows, 576, device=DEVICE, requires_grad=True)
    out = layer(x)
    weight = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    with patch("llama2.quantization.linear.kernels_run", lambda device: False):
        plain = layer(x)
        (plain_grad,) = torch.autograd.grad((plain * weight).sum(), x)
    assert out.shape == (1, rows, 96)
    assert relative(out, plain.double()) < 2e-6 and relative(grad, plain_grad.double()) < 2e-6


def test_which_products_take_a_kernel() -> None:
    layer = MAKERS["int8"]((32, 64)).to(DEVICE)
    with patch.object(fused.Bytes, "product", side_effect=AssertionError("taken")):
        for rows, dtype in ((1, torch.float32), (1, torch.bfloat16), (16, torch.bfloat16), (2, torch.float16)):
            with pytest.raises(AssertionError, match="taken"):
                layer(torch.randn(rows, 64, device=DEVICE, dtype=dtype))
        assert layer(torch.randn(2, 64, device=DEVICE)).shape == (2, 32)
        assert layer(torch.randn(17, 64, device=DEVICE)).shape == (17, 32)
        assert layer(torch.randn(0, 64, device=DEVICE)).shape == (0, 32)
        assert layer(torch.randn(2, 64, device=DEVICE, dtype=torch.float64)).dtype == torch.float64
        with patch("llama2.quantization.linear.kernels_run", lambda device: False):
            assert layer(torch.randn(2, 64, device=DEVICE)).shape == (2, 32)
    assert not MAKERS["nf4"]((6, 33)).fused().multiplies(1, torch.float32)  # rows begin inside a byte
    assert not MAKERS["gptq 8 bits gptq"]((32, 64)).fused().multiplies(1, torch.float32)


def test_x_that_begins_at_an_odd_place() -> None:
    layer = MAKERS["nf4"]((8, 64)).to(DEVICE)
    x = torch.randn(65, device=DEVICE)[1:].view(1, 64)
    assert relative(layer.multiply(x), x.double() @ layer.dequantize().double().T) < BOUNDS[torch.float32]


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("name", ["nf4 double", "gptq 4 bits gptq", "gptq 4 bits gptq act-order", "int8"])
def test_graphs_replay_the_product(name: str, rows: int) -> None:
    layer = MAKERS[name]((4096, 4096)).cuda()
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = layer.multiply(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer.multiply(x)
        out.zero_()
        graph.replay()
    assert torch.equal(out, expected)
    assert relative(out, x.double() @ layer.dequantize().double().T) < BOUNDS[torch.bfloat16]
