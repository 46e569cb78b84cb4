"""Interchange with transformers, both directions, and with the safetensors package."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llama2.classifiers import LlamaForSequenceClassification
from llama2.config import LlamaConfig
from llama2.model import LlamaForCausalLM, LlamaModel

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "wide heads, biases": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}
IDS = torch.tensor([[1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 2, 3]])


def config(**fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": 43,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        **fields,
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", ["5GB", "9KB"])
def test_transformers_loads_ours(tmp_path: Path, shape: str, size: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = LlamaForCausalLM(LlamaConfig(**config(initializer_range=0.3, **SHAPES[shape]))).eval()
    ours.save_pretrained(tmp_path, max_shard_size=size)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", ["5GB", "9KB"])
def test_we_load_theirs(tmp_path: Path, shape: str, size: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config(initializer_range=0.3, **SHAPES[shape]))
    ).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    ours, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=2e-5)


def test_classifier_both_ways(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = LlamaForSequenceClassification(LlamaConfig(**config(num_labels=3, pad_token_id=0))).eval()
    ours.save_pretrained(tmp_path / "a")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=0, atol=2e-5)
    theirs.save_pretrained(tmp_path / "b")
    again = LlamaForSequenceClassification.from_pretrained(tmp_path / "b")
    assert torch.equal(again.score.weight, ours.score.weight) and again.config.num_labels == 3


def test_base_model_both_ways(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaModel(transformers.LlamaConfig(**config())).eval()
    theirs.save_pretrained(tmp_path)
    ours = LlamaModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).last_hidden_state, theirs(IDS).last_hidden_state, rtol=0, atol=2e-5)


def test_same_choice_of_dtype(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    LlamaForCausalLM(LlamaConfig(**config())).half().save_pretrained(tmp_path)
    for dtype in (None, "auto", "bfloat16", torch.float32):
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto")
        ours = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert ours.dtype == theirs.dtype
        assert ours.config.dtype == theirs.config.dtype


def test_safetensors_package_reads_ours(tmp_path: Path) -> None:
    safe_open = pytest.importorskip("safetensors").safe_open
    model = LlamaForCausalLM(LlamaConfig(**config()))
    mixed = {**model.state_dict(), "odd": torch.arange(3, dtype=torch.int8), "half": torch.ones(5).half()}
    model.save_pretrained(tmp_path, state_dict=mixed)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(mixed)
        for name, tensor in mixed.items():
            assert torch.equal(file.get_tensor(name), tensor), name


def test_smollm2_equals_transformers(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    ours = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.tensor([[1, 4093, 198, 1780, 416, 260, 2240, 282, 4649]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=2e-4)
