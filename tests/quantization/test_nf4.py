"""NF4 and FP4: bytes by hand, blocks across rows, double quantisation, what a file may not hold."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama2.errors import CheckpointError, InputError
from llama2.quantization.codebooks import FP4, NF4
from llama2.quantization.nf4 import TABLES, Linear4bit, dynamic_map, from_codes, to_bytes, to_codes
from llama2.quantization_config import BitsAndBytesConfig

Tensors = dict[str, torch.Tensor]


def settings(kind: str = "nf4", double: bool = False, **others: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, **others)


def layer(rows: int = 6, cols: int = 96, dtype: torch.dtype = torch.float32, **how: Any) -> Linear4bit:
    torch.manual_seed(rows * cols)
    return Linear4bit.quantize((torch.randn(rows, cols) * 0.05).to(dtype), None, settings(**how))


# -- values ------------------------------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    # The largest magnitude is 2, so shares are halves of the values. NF4's codes: -1 is 0, 0 is 7, 1 is 15; 0.3 lies
    # nearest to 0.338 (11), -0.3 to -0.284 (4). The first of two goes into the high nibble.
    weight = torch.zeros(1, 64)
    weight[0, :5] = torch.tensor([2.0, -2.0, 0.6, -0.6, 0.0])
    codes, absmax = to_codes(weight, "nf4")
    assert codes[:4].tolist() == [0xF0, 0xB4, 0x77, 0x77] and absmax.tolist() == [2.0]
    # FP4's by sign, exponent and mantissa: 1 is 3, -1 is 11, 0.25 is 7, -1/6 is 14, and zero is 0.
    weight[0, :5] = torch.tensor([2.0, -2.0, 0.5, -2 / 6, 0.0])
    codes, absmax = to_codes(weight, "fp4")
    assert codes[:4].tolist() == [0x3B, 0x7E, 0x00, 0x00] and absmax.tolist() == [2.0]
    assert from_codes(codes, absmax, "fp4", 64, (1, 64), torch.float32)[0, :5].tolist() == weight[0, :5].tolist()


@pytest.mark.parametrize("kind", TABLES)
def test_every_code_survives(kind: str) -> None:
    """Packed, unpacked and packed again gives the same bytes, for every code but the second of FP4's two zeros."""
    codes = [c for c in range(16) if (kind, c) != ("fp4", 8)]
    g = torch.Generator().manual_seed(0)
    drawn = torch.tensor(codes, dtype=torch.uint8)[torch.randint(0, len(codes), (4096,), generator=g)]
    drawn[::64] = torch.tensor(TABLES[kind]).argmax().to(torch.uint8)  # a block that reaches its largest magnitude
    packed = drawn[::2] << 4 | drawn[1::2]
    absmax = torch.rand(64, generator=g) + 0.01
    values = from_codes(packed, absmax, kind, 64, (32, 128), torch.float32)
    again, scales = to_codes(values, kind)
    assert torch.equal(again, packed) and torch.equal(scales, absmax)


@pytest.mark.parametrize("kind", TABLES)
def test_the_nearest_value_is_taken_and_the_smaller_of_two(kind: str) -> None:
    table = torch.tensor(sorted({*TABLES[kind]}))
    middles = ((table[1:] + table[:-1]) / 2).tolist()
    weight = torch.zeros(1, 64)
    weight[0, : 1 + len(middles)] = torch.tensor([1.0, *middles])
    found = from_codes(*to_codes(weight, kind), kind, 64, (1, 64), torch.float32)[0, 1 : 1 + len(middles)]
    assert found.tolist() == table[:-1].tolist()
    x = torch.linspace(-1, 1, 64 * 500).view(500, 64)
    x[:, 0] = 1
    found = from_codes(*to_codes(x, kind), kind, 64, (500, 64), torch.float32)
    best = (x[..., None] - table).abs().min(-1).values
    assert torch.allclose((x - found).abs(), best, atol=1e-7)


def test_blocks_end_inside_rows() -> None:
    made = layer(6, 45)
    weight = made.dequantize()
    scales = made.absmax.repeat_interleave(64)[: 6 * 45].view(6, 45)
    assert made.absmax.shape == (math.ceil(270 / 64),)
    table = torch.tensor(NF4)
    codes = torch.stack((made.codes >> 4, made.codes & 15), 1).flatten()[:270].view(6, 45)
    assert torch.equal(weight, table[codes.long()] * scales)
    torch.manual_seed(270)
    assert (weight - torch.randn(6, 45) * 0.05).norm() / weight.norm() < 0.12


def test_an_odd_number_of_weights() -> None:
    made = layer(3, 5)
    assert made.packed["weight"].shape == (8, 1) and int(made.codes[-1]) & 15 == NF4.index(0.0)
    assert made.dequantize().shape == (3, 5)


