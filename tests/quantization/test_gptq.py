"""GPTQ's packing, layer and grid: bytes by hand, exact round trips, files that cannot be right."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llama2.errors import CheckpointError, InputError
from llama2.quantization.gptq import GptqLinear, format_of, grid_of, pack, pack_zeros, unpack, unpack_zeros
from llama2.quantization.gptq_solver import solve
from llama2.quantization.integer_grid import IntegerGrid
from llama2.quantization_config import GPTQConfig

BITS = (2, 3, 4, 8)


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def by_bits(codes: list[int], bits: int) -> list[int]:
    """Words of 32 codes as one little-endian stream of bits, written with Python integers."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    return [signed(stream >> (32 * i) & 0xFFFFFFFF) for i in range(bits)]


# -- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_words_are_a_stream_of_bits(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (2 * bits, 5)
    for column in range(5):
        wanted = [word for start in (0, 32) for word in by_bits(codes[start : start + 32, column].tolist(), bits)]
        assert words[:, column].tolist() == wanted
    assert torch.equal(unpack(words, bits), codes.int())
    anything = torch.randint(-(1 << 31), 1 << 31, (4 * bits, 3), dtype=torch.int64).int()
    assert torch.equal(pack(unpack(anything, bits), bits), anything)


def test_words_by_hand() -> None:
    # 4 bits: input j of eight lies at bit 4j. 3 bits: v10 = 0b110 lies at bits 30, 31 (10) and 0 of the next word (1).
    assert pack(torch.arange(8).repeat(4)[:, None], 4)[:, 0].tolist() == [0x76543210] * 4
    codes = torch.zeros(32, 1, dtype=torch.int64)
    codes[10], codes[21] = 0b110, 0b101
    assert pack(codes, 3)[:, 0].tolist() == [signed(0b10 << 30), signed(1 | 1 << 31), 0b10]


@pytest.mark.parametrize(("v2", "word"), [(False, 2004318071), (True, -2004318072)])
def test_zeros_of_a_symmetric_weight(v2: bool, word: int) -> None:
    """The words that GPTQModel writes: sevens in v1, eights in v2."""
    zeros = torch.full((3, 32), 8, dtype=torch.int32)
    words = pack_zeros(zeros, 4, v2)
    assert words.shape == (3, 4) and bool((words == word).all())
    assert torch.equal(unpack_zeros(words, 4, v2), zeros)
    assert format_of(words, 4) == ("gptq_v2" if v2 else "gptq")
    words[2, 1] += 1
    assert format_of(words, 4) is None


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_round_trip(bits: int, v2: bool) -> None:
    low = 0 if v2 else 1
    zeros = torch.randint(low, 1 << bits, (7, 64), generator=torch.Generator().manual_seed(bits)).int()
    assert torch.equal(unpack_zeros(pack_zeros(zeros, bits, v2), bits, v2), zeros)


def test_a_zero_of_v1_that_borrowed() -> None:
    """GPTQModel's v1 word of zeros [0, 8, 8, ...]: 0x88888880 - 0x11111111 = 0x7777776f. Ours refuses to write one."""
    word = torch.tensor([[0x7777776F] + [0x77777777] * 3], dtype=torch.int32)
    assert unpack_zeros(word, 4, False)[0].tolist() == [0] + [8] * 31
    with pytest.raises(InputError, match="a zero is 0.*gptq_v2"):
        pack_zeros(torch.zeros(1, 32, dtype=torch.int32), 4, False)


# -- the layer ---------------------------------------------------------------------------------------------------


