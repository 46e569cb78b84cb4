"""Quantised weights to other block types: on demand only, and with the loss measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.test_legacy import ggml
from tiny import tiny_model

import llama2.checkpoint as checkpoint
from llama2 import BitsAndBytesConfig, GPTQConfig, LlamaForCausalLM
from llama2.checkpoint import convert as conversion
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def _columns_of_256(folder: Path) -> Path:
    model = tiny_model(torch.float32, hidden_size=256, intermediate_size=256)
    model.save_pretrained(folder)
    return folder


def test_quantised_weights_are_quantised_again_on_demand_only(tmp_path: Path) -> None:
    source = _columns_of_256(tmp_path / "hf")
    convert(source, tmp_path / "a.gguf", ConversionSettings("gguf", dtype="q4_1"))
    again = ConversionSettings("gguf", dtype="q4_k_m")
    with pytest.raises(InputError, match=r"15 matrices of .*a.gguf are quantised already \(Q4_1\).*--requantize"):
        convert(tmp_path / "a.gguf", tmp_path / "b.gguf", again)
    assert not (tmp_path / "b.gguf").exists()
    made = convert(tmp_path / "a.gguf", tmp_path / "b.gguf", replace(again, requantize=True))
    before, after = checkpoint.open(tmp_path / "a.gguf"), checkpoint.open(tmp_path / "b.gguf")
    names = [name for name in before.tensors if before.tensors[name].type == "Q4_1" != after.tensors[name].type]
    wide = {name: (before.read(name).double(), after.read(name).double()) for name in names}
    moved = {name: float((b - a).norm() / a.norm()) for name, (a, b) in wide.items()}
    whole = sum(float((b - a).square().sum()) for a, b in wide.values())
    found = made.requantized
    assert found is not None and sum(found["kinds"].values()) == len(names) == 15
    assert found["error"] == pytest.approx((whole / sum(float(a.square().sum()) for a, _ in wide.values())) ** 0.5)
    assert found["worst"][1] == pytest.approx(max(moved.values())) and 0.005 < found["error"] < 0.2
    same = convert(tmp_path / "b.gguf", tmp_path / "c.gguf", again)  # every block is copied
    assert same.requantized is None
    assert convert(source, tmp_path / "d.gguf", again).requantized is None
    assert convert(tmp_path / "a.gguf", tmp_path / "f.gguf", ConversionSettings("gguf", dtype="float16")).bytes
    with pytest.raises(InputError, match="requantize is for gguf and its block types, not for hf keep"):
        convert(tmp_path / "a.gguf", tmp_path / "e", ConversionSettings(requantize=True))


@pytest.mark.parametrize("config, name", [(GPTQConfig(group_size=32), "GPTQ"), (NF4, "NF4"), ("ggml", "Q4_0")])
def test_what_counts_as_quantised(tmp_path: Path, config: Any, name: str) -> None:
    """Folders that pack their linears, and files before GGUF, though they are read as floats."""
    if config == "ggml":
        source = tmp_path / "old.bin"
        ggml(source, "ggjt", 3, "Q4_0")
    else:
        source = tmp_path / "packed"
        model = LlamaForCausalLM.from_pretrained(_columns_of_256(tmp_path / "hf"), quantization_config=config)
        model.save_pretrained(source)
    with pytest.raises(InputError, match=rf"quantised already \({name}\)"):
        convert(source, tmp_path / "x.gguf", ConversionSettings("gguf", dtype="q8_0"))
    convert(source, tmp_path / "y.gguf", ConversionSettings("gguf"))
    assert convert(source, tmp_path / "z.gguf", ConversionSettings("gguf", dtype="q8_0", requantize=True)).requantized


def test_the_loss_of_an_interrupted_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first run measured is in the sum of the second."""
    convert(_columns_of_256(tmp_path / "hf"), tmp_path / "a.gguf", ConversionSettings("gguf", dtype="q4_1"))
    again = ConversionSettings("gguf", dtype="q4_k_m", requantize=True)
    whole = convert(tmp_path / "a.gguf", tmp_path / "b.gguf", again).requantized
    monkeypatch.setattr(conversion, "SYNC_BYTES", 1)

    def stop(done: int, total: int, name: str) -> None:
        if "layers.1.mlp.up" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "a.gguf", tmp_path / "c.gguf", again, stop)
    resumed = convert(tmp_path / "a.gguf", tmp_path / "c.gguf", again)
    assert resumed.resumed_bytes and resumed.requantized == whole
