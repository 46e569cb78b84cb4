"""torchao's quantize_ over these models: its tensors are run by torch, in generate() too."""

from pathlib import Path
from typing import Any

import torch
from product import IDS, demo, greedy, llama2, tiny_model
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
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


def case_int4_weight_only(folder: Path) -> None:
    """The class for CPUs: the four layouts of Int4WeightOnlyConfig need a GPU, or mslk. 16 divides what it packs."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 112}
    model, plain = tiny_model(torch.float32, **sizes), tiny_model(torch.float32, **sizes)
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            rounded = layer(torch.eye(layer.in_features)).T
            weight = plain.get_submodule(path).weight
            assert 0 < float((rounded - weight).norm() / weight.norm()) < 0.15, path
            weight.data.copy_(rounded)
    want = plain(IDS).logits
    assert float((model(IDS).logits - want).norm() / want.norm()) < 0.02  # its products are bfloat16's
    assert torch.equal(greedy(model), greedy(model, runner="torch"))
