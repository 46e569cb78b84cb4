"""GGUF blocks: values worked out by hand, then bit equality with the gguf package on random bytes."""

import struct

import pytest
import torch

from llama2.errors import CheckpointError, InputError
from llama2.quantization.ggml import TYPES, block_type, dequantize


def half(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}e", *values)


def put(size: int, **at: int) -> bytes:
    """`size` zero bytes with some set: put(4, b2=7) -> 00 00 07 00."""
    data = bytearray(size)
    for key, value in at.items():
        data[int(key[1:])] = value
    return bytes(data)


# Scales of Q4_K and Q5_K: byte 0 = 0b01_000010: scale 0 is 2, top pair of scale 4 is 1. Byte 1: scale 1 is 4.
# Byte 4: minimum 0 is 1. Byte 8 = 0x7F: scale 4 is 16 + 15 = 31, minimum 4 is 7.
SCALES = put(12, b0=0x42, b1=4, b4=1, b8=0x7F)

HAND = {
    "F32": (struct.pack("<f", -1.5), {0: -1.5}),
    "F16": (half(0.25), {0: 0.25}),
    "BF16": (b"\x80\x3f", {0: 1.0}),
    # d = 0.5; codes -2, 3, 0, ...
    "Q8_0": (half(0.5) + put(32, b0=0xFE, b1=3), {0: -1.0, 1: 1.5, 2: 0.0}),
    # d = 2; byte 0 = 0x9F: weight 0 is (15 - 8) * 2, weight 16 is (9 - 8) * 2; a zero byte is -8 twice
    "Q4_0": (half(2) + put(16, b0=0x9F), {0: 14.0, 16: 2.0, 1: -16.0, 31: -16.0}),
    # d = 2, m = -1; byte 0 = 0x31: 2 * 1 - 1 and 2 * 3 - 1
    "Q4_1": (half(2, -1) + put(16, b0=0x31), {0: 1.0, 16: 5.0, 1: -1.0}),
    # d = 1; fifth bits of weights 0 and 17; 0x2F: (15 + 16) - 16, 2 - 16; 0x50: 0 - 16, (5 + 16) - 16
    "Q5_0": (half(1) + put(4, b0=1, b2=2) + put(16, b0=0x2F, b1=0x50), {0: 15.0, 16: -14.0, 1: -16.0, 17: 5.0}),
    # the same codes with d = 2, m = 0.5
    "Q5_1": (half(2, 0.5) + put(4, b0=1, b2=2) + put(16, b0=0x2F, b1=0x50), {0: 62.5, 16: 4.5, 1: 0.5, 17: 42.5}),
    # d = 1, dmin = 0.5; scale | minimum << 4 of groups 0, 2, 4; codes 0, 1, 2, 3 in one byte, 32 weights apart
    "Q2_K": (
        put(16, b0=0x21, b2=0x03, b4=0x15) + put(64, b0=0b11100100) + half(1, 0.5),
        {0: -1.0, 32: 3.0, 64: 5 * 2 - 0.5, 96: 0.0},
    ),
    # d = 0.5; scale 0 = (3 | 2 << 4) - 32 = 3, scale 8 = 0 - 32. Weight 0: code 2, mask bit set; weight 1: code 1 - 4;
    # weight 128: code 1 - 4 with scale -32
    "Q3_K": (
        put(32, b0=1) + put(64, b0=2, b1=1, b32=1) + put(12, b0=0x03, b8=0x02) + half(0.5),
        {0: 3.0, 1: -4.5, 128: 48.0},
    ),
    # d = dmin = 1. Weight 0: 2 * 3 - 1; weight 32: 4 * 5; weight 128: 31 * 2 - 7
    "Q4_K": (half(1, 1) + SCALES + put(128, b0=0x53, b64=0x02), {0: 5.0, 32: 20.0, 128: 55.0, 255: 0.0}),
    # the same with fifth bits of weight 0 (bit 0) and weight 128 (bit 4): 2 * 19 - 1, 31 * 18 - 7
    "Q5_K": (
        half(1, 1) + SCALES + put(32, b0=0b10001) + put(128, b0=0x53, b64=0x02),
        {0: 37.0, 32: 20.0, 128: 551.0},
    ),
    # d = 0.5, scales 0 and 4 are 2 and -1. Weight 0: (1 | 3 << 4) - 32 = 17; weight 64: 2 - 32 = -30
    "Q6_K": (put(128, b0=0x21) + put(64, b0=3) + put(16, b0=2, b4=0xFF) + half(0.5), {0: 17.0, 64: 15.0}),
    # d = 1. Codes 0 and 15 of the table are -127 and 113
    "IQ4_NL": (half(1) + put(16, b0=0xF0), {0: -127.0, 1: -127.0, 16: 113.0}),
    # d = 1, the first scale is (1 | 2 << 4) - 32 = 1
    "IQ4_XS": (half(1) + put(2, b0=2) + put(4, b0=1) + put(128, b0=0xF0), {0: -127.0, 16: 113.0}),
    # Point 0 is eight times 8; signs 1 with their parity are bits 0 and 7; scale (0.5 + 1) / 4
    "IQ2_XXS": (half(1) + put(64, b4=0x81, b7=0x10), {0: -3.0, 1: 3.0, 7: -3.0}),
    # The same, scale 0.5 / 4
    "IQ2_XS": (half(1) + put(64, b1=2) + put(8), {0: -1.0, 1: 1.0, 7: -1.0}),
    "IQ2_S": (half(1) + put(32) + put(32, b0=1) + put(16), {0: -1.0, 1: 1.0, 7: 1.0}),
    # Point 0 is four times 4; scale (0.5 + 1) / 2
    "IQ3_XXS": (half(1) + put(64) + put(32, b0=0x81, b3=0x10), {0: -3.0, 1: 3.0, 7: -3.0}),
    # Point 0 is four times 1; scale 1 + 2
    "IQ3_S": (half(1) + put(64) + put(8) + put(32, b0=1) + put(4, b0=1), {0: -3.0, 1: 3.0}),
    # Point 0 is eight times -1; an eighth more, and in the second run an eighth less; d = 8
    "IQ1_S": (half(8) + put(32) + put(16, b3=0x80), {0: -7.0, 32: -9.0}),
    # d = 8 = 0x4800 in the top nibbles of the four scales; bit 3 of the first nibble: an eighth less
    "IQ1_M": (put(32) + put(16, b0=8) + put(8, b5=0x80, b7=0x40), {0: -9.0, 8: -7.0}),
    # Digits of 0xFF are 2, of 0 are 0, and 1 is taken off
    "TQ1_0": (put(52, b0=0xFF) + half(1), {0: 1.0, 1: -1.0, 32: 1.0}),
    "TQ2_0": (put(64, b0=0xE4) + half(1), {0: -1.0, 32: 0.0, 64: 1.0, 96: 2.0}),
    # 2^(128 - 127); codes 10 and 7 are -1 and 6
    "MXFP4": (put(17, b0=0x80, b1=0x7A), {0: -2.0, 16: 12.0}),
    # 0x38 is 1; codes 2 and 3 are 1 and 1.5
    "NVFP4": (put(36, b0=0x38, b4=0x32), {0: 1.0, 8: 1.5}),
}


