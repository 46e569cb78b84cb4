"""Int8 rows: bytes by hand, what a file may not hold."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama2.errors import CheckpointError, InputError
from llama2.quantization.int8 import Linear8bit

Tensors = dict[str, torch.Tensor]


def test_bytes_by_hand() -> None:
    # 127 steps to the largest magnitude of a row: 2 / 127 each, so 1 is 63.5 steps, which rounds to the even 64.
    made = Linear8bit.quantize(torch.tensor([[2.0, 1.0, -2.0, 0.01], [0.0, 0.0, 0.0, 0.0]]), None, None)
    assert made.packed["weight"].tolist() == [[127, 64, -127, 1], [0, 0, 0, 0]]
    assert made.packed["SCB"].tolist() == [2.0, 0.0] and int(made.packed["weight_format"]) == 0
    assert made.dequantize()[0].tolist() == pytest.approx([2.0, 128 / 127, -2.0, 2 / 127])
    assert made.dequantize()[1].tolist() == [0, 0, 0, 0]


def test_packed_unpacked_packed() -> None:
    made = Linear8bit.quantize(torch.randn(40, 100), None, None)
    again = Linear8bit.quantize(made.dequantize(), None, None)
    assert torch.equal(made.packed["weight"], again.packed["weight"])


def test_outliers_of_the_activations_are_not_rounded() -> None:
    made, x = Linear8bit.quantize(torch.randn(16, 96), None, None), torch.randn(4, 96)
    x[:, 17] = 80.0  # far above the threshold of 6
    wanted = x.double() @ made.dequantize().double().T
    assert (made(x) - wanted).norm() / wanted.norm() < 1e-6


MALFORMED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no scales": (lambda t: t.pop("SCB"), r"SCB is missing; torch.float32 \(6,\) is needed"),
    "shape": (lambda t: t.update(weight=t["weight"].T), r"weight is torch.int8 \(96, 6\); torch.int8 \(6, 96\)"),
    "dtype": (lambda t: t.update(weight=t["weight"].int()), "weight is torch.int32"),
    "scale dtype": (lambda t: t.update(SCB=t["SCB"].bfloat16()), "SCB is torch.bfloat16"),
    "truncated": (lambda t: t.update(weight=t["weight"][:5]), r"weight is torch.int8 \(5, 96\)"),
    "NaN": (lambda t: t["SCB"].__setitem__(2, math.nan), "SCB holds NaN, inf"),
    "negative": (lambda t: t["SCB"].__setitem__(2, -1.0), "values below 0"),
    "order": (lambda t: t.update(weight_format=torch.tensor(3, dtype=torch.uint8)), "weight_format is 3; only 0"),
    "order of another shape": (lambda t: t.update(weight_format=torch.zeros(2)), "weight_format has 2 values"),
    "stray": (lambda t: t.update(absmax=t["SCB"]), "absmax is no part of int8 rows"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(name: str) -> None:
    damage, message = MALFORMED[name]
    tensors = dict(Linear8bit.quantize(torch.randn(6, 96), None, None).packed)
    Linear8bit.from_file(tensors, (6, 96), None, None)
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        Linear8bit.from_file(tensors, (6, 96), None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 7e4])
def test_wrong_weights(bad: float) -> None:
    weight = torch.zeros(4, 8)
    weight[2, 3] = bad
    with pytest.raises(InputError, match="above 65504"):
        Linear8bit.quantize(weight, None, None)
