"""peft's adapters over these models: training, saving both ways, merging, generating."""

from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from product import IDS, demo, greedy, llama2, tiny_model

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4, "init_lora_weights": False}


def _round(config: Any, folder: Path) -> None:
    """Gradients flow; what is saved and loaded gives the same logits and tokens."""
    model = get_peft_model(tiny_model(torch.float32), config)
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and any(p.grad is not None and bool(p.grad.any()) for p in trained)
    model.eval().save_pretrained(folder)
    again = PeftModel.from_pretrained(tiny_model(torch.float32), folder).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    tokens = greedy(model)
    assert torch.equal(greedy(again), tokens) and torch.equal(greedy(model, runner="torch"), tokens)
    assert torch.equal(greedy(model, use_cache=False), tokens)


def case_lora(folder: Path) -> None:
    _round(LoraConfig(**LORA), folder)


def case_lora_of_embeddings_and_head(folder: Path) -> None:
    _round(LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}), folder)


def case_modules_to_save(folder: Path) -> None:
    _round(LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head", "embed_tokens"]), folder)


def case_trainable_tokens(folder: Path) -> None:
    _round(LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[1, 2]), folder)


def case_prompt_tuning(folder: Path) -> None:
    _round(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), folder)


def case_prompt_encoder(folder: Path) -> None:
    _round(PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), folder)


def case_prefix_tuning(folder: Path) -> None:
    _round(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), folder)


def case_prefix_tuning_projected(folder: Path) -> None:
    _round(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True), folder)


def case_ia3(folder: Path) -> None:
    _round(IA3Config(task_type="CAUSAL_LM"), folder)


def case_as_on_transformers_model(folder: Path) -> None:
    """The same adapter over transformers' model gives the same logits."""
    import transformers

    base = tiny_model(torch.float32)
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(**LORA)).eval()
    model.save_pretrained(folder / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, folder / "adapter").eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-3)


def case_our_loader_reads_it(folder: Path) -> None:
    model = get_peft_model(tiny_model(torch.float32), LoraConfig(**LORA)).eval()
    model.save_pretrained(folder)
    own = tiny_model(torch.float32)
    own.load_adapter(folder)
    torch.testing.assert_close(own(IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-4)


def case_peft_reads_ours(folder: Path) -> None:
    from llama2.checkpoint.peft import save_adapter

    own = tiny_model(torch.float32)
    own.add_adapter(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]))
    for layer in llama2.lora.layers(own).values():
        torch.nn.init.normal_(layer.lora_B["default"], std=0.3)
    save_adapter(own, folder)
    again = PeftModel.from_pretrained(tiny_model(torch.float32), folder).eval()
    torch.testing.assert_close(own(IDS).logits, again(input_ids=IDS).logits, rtol=0, atol=1e-4)


def case_merge(folder: Path) -> None:
    model = get_peft_model(tiny_model(torch.float32), LoraConfig(**LORA)).eval()
    want, tokens = model(input_ids=IDS).logits, greedy(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, want, rtol=0, atol=1e-3)
    merged.save_pretrained(folder)
    assert torch.equal(greedy(llama2.AutoModelForCausalLM.from_pretrained(folder)), tokens)


def case_disabled_adapter(folder: Path) -> None:
    base = tiny_model(torch.float32)
    want = greedy(base)
    model = get_peft_model(base, LoraConfig(**LORA)).eval()
    assert not torch.equal(model(input_ids=IDS).logits, tiny_model(torch.float32)(IDS).logits)
    with model.disable_adapter():
        assert torch.equal(greedy(model), want)


def _packed(folder: Path, **bits: bool) -> None:
    tiny_model(torch.float32).save_pretrained(folder)
    base = llama2.AutoModelForCausalLM.from_pretrained(folder, **bits)
    plain = base(IDS).logits
    model = get_peft_model(prepare_model_for_kbit_training(base), LoraConfig(**LORA))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert sum("lora_" in n and p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters()) >= 28
    model.eval()
    want = model(input_ids=IDS).logits
    assert not torch.allclose(want, plain) and torch.equal(greedy(model), greedy(model, runner="torch"))
    try:
        model.merge_and_unload()
        raise AssertionError("codes were merged into")
    except llama2.InputError as error:
        assert "dequantize()" in str(error)


def case_packed_4bit(folder: Path) -> None:
    _packed(folder, load_in_4bit=True)


def case_packed_8bit(folder: Path) -> None:
    _packed(folder, load_in_8bit=True)


def case_demo_model(folder: Path) -> None:
    base, tokenizer = demo()
    ids = tokenizer("The sky is", return_tensors="pt")["input_ids"]
    want = greedy(base, ids)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).eval()
    assert torch.equal(greedy(model, ids), want)  # B is zero
    model.train()(input_ids=ids, labels=ids).loss.backward()
    model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").exists()
