"""torchao's quantize_ over these models: its tensors are run by torch, in generate() too."""

from pathlib import Path
from typing import Any

import torch
from product import IDS, demo, greedy, llama2, tiny_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def _int8(model: Any, ids: torch.Tensor) -> None:
    plain = model(ids).logits
    quantize_(model, Int8WeightOnlyConfig())
    changed = model(ids).logits
    difference = float((changed - plain).norm() / plain.norm())
    assert 0 < difference < 0.1, difference
    assert torch.equal(greedy(model, ids), greedy(model, ids, runner="torch"))


def case_int8(folder: Path) -> None:
    _int8(tiny_model(torch.float32), IDS)


def case_int8_of_the_demo_model(folder: Path) -> None:
    model, tokenizer = demo()
    _int8(model, tokenizer("The sky is", return_tensors="pt")["input_ids"])


def case_native_engine_says_no(folder: Path) -> None:
    model = tiny_model(torch.float32)
    quantize_(model, Int8WeightOnlyConfig())
    try:
        greedy(model, runner="native")
    except llama2.InputError:
        return
    raise AssertionError("the native engine took a tensor of torchao's")