def packed(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def test_every_type_has_a_hand_written_block() -> None:
    assert set(HAND) == set(TYPES)


@pytest.mark.parametrize("name", HAND)
def test_hand_written_block(name: str) -> None:
    data, expected = HAND[name]
    assert len(data) == TYPES[name].bytes
    weights = dequantize(packed(data), name)
    assert weights.shape == (TYPES[name].weights,)
    assert {k: weights[k].item() for k in expected} == expected


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q6_K"])
def test_rows_decode_independently_and_keep_their_shape(name: str) -> None:
    block = TYPES[name]
    rows = torch.randint(0, 60, (5, 3 * block.bytes), dtype=torch.uint8)
    whole = dequantize(rows, name)
    assert whole.shape == (5, 3 * block.weights)
    torch.testing.assert_close(whole[3], dequantize(rows[3], block.id), rtol=0, atol=0, equal_nan=True)
    order = torch.tensor([4, 0, 3, 1, 2])
    torch.testing.assert_close(dequantize(rows[order], name), whole[order], rtol=0, atol=0, equal_nan=True)


def test_chunks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(0, 60, (9, 34), dtype=torch.uint8)
    whole = dequantize(rows, "Q8_0")
    monkeypatch.setattr("llama2.quantization.ggml._CHUNK", 64)
    monkeypatch.setattr("llama2.quantization.ggml.kernels", lambda: None)  # torch's own way
    # what no chunk writes must not be yesterday's values by chance
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: torch.full(shape, torch.nan, **kwargs))
    assert torch.equal(dequantize(rows, "Q8_0"), whole)


def test_dtype_rounds_once() -> None:
    rows = packed(half(0.1) + bytes(range(32)))
    assert torch.equal(dequantize(rows, "Q8_0", torch.bfloat16), dequantize(rows, "Q8_0").to(torch.bfloat16))


def test_dense_types_are_views_where_aligned() -> None:
    rows = torch.zeros(2, 8, dtype=torch.uint8)
    assert dequantize(rows, "F32").data_ptr() == rows.data_ptr()
    odd = torch.zeros(9, dtype=torch.uint8)[1:]
    assert dequantize(odd, "F16", torch.float16).tolist() == [0.0] * 4


def test_refusals() -> None:
    with pytest.raises(CheckpointError, match="Q8_K is not supported; supported are F32"):
        block_type(15)
    with pytest.raises(CheckpointError, match="999"):
        block_type(999)
    with pytest.raises(CheckpointError, match="48 weights cannot be stored as Q8_0"):
        TYPES["Q8_0"].row_bytes(48)
    with pytest.raises(InputError, match="multiple of 34"):
        dequantize(torch.zeros(33, dtype=torch.uint8), "Q8_0")


@pytest.mark.parity
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales include NaN and infinity
def test_bit_equal_to_gguf(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (TYPES[name].weights, TYPES[name].bytes)
    assert TYPES[name].id == kind.value
    rows = torch.randint(0, 256, (200, TYPES[name].row_bytes(512)), dtype=torch.uint8)
    expected = torch.from_numpy(gguf.quants.dequantize(rows.numpy(), kind)).float()
    ours = dequantize(rows, name)
    same = ours.view(torch.int32) == expected.view(torch.int32)
    assert bool((same | (ours.isnan() & expected.isnan())).all())
