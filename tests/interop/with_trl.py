"""TRL's trainers with these models; the tokenizer is `tokenizer.to_transformers()`, for TRL asks for that class."""

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from product import BYTES, byte_model, byte_tokenizer, demo, llama2, tiny_config
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

HOW: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
COLOURS = ("red", "blue", "green", "grey")
SFT = [{"prompt": f"The sky is {c}", "completion": f" and the sea {c} too"} for c in COLOURS]
PAIRS = [{"prompt": f"The sky is {c}", "chosen": f" and {c}", "rejected": " or not"} for c in COLOURS]
PROMPTS = [{"prompt": f"The sky is {c}"} for c in COLOURS]


def _trained(trainer: Any, folder: Path) -> list[float]:
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    changed = [n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert changed, "no parameter changed"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(map(math.isfinite, losses))
    trainer.save_model(str(folder / "saved"))
    return losses


def _sft(folder: Path, model: Any, tokenizer: Any, **how: Any) -> Any:
    data = Dataset.from_list(SFT)
    args = SFTConfig(output_dir=str(folder), **HOW)
    return SFTTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **how)


def case_sft(folder: Path) -> None:
    trainer = _sft(folder, byte_model(), byte_tokenizer(folder).to_transformers())
    _trained(trainer, folder)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def case_sft_has_the_losses_of_transformers_model(folder: Path) -> None:
    import transformers

    tokenizer = byte_tokenizer(folder).to_transformers()
    byte_model().save_pretrained(folder / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    want = _trained(_sft(folder / "a", theirs, tokenizer), folder / "a")
    got = _trained(_sft(folder / "b", byte_model(), tokenizer), folder / "b")
    assert all(abs(x - y) < 2e-3 * abs(y) for x, y in zip(got, want, strict=True)), (got, want)


def case_sft_lora(folder: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM")
    _trained(_sft(folder, byte_model(), byte_tokenizer(folder).to_transformers(), peft_config=lora), folder)
    byte_model().save_pretrained(folder / "base")
    model = byte_model()
    model.load_adapter(folder / "saved")
    assert model.active_adapters() == ["default"]


def case_dpo_lora(folder: Path) -> None:
    trainer = DPOTrainer(
        model=byte_model(),
        args=DPOConfig(output_dir=str(folder), **HOW),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=byte_tokenizer(folder).to_transformers(),
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    assert abs(_trained(trainer, folder)[0] - math.log(2)) < 1e-4


def case_dpo_whole_with_a_reference(folder: Path) -> None:
    trainer = DPOTrainer(
        model=byte_model(),
        ref_model=byte_model(),
        args=DPOConfig(output_dir=str(folder), **HOW),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=byte_tokenizer(folder).to_transformers(),
    )
    losses = _trained(trainer, folder)
    assert abs(losses[0] - math.log(2)) < 1e-4 and losses[1] != losses[0]


def case_reward(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder).to_transformers()
    config = tiny_config(num_labels=1, pad_token_id=tokenizer.pad_token_id, **BYTES)
    for number, lora in enumerate((None, LoraConfig(task_type="SEQ_CLS"))):
        trainer = RewardTrainer(
            model=llama2.LlamaForSequenceClassification(config),
            args=RewardConfig(output_dir=str(folder / str(number)), **HOW),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
            peft_config=lora,
        )
        _trained(trainer, folder / str(number))


def case_grpo(folder: Path) -> None:
    for number, lora in enumerate((None, LoraConfig(task_type="CAUSAL_LM"))):
        trainer = GRPOTrainer(
            model=byte_model(),
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            args=GRPOConfig(output_dir=str(folder / str(number)), max_completion_length=8, num_generations=2, **HOW),
            train_dataset=Dataset.from_list(PROMPTS),
            processing_class=byte_tokenizer(folder).to_transformers(),
            peft_config=lora,
        )
        _trained(trainer, folder / str(number))


def case_transformers_class_is_saved_whole(folder: Path) -> None:
    """`to_transformers()`: the folder that the trainer writes loads, and this model is the trained one."""
    tokenizer = byte_tokenizer(folder).to_transformers()
    model = byte_model(tie_word_embeddings=True)
    _trained(_sft(folder, model.to_transformers(), tokenizer), folder)
    again = llama2.AutoModelForCausalLM.from_pretrained(folder / "saved")
    ids = tokenizer("The sky", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-4)


def case_demo_model_sft_lora(folder: Path) -> None:
    model, tokenizer = demo()
    lora = LoraConfig(task_type="CAUSAL_LM")
    _trained(_sft(folder, model, tokenizer.to_transformers(), peft_config=lora), folder)