@pytest.mark.parametrize("kind", TABLES)
def test_long_weights_are_as_short_ones(kind: str) -> None:
    """What is worked on in pieces is what it would be at once."""
    weight = torch.randn(1100, 1000)  # longer than a piece, and no multiple of it or of a block
    codes, absmax = to_codes(weight, kind)
    one, first = to_codes(weight[:400], kind)
    assert torch.equal(codes[: len(one)], one) and torch.equal(absmax[: len(first)], first)
    last = to_codes(weight[600:], kind)
    assert torch.equal(codes[-len(last[0]) :], last[0]) and torch.equal(absmax[-len(last[1]) :], last[1])
    whole = from_codes(codes, absmax, kind, 64, (1100, 1000), torch.float32)
    assert torch.equal(whole[600:], from_codes(*last, kind, 64, (500, 1000), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_float32_values_rounded(dtype: torch.dtype) -> None:
    made = layer(double=True)
    assert torch.equal(made.dequantize(dtype), made.dequantize().to(dtype))


def test_a_block_of_zeros() -> None:
    for kind in TABLES:
        made = Linear4bit.quantize(torch.zeros(2, 64), None, settings(kind, double=True))
        assert torch.equal(made.dequantize(), torch.zeros(2, 64))


# -- double quantisation -----------------------------------------------------------------------------------------


def test_dynamic_map_by_hand() -> None:
    # Between 0.1 and 1 of 64 parts the middles are 0.1 + 0.9 (i + 1/2) / 64; at 1e-6 there is one part, 0.55.
    found = dynamic_map()
    assert len(found) == 256 and found[127] == 0 and found[-1] == 1 and list(found) == sorted(found)
    assert found[128] == pytest.approx(5.5e-7) and found[126] == -found[128]
    assert found[-65:-1] == pytest.approx([0.1 + 0.9 * (i + 0.5) / 64 for i in range(64)], rel=1e-6)
    assert -found[0] == found[-2]


def test_scales_of_scales() -> None:
    values = torch.cat((torch.linspace(-3, 3, 256), torch.tensor([0.0, 0.25, -0.5])))
    codes, absmax = to_bytes(values)
    assert absmax.tolist() == [3.0, 0.5]
    found = torch.tensor(dynamic_map())[codes.int()] * absmax.repeat_interleave(256)[: len(values)]
    assert (found - values).abs().max() < 3 * 0.9 / 64 / 2 + 1e-3
    # Zero lies in the step 1/65535 above it, whose nearest value is 1.45e-5; the middle of all steps is none of them.
    assert codes[256] == 131 and codes[257] == torch.tensor(dynamic_map()).sub(0.5).abs().argmin()
    assert codes[258] == 0
    assert to_bytes(torch.zeros(3))[0].tolist() == [0, 0, 0]


def test_double_quantisation_costs_little() -> None:
    plain, double = layer(64, 512), layer(64, 512, double=True)
    assert torch.equal(plain.codes, double.codes)
    assert 0 < (plain.absmax - double.absmax).abs().max() < 0.02 * plain.absmax.max()
    assert double.nbytes < plain.nbytes
    assert json.loads(bytes(double.packed["weight.quant_state.bitsandbytes__nf4"].tolist())) == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [64, 512],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": double.state.offset,
    }


# -- the layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
def test_storage_is_a_view_of_the_same_bytes(storage: str) -> None:
    made = layer(8, 64, bnb_4bit_quant_storage=storage)
    held = made.packed["weight"]
    assert held.dtype == getattr(torch, storage) and held.shape == (256 // held.itemsize, 1)
    assert torch.equal(made.codes, layer(8, 64).codes)


def test_products_are_computed_in_the_compute_dtype() -> None:
    x = torch.randn(3, 96)
    exact = x @ layer().dequantize().T
    for dtype, low, high in (("float32", 0.0, 1e-6), ("bfloat16", 1e-4, 2e-2)):
        made = layer(bnb_4bit_compute_dtype=dtype)
        assert made(x).dtype == torch.float32 and made(x.half()).dtype == torch.float16
        assert low <= (made(x) - exact).norm() / exact.norm() < high
        wanted = x.double() @ made.dequantize(torch.float64).T
        assert (made(x.double()) - wanted).norm() / wanted.norm() < 1e-12  # float64 stays float64
    # bfloat16 input, float32 products: rounded only once, at the end
    exact = (x.bfloat16().float() @ layer().dequantize().T).bfloat16()
    assert torch.equal(layer()(x.bfloat16()), exact)


def test_another_layers_state_is_taken_over() -> None:
    a, b = layer(double=True), Linear4bit.quantize(torch.randn(6, 96), None, settings(double=True))
    a.load_state_dict(b.state_dict())
    assert torch.equal(a.dequantize(), b.dequantize()) and a.state == b.state


def test_settings_are_printed() -> None:
    assert "nf4, block=64, double quantisation" in str(layer(double=True))


# -- refusals ----------------------------------------------------------------------------------------------------


def test_wrong_weights() -> None:
    for bad in (float("nan"), float("inf")):
        weight = torch.zeros(4, 64)
        weight[1, 3] = bad
        with pytest.raises(InputError, match="NaN or inf"):
            Linear4bit.quantize(weight, None, settings())
    with pytest.raises(InputError, match="float64"):
        Linear4bit.quantize(torch.zeros(2, 64, dtype=torch.float64), None, settings())
    with pytest.raises(InputError, match="'float64'; 64 bytes go into one of uint8, bfloat16, float16, float32"):
        Linear4bit.quantize(torch.zeros(2, 64), None, settings(bnb_4bit_quant_storage="float64"))
    with pytest.raises(InputError, match="'float32'; 3 bytes go into one of uint8$"):
        Linear4bit.quantize(torch.zeros(2, 3), None, settings(bnb_4bit_quant_storage="float32"))


STATE = "weight.quant_state.bitsandbytes__nf4"


def told(**changed: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        content = {**json.loads(bytes(tensors[STATE].tolist())), **changed}
        tensors[STATE] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return change


def put(name: str, tensor: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor(tensors[name])})


def spoil(at: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.clone()
        found.view(-1)[at] = value
        return found

    return change


MALFORMED: dict[str, tuple[bool, Callable[[Tensors], Any], str]] = {
    "no state": (False, lambda t: t.pop(STATE), "no weight.quant_state"),
    "two states": (False, lambda t: t.update({STATE[:-3] + "fp4": t[STATE]}), "exactly one of"),
    "unknown state": (False, lambda t: t.update({STATE[:-3] + "int4": t.pop(STATE)}), "exactly one of"),
    "no JSON": (False, put(STATE, lambda t: t[:-3]), "not a JSON object"),
    "no object": (False, put(STATE, lambda t: torch.tensor([91, 93], dtype=torch.uint8)), "not a JSON object"),
    "no text": (False, put(STATE, lambda t: t.float() + 0.5), "not a JSON object"),
    "kind": (False, told(quant_type="fp4"), "quant_type is 'fp4'; it must be 'nf4', as its name says"),
    "block": (False, told(blocksize=100), "blocksize is 100; it must be one of 32, 64"),
    "dtype": (False, told(dtype="int8"), "dtype is 'int8'"),
    "shape": (False, told(shape=[96, 6]), r"shape is \[96, 6\]; it must be \[6, 96\]"),
    "other block": (False, told(blocksize=128), r"weight.absmax is torch.float32 \(9,\); torch.float32 \(5,\)"),
    "no weight": (False, lambda t: t.pop("weight"), r"weight is missing; torch.uint8 \(288, 1\)"),
    "truncated": (False, put("weight", lambda t: t[:-1]), r"weight is torch.uint8 \(287, 1\)"),
    "weight dtype": (False, put("weight", lambda t: t.int()), r"weight is torch.int32"),
    "no absmax": (False, lambda t: t.pop("weight.absmax"), "weight.absmax is missing"),
    "absmax dtype": (False, put("weight.absmax", lambda t: t.half()), "weight.absmax is torch.float16"),
    "absmax NaN": (False, put("weight.absmax", spoil(3, math.nan)), "weight.absmax holds NaN"),
    "absmax negative": (False, put("weight.absmax", spoil(0, -1.0)), "weight.absmax holds NaN, inf or values below 0"),
    "table": (False, put("weight.quant_map", spoil(4, 0.5)), "weight.quant_map is not the table of nf4"),
    "table NaN": (False, put("weight.quant_map", spoil(4, math.nan)), "weight.quant_map is not the table of nf4"),
    "stray": (False, lambda t: t.update({"weight.extra": t["weight"]}), "weight.extra is no part of nf4"),
    "nested without": (True, lambda t: t.pop("weight.nested_absmax"), "weight.nested_absmax is missing"),
    "nested absmax": (True, put("weight.nested_absmax", spoil(0, math.inf)), "weight.nested_absmax holds NaN, inf"),
    "nested map": (True, put("weight.nested_quant_map", spoil(9, math.nan)), "outside \\[-1, 1\\]"),
    "nested block": (True, told(nested_blocksize=0), "nested_blocksize is 0; it must be a number of blocks"),
    "nested dtype": (True, told(nested_dtype="float16"), "nested_dtype is 'float16'"),
    "nested offset": (True, told(nested_offset=math.nan), "nested_offset is nan; it must be a finite number"),
    "nested offset text": (True, told(nested_offset="1"), "nested_offset is '1'"),
    "nested as plain": (True, put("weight.absmax", lambda t: t.float()), "weight.absmax is torch.float32"),
    "plain as nested": (False, told(nested_blocksize=256, nested_offset=0.1, nested_dtype="float32"), "torch.uint8"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(name: str) -> None:
    double, damage, message = MALFORMED[name]
    tensors = dict(layer(double=double).packed)
    Linear4bit.from_file(dict(tensors), (6, 96), None, settings())
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        Linear4bit.from_file(tensors, (6, 96), None, settings())


def test_tables_are_normalised() -> None:
    assert max(FP4) == max(NF4) == 1 and min(FP4) == min(NF4) == -1
