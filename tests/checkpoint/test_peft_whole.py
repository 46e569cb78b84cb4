"""What adapters bring besides A and B of the layers: embeddings, heads, rows of them, biases; and on AutoModel.

Names and meanings are peft 0.21's (tests/checkpoint/test_peft_parity.py compares with peft itself): what changes one
of a tied embedding and head leaves the other as the model has it, but rows of trainable_token_indices go into both.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.adapter_files import tensors_for, write_adapter
from tiny import tiny_ids, tiny_model

from llama2 import AutoModel, AutoModelForSequenceClassification, LlamaForCausalLM, LlamaModel, cpu
from llama2.architecture import EMBEDDING, HEAD
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.merge import merge_into
from llama2.checkpoint.peft import load_adapter, save_adapter
from llama2.checkpoint.peft_adapter import read_adapter
from llama2.errors import CheckpointError, MismatchError
from llama2.runners.native import NativeModel

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")
PREFIX = "base_model.model."
QV = ("q_proj", "v_proj")
V, D, R, SCALE = 97, 64, 4, 2.0  # lora_alpha 8 over rank 4


def drawn(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def base(folder: Path, **changes: Any) -> LlamaForCausalLM:
    model = tiny_model(torch.float32, **changes)
    model.save_pretrained(folder)
    return model


def embedding_pair() -> dict[str, torch.Tensor]:
    stem = f"{PREFIX}model.embed_tokens.lora_embedding_"
    return {f"{stem}A": drawn(R, V), f"{stem}B": drawn(D, R, seed=8)}


def head_pair() -> dict[str, torch.Tensor]:
    return {f"{PREFIX}lm_head.lora_A.weight": drawn(R, D), f"{PREFIX}lm_head.lora_B.weight": drawn(V, R, seed=8)}


WHOLE = {f"{PREFIX}{EMBEDDING}": drawn(V, D), f"{PREFIX}{HEAD}": drawn(V, D, seed=9)}
ROWS = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": drawn(2, D)}
TABLE = SCALE * (drawn(D, R, seed=8) @ drawn(R, V)).T  # what a pair of an embedding adds
ADDED = SCALE * drawn(V, R, seed=8) @ drawn(R, D)  # what a pair of the head adds


def replaced(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.clone()
    rows[[3, 7]] = drawn(2, D)
    return rows


# name -> tensors besides those of q and v, changes of adapter_config.json, and embedding and head that come out
Outcome = Any
KINDS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], Outcome]] = {
    "both whole": (
        WHOLE,
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        lambda e, h: (drawn(V, D), drawn(V, D, seed=9)),
    ),
    "saved by peft itself": (WHOLE, {}, lambda e, h: (drawn(V, D), drawn(V, D, seed=9))),
    "embedding whole": (
        {f"{PREFIX}{EMBEDDING}": drawn(V, D)},
        {"modules_to_save": ["embed_tokens"]},
        lambda e, h: (drawn(V, D), h),
    ),
    "head whole": (
        {f"{PREFIX}{HEAD}": drawn(V, D)},
        {"modules_to_save": ["lm_head"]},
        lambda e, h: (e, drawn(V, D)),
    ),
    "LoRA on both": (
        {**embedding_pair(), **head_pair()},
        {"target_modules": [*QV, "embed_tokens", "lm_head"]},
        lambda e, h: (e + TABLE, h + ADDED),
    ),
    "LoRA over saved base layers": (
        {**embedding_pair(), f"{PREFIX}model.embed_tokens.base_layer.weight": drawn(V, D)},
        {"target_modules": [*QV, "embed_tokens"]},
        lambda e, h: (drawn(V, D) + TABLE, h),
    ),
    "LoRA on the head": (head_pair(), {"target_modules": [*QV, "lm_head"]}, lambda e, h: (e, h + ADDED)),
    "rows": (
        ROWS,
        {"trainable_token_indices": [3, 7]},
        lambda e, h: (replaced(e), replaced(h) if torch.equal(e, h) else h),
    ),
    "rows of both": (
        {**ROWS, f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta": drawn(1, D, seed=5)},
        {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [2]}},
        lambda e, h: (replaced(e), torch.cat((h[:2], drawn(1, D, seed=5), h[3:]))),
    ),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_heads(tmp_path: Path, kind: str, tied: bool) -> None:
    tensors, changes, outcome = KINDS[kind]
    model = base(tmp_path / "base", tie_word_embeddings=tied)
    folder = write_adapter(
        tmp_path / "adapter",
        {**tensors_for(model.config, QV), **tensors},
        base_model_name_or_path=str(tmp_path / "base"),
        **changes,
    )
    want = tiny_model(torch.float32, tie_word_embeddings=tied)
    write_adapter(tmp_path / "layers", tensors_for(model.config, QV))
    merge_into(want, read_adapter(tmp_path / "layers", want.config))
    before = (model.model.embed_tokens.weight, model.lm_head.weight)
    embedding, head = outcome(*(weight.detach().clone() for weight in before))
    want.model.embed_tokens.weight = torch.nn.Parameter(embedding)
    want.lm_head.weight = torch.nn.Parameter(head)
    logits = want(tiny_ids()).logits

    attached = LlamaForCausalLM.from_pretrained(folder)
    assert torch.allclose(attached(tiny_ids()).logits, logits, atol=1e-4)
    assert attached.config.tie_word_embeddings == (tied and torch.equal(embedding, head))
    merge_into(model, read_adapter(folder, model.config))
    assert torch.allclose(model(tiny_ids()).logits, logits, atol=1e-4)
    save_adapter(attached, tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "again")
    assert torch.allclose(again(tiny_ids()).logits, logits, atol=1e-4)
    for name in ("out", "x.gguf"):
        convert(
            tmp_path / "base",
            tmp_path / name,
            ConversionSettings("hf" if name == "out" else "gguf", adapter=str(folder)),
        )
        merged = LlamaForCausalLM.from_pretrained(tmp_path / name)
        assert torch.allclose(merged(tiny_ids()).logits, logits, atol=1e-4)
        assert merged.config.tie_word_embeddings == (tied and torch.equal(embedding, head))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_grown_vocabulary_comes_with_the_adapter(tmp_path: Path, tied: bool) -> None:
    """peft saves embedding and head by itself where the vocabulary is not the base model's."""
    model = base(tmp_path / "base", tie_word_embeddings=tied)
    grown = {f"{PREFIX}{EMBEDDING}": drawn(104, D), f"{PREFIX}{HEAD}": drawn(104, D, seed=7 if tied else 9)}
    folder = write_adapter(tmp_path / "adapter", {**tensors_for(model.config, QV), **grown},
                           base_model_name_or_path=str(tmp_path / "base"))  # fmt: skip
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert loaded.config.vocab_size == 104 and loaded.config.tie_word_embeddings == tied
    assert torch.equal(loaded.model.embed_tokens.weight, drawn(104, D))
    assert torch.equal(loaded.lm_head.weight, grown[f"{PREFIX}{HEAD}"])
    convert(tmp_path / "base", tmp_path / "out", ConversionSettings(adapter=str(folder)))
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == 104
    assert torch.allclose(merged(tiny_ids()).logits, loaded(tiny_ids()).logits, atol=1e-4)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases(tmp_path: Path, bias: str) -> None:
    changes = {"attention_bias": True, "mlp_bias": True}
    model = base(tmp_path / "base", **changes)
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    # peft wraps what it adapts, so those biases stand behind .base_layer; the others do not.
    biases = {f"{name}.base_layer.bias": drawn(64 if name.endswith("q_proj") else 32) for name in names}
    if bias == "all":
        biases |= {f"model.layers.{i}.mlp.up_proj.bias": drawn(112) for i in (0, 1)}
    tensors = {**tensors_for(model.config, QV), **{PREFIX + name: value for name, value in biases.items()}}
    folder = write_adapter(tmp_path / "adapter", tensors, bias=bias)
    load_adapter(model, folder)
    for name, value in biases.items():
        assert torch.equal(model.get_parameter(name), value)
    convert(tmp_path / "base", tmp_path / "out", ConversionSettings(adapter=str(folder)))
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(merged(tiny_ids()).logits, model(tiny_ids()).logits, atol=1e-4)
    save_adapter(model, tmp_path / "again")
    fields = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert fields["bias"] == "all" and fields["modules_to_save"] is None
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "again")
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)