def weight(rows: int = 64, columns: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def by_definition(layer: GptqLinear) -> Tensor:
    """w[n, k] = scale[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]), one number at a time."""
    codes, zeros = layer.codes()
    scales, g_idx = layer.packed["scales"].double(), layer.packed["g_idx"].tolist()
    out = torch.empty(layer.out_features, layer.in_features, dtype=torch.float64)
    for k, g in enumerate(g_idx):
        for n in range(layer.out_features):
            out[n, k] = scales[g, n] * (int(codes[k, n]) - int(zeros[g, n]))
    return out


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
def test_nearest_values(bits: int, form: str, sym: bool) -> None:
    config, w = GPTQConfig(bits=bits, group_size=32, sym=sym, format=form), weight()
    w[5] = w[5].abs()  # its zero would be 0
    w[6, :32] = 0
    layer = GptqLinear.quantize(w, None, config)
    found = layer.dequantize()
    assert (found - by_definition(layer)).abs().max() < 1e-7
    assert (found - w).abs().max() < 0.6 / (1 << bits) and not found[6, :32].any()
    again = GptqLinear.from_file(layer.packed, (64, 96), None, config)
    assert torch.equal(again.dequantize(), found)
    codes, zeros = layer.codes()
    assert torch.equal(pack(codes, bits), layer.packed["qweight"])
    assert torch.equal(pack_zeros(zeros, bits, form == "gptq_v2"), layer.packed["qzeros"])
    assert layer.in_order and layer.nbytes == sum(t.nbytes for t in layer.packed.values())


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize(("act_order", "static"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("sym", [True, False])
def test_solution_packs_without_loss(sym: bool, act_order: bool, static: bool, group: int) -> None:
    w, x = weight(), torch.randn(400, 96, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 97)
    config = GPTQConfig(bits=4, group_size=group, sym=sym, desc_act=act_order, static_groups=static)
    grid = grid_of(config, 96)
    found = solve(w, 2 / 400 * x.T @ x, grid, act_order=act_order, static_groups=static)
    layer = GptqLinear.of_solution(found, None, config)
    assert torch.equal(layer.dequantize(), found.weight)
    assert layer.in_order == (not act_order or static or group == -1)
    GptqLinear.from_file(layer.packed, (64, 96), None, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(dtype: torch.dtype) -> None:
    config = GPTQConfig(bits=4, group_size=32)
    layer = GptqLinear.quantize(weight(), None, config)
    tensors = {**layer.packed, "scales": layer.packed["scales"].to(dtype)}
    other = GptqLinear.from_file(tensors, (64, 96), None, config)
    assert other.packed["scales"].dtype == dtype
    assert (other.dequantize() - by_definition(other)).abs().max() < 1e-7


def broken(name: str, change: Any) -> Any:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name].clone())

    return apply


def put(at: tuple[int, ...], value: float) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor[at] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("qzeros"), r"qzeros is missing; .*int32 \(3, 8\)"),
        (broken("qweight", lambda t: t[:-1]), r"qweight is torch.int32 \(11, 64\); .*\(12, 64\) is needed for 4 bits"),
        (broken("qweight", lambda t: t.long()), r"qweight is torch.int64"),
        (broken("scales", lambda t: t.double()), r"scales is torch.float64"),
        (broken("scales", lambda t: t[:2]), r"scales is torch.float16 \(2, 64\)"),
        (broken("scales", put((1, 3), float("nan"))), r"scales hold nan"),
        (broken("scales", put((1, 3), float("inf"))), r"scales hold inf"),
        (broken("g_idx", put((95,), 3)), r"g_idx holds 3; groups are 0\.\.2"),
        (broken("g_idx", put((0,), -1)), r"g_idx holds -1"),
        (broken("qzeros", lambda t: t + 0x11111111), r"zeros are those of format 'gptq_v2' and .* says 'gptq'"),
        (lambda t: t.update(perm=t["g_idx"]), r"perm is no part of a GPTQ linear"),
    ],
)
def test_files_that_cannot_be_right(change: Any, message: str) -> None:
    config = GPTQConfig(bits=4, group_size=32)
    tensors = dict(GptqLinear.quantize(weight(), None, config).packed)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        GptqLinear.from_file(tensors, (64, 96), None, config)


def test_version_flag_of_v2_on_zeros_of_v1() -> None:
    tensors = GptqLinear.quantize(weight(), None, GPTQConfig(bits=3, group_size=32)).packed
    with pytest.raises(CheckpointError, match="those of format 'gptq' and the configuration says 'gptq_v2'"):
        GptqLinear.from_file(tensors, (64, 96), None, GPTQConfig(bits=3, group_size=32, format="gptq_v2"))


@pytest.mark.parametrize("shape", [(64, 40), (40, 64)])
def test_widths_that_do_not_pack(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="pack 32 of each at a time"):
        GptqLinear.quantize(torch.ones(shape), None, GPTQConfig(bits=4, group_size=-1))
    with pytest.raises(CheckpointError, match="packs multiples of 32"):
        GptqLinear.from_file({}, shape, None, GPTQConfig(bits=4))


# -- the grid ----------------------------------------------------------------------------------------------------


def test_scales_by_hand() -> None:
    """sym: 2 max / 15. asym from -3 to 12: scale 1, zero 3. All positive in v1: zero 1, scale 14 / 14."""
    one = torch.ones(4)
    sym = IntegerGrid(4, 4).fit(torch.tensor([[0.0, 7.5, 3.0, 1.0]]), one)
    assert (sym.scale.item(), sym.zero.item(), sym.low, sym.high) == (1.0, 8, -8, 7)
    rows = torch.tensor([[-3.0, 12.0, 0.0, 1.0], [14.0, 3.0, 2.0, 1.0]])
    asym = IntegerGrid(4, 4, sym=False, low=1).fit(rows, one)
    assert asym.scale.tolist() == [1.0, 1.0] and asym.zero.tolist() == [3, 1]
    assert torch.equal(asym.nearest(rows.clone(), 1), rows)
    v2 = IntegerGrid(4, 4, sym=False).fit(torch.tensor([[15.0, 3.0, 2.0, 1.0]]), one)
    assert (v2.scale.item(), v2.zero.item()) == (1.0, 0)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_search_lowers_the_weighted_error(bits: int, sym: bool) -> None:
    w, importance = weight(200, 64, seed=2), torch.rand(64, generator=torch.Generator().manual_seed(3)).mul(4).exp()

    def cost(grid: IntegerGrid) -> Tensor:
        found = grid.fit(w, importance)
        assert torch.equal(found.scale, found.scale.half().float()) and bool((found.scale > 0).all())
        return (found.nearest(w.clone(), 1) - w).square() @ importance

    plain, searched = cost(IntegerGrid(64, bits, sym)), cost(IntegerGrid(64, bits, sym, search=True))
    assert bool((searched <= plain).all()) and searched.sum() < 0.97 * plain.sum()


def test_extreme_weights_keep_scales_in_their_dtype() -> None:
    w = torch.tensor([[1e-9, -1e-9], [3e6, 1.0], [0.0, 0.0]])
    for search in (False, True):
        found = IntegerGrid(2, 4, search=search).fit(w, torch.ones(2))
        assert bool(found.scale.isfinite().all() & (found.scale > 0).all())


def test_column_by_column_equals_the_whole() -> None:
    w, grid = weight(48, 32, seed=4), IntegerGrid(32, 4, sym=False)
    steps = grid.fit(w, torch.ones(32))
    columns = torch.stack([grid.round(w[:, i].clone(), steps, i) for i in range(32)], 1)
    assert torch.equal(columns, steps.nearest(w.clone(), 1))
