"""PeftModel and its kin: peft's names over the library's own adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_config, tiny_ids, tiny_model

from llama2 import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    InputError,
    LlamaForSequenceClassification,
    LoraConfig,
    PeftModel,
    TaskType,
    Trainer,
    TrainingArguments,
    get_peft_model,
    lora,
    prepare_model_for_kbit_training,
)

CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "v_proj"))


def trained(model: PeftModel, name: str = "default", seed: int = 1) -> PeftModel:
    """As training would have left it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in lora.layers(model.get_base_model()).values():
            layer.lora_B[name].normal_(0, 0.3)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(tiny_ids(2)).logits
    return found


@pytest.mark.filterwarnings("ignore:torch runs this model")
def test_the_view_and_its_names() -> None:
    base = tiny_model(torch.float32)
    model = get_peft_model(base, CONFIG)
    assert model.get_base_model() is base is model.base_model.model and model.config is base.config
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default" and len(names) == 8
    assert model.active_adapter == "default" and model.peft_config["default"].r == 2 and model.device.type == "cpu"
    assert torch.equal(logits(model), logits(base))
    with torch.no_grad():
        ids = tiny_ids(1, 4)
        assert torch.equal(model.generate(ids, max_new_tokens=3), base.generate(ids, max_new_tokens=3))
    with pytest.raises(InputError, match="the model is a PeftModel already"):
        get_peft_model(model, CONFIG)
    with pytest.raises(InputError, match="peft_config is a dict; it must be a llama2.LoraConfig"):
        get_peft_model(tiny_model(torch.float32), {"r": 2})  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        model.no_such_thing  # noqa: B018


def test_the_count_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """peft's line: 2 layers of q (64 -> 64) and v (64 -> 32) at rank 2 are 2 (2 * 128 + 2 * 96) = 896 weights."""
    base = tiny_model(torch.float32)
    every = sum(p.numel() for p in base.parameters())
    get_peft_model(base, CONFIG).print_trainable_parameters()
    share = 100 * 896 / (every + 896)
    assert (
        capsys.readouterr().out == f"trainable params: 896 || all params: {every + 896:,} || trainable%: {share:.4f}\n"
    )


def test_saved_loaded_and_merged(tmp_path: Path) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained(get_peft_model(base, CONFIG))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(logits(again), wanted) and not any(
        p.requires_grad for n, p in again.named_parameters() if "lora" in n
    )
    with again.disable_adapter():
        assert not torch.allclose(logits(again), wanted)
    resumed = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"), is_trainable=True
    )
    assert sum(p.requires_grad for p in resumed.parameters()) == 8
    whole = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(whole), wanted)
    merged = whole.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM" and not lora.names(merged)
    assert torch.allclose(logits(merged), wanted, atol=1e-4)
    unloaded = again.unload()
    assert not lora.names(unloaded) and torch.equal(logits(unloaded), logits(tiny_model(torch.float32)))
    with pytest.raises(InputError, match="is no adapter; load it with AutoModelForCausalLM"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "base")


def test_several_adapters(tmp_path: Path) -> None:
    model = trained(get_peft_model(tiny_model(torch.float32), CONFIG))
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=3))
    trained(model, "second", seed=2)
    second = logits(model)
    assert model.active_adapter == "second" and not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "second" / "adapter_config.json").exists() and (tmp_path / "adapter_config.json").exists()
    fresh = PeftModel.from_pretrained(tiny_model(torch.float32), tmp_path)
    fresh.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(fresh), second)
    fresh.delete_adapter("second")
    fresh.set_adapter("default")
    assert torch.equal(logits(fresh), first) and list(fresh.peft_config) == ["default"]


def test_a_broken_adapter_is_not_merged() -> None:
    model = get_peft_model(tiny_model(torch.float32), CONFIG)
    with torch.no_grad():
        next(iter(lora.layers(model.get_base_model()).values())).lora_B["default"].fill_(float("nan"))
    with pytest.raises(InputError, match="holds NaN or inf"):
        model.merge_and_unload(safe_merge=True)


def test_a_packed_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packed)
    model = prepare_model_for_kbit_training(model)
    assert not any(p.requires_grad for p in model.parameters()) and model.is_gradient_checkpointing
    adapted = trained(get_peft_model(model, CONFIG))
    trainable, every = adapted.get_nb_trainable_parameters()
    assert trainable == 896 and every == sum(p.numel() for p in tiny_model(torch.float32).parameters()) + 896
    wanted = logits(adapted)
    with pytest.warns(UserWarning, match="the packed weights are unpacked to"):
        merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged), wanted, atol=2e-2, rtol=2e-2)


def test_a_trainer_takes_the_view(tmp_path: Path) -> None:
    rows = [{"input_ids": tiny_ids(1, 6, i)[0].tolist()} for i in range(4)]
    args = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2)
    model = get_peft_model(tiny_model(torch.float32), CONFIG)
    before = logits(model)
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    assert trainer.model is model and not torch.equal(before, logits(model))
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(tiny_model(torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    inside = PeftModel.from_pretrained(tiny_model(torch.float32), tmp_path / "checkpoint-2")
    assert torch.equal(logits(inside), logits(model))


def test_a_classifier_keeps_its_new_head(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_config(vocab_size=260, num_labels=2, pad_token_id=0)).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert TaskType.SEQ_CLS == "SEQ_CLS"
    adapted = get_peft_model(model, CONFIG)
    rows = [{"text": "good" if i % 2 else "bad", "label": i % 2} for i in range(8)]
    args = TrainingArguments(str(tmp_path / "out"), max_steps=3, learning_rate=1e-2)
    trainer = Trainer(adapted, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[70, 71, 72]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, adapted(ids).logits)