def test_bias_of_a_model_that_has_none_says_nothing(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", tensors_for(model.config, QV), bias="all")
    load_adapter(model, tmp_path / "adapter")
    biased = base(tmp_path / "biased", attention_bias=True)
    with pytest.warns(UserWarning, match="bias is 'all', but the file holds no bias"):
        load_adapter(biased, tmp_path / "adapter")


def on_base(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace(f"{PREFIX}model.", PREFIX): tensor for name, tensor in tensors.items()}


def test_adapters_that_were_made_on_automodel(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    plain = tensors_for(model.config, QV)
    write_adapter(tmp_path / "causal", plain)
    embedding = {f"{PREFIX}{EMBEDDING}": drawn(V, D)}
    folder = write_adapter(tmp_path / "inner", on_base({**plain, **embedding}), modules_to_save=["embed_tokens"],
                           task_type="FEATURE_EXTRACTION", base_model_name_or_path=str(tmp_path / "base"))  # fmt: skip
    load_adapter(model, tmp_path / "causal")
    model.model.embed_tokens.weight.data.copy_(drawn(V, D))
    causal = LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(causal(tiny_ids()).logits, model(tiny_ids()).logits)
    inner = AutoModel.from_pretrained(folder)
    assert type(inner) is LlamaModel
    states = model.model(tiny_ids()).last_hidden_state
    assert torch.equal(inner(tiny_ids()).last_hidden_state, states)
    save_adapter(inner, tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "again")
    assert torch.equal(again(tiny_ids()).last_hidden_state, states)


def test_the_native_engine_says_what_it_cannot_add(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    tensors = {**tensors_for(model.config, QV), **WHOLE}
    folder = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight.*of its own.*llama2 merge-adapter"):
        read_adapter(folder, model.config).plain  # noqa: B018
    if cpu.available():
        with pytest.raises(CheckpointError, match="merge-adapter"):
            NativeModel.from_module(model).load_adapter(folder)


def test_what_the_file_lacks_is_told(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    plain = tensors_for(model.config, QV)
    folder = write_adapter(tmp_path / "a", plain, modules_to_save=["lm_head"])
    with pytest.raises(MismatchError, match="modules_to_save names 'lm_head', but the file holds no tensor of it"):
        read_adapter(folder, model.config)
    folder = write_adapter(tmp_path / "b", {**plain, **ROWS}, trainable_token_indices=[3, 97])
    with pytest.raises(MismatchError, match=r"the rows \[3, 97\] of model.embed_tokens.weight"):
        read_adapter(folder, model.config)


def test_a_classifiers_adapter_without_a_head_is_refused(tmp_path: Path) -> None:
    """Its labels would be drawn anew at each load."""
    model = base(tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", tensors_for(model.config, QV), task_type="SEQ_CLS",
                           base_model_name_or_path=str(tmp_path / "base"))  # fmt: skip
    with pytest.raises(MismatchError, match=r"without score.weight.*has none either.*random"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.warns(UserWarning, match="newly initialised"):  # a base model's head is to be trained, which it says
        whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    whole.save_pretrained(tmp_path / "whole")
    write_adapter(tmp_path / "adapter", tensors_for(model.config, QV), base_model_name_or_path=str(tmp_path / "whole"))
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(loaded.score.weight, whole.score.weight)
