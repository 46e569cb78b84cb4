"""bitsandbytes' layers in the place of these models' linears: torch runs them, in generate() too."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from product import IDS, demo, greedy, llama2, tiny_model


def _swapped(model: Any, bits: int) -> Any:
    for path, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and not path.endswith("lm_head"):
            size = (layer.in_features, layer.out_features)
            if bits == 4:
                new: Any = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            model.set_submodule(path, new)
    return model.to("cpu")


def _check(model: Any, ids: torch.Tensor, bits: int) -> None:
    plain = model(ids).logits
    model = _swapped(model, bits)
    difference = float((model(ids).logits - plain).norm() / plain.norm())
    assert 0 < difference < (0.5 if bits == 4 else 0.1), difference
    assert torch.equal(greedy(model, ids), greedy(model, ids, runner="torch"))


def case_4bit(folder: Path) -> None:
    _check(tiny_model(torch.float32), IDS, 4)


def case_8bit(folder: Path) -> None:
    _check(tiny_model(torch.float32), IDS, 8)


def case_4bit_of_the_demo_model(folder: Path) -> None:
    model, tokenizer = demo()
    _check(model, tokenizer("The sky is", return_tensors="pt")["input_ids"], 4)


def case_native_engine_says_no(folder: Path) -> None:
    try:
        greedy(_swapped(tiny_model(torch.float32), 4), runner="native")
    except llama2.InputError:
        return
    raise AssertionError("the native engine took a layer of bitsandbytes'")
