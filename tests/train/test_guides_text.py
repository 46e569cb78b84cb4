"""Scripts of the guides that the Llama 2 page links to, in our words and with local data: GPTQ, a classifier with LoRA,
the pad token, training on one's own files. Only the imports are llama2's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2 import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    GPTQConfig,
    LoraConfig,
    TaskType,
    Trainer,
    TrainingArguments,
    get_peft_model,
    pipeline,
)

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    folder = tmp_path / "llama"
    sizes = {"vocab_size": 260, "intermediate_size": 128, "max_position_embeddings": 128}
    tiny_model(torch.float32, **sizes).save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


# -- GPTQ --------------------------------------------------------------------------------------------------------


def test_quantising_while_loading(checkpoint: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    dataset = ["an easy library that quantises language models to four bits with the help of a few texts. " * 4]
    gptq_config = GPTQConfig(bits=4, dataset=dataset, tokenizer=tokenizer, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto", quantization_config=gptq_config)
    assert model.config.quantization_config["quant_method"] == "gptq" and model.name_or_path == checkpoint
    inputs = tokenizer("a few texts", return_tensors="pt").to(model.device)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "opt-4bit")
    tokenizer.save_pretrained(tmp_path / "opt-4bit")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "opt-4bit", device_map="auto")
    assert torch.equal(again.generate(**inputs, max_new_tokens=4, do_sample=False), out)

    def error(quantised: Any) -> float:
        plain = AutoModelForCausalLM.from_pretrained(checkpoint)
        ids = tokenizer(dataset[0], return_tensors="pt")["input_ids"][:, :96]
        with torch.no_grad():
            return float((quantised(ids).logits - plain(ids).logits).square().mean())

    rounded = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=GPTQConfig(bits=4, group_size=32))
    assert error(again) < 0.9 * error(rounded)  # calibrated, not only rounded


def test_training_an_adapter_on_gptq_weights(checkpoint: str, tmp_path: Path) -> None:
    gptq_config = GPTQConfig(bits=4, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=gptq_config)
    model.config.use_cache = False
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["k_proj", "o_proj", "q_proj", "v_proj"], lora_dropout=0.05,
                        bias="none", task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(model, config)
    args = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=8, learning_rate=1e-2, logging_steps=1,
                             per_device_train_batch_size=2, report_to="none")  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": [5, 6, 7, 8]}] * 8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


# -- the pad token -----------------------------------------------------------------------------------------------


def test_a_pad_token_is_added(checkpoint: str, tmp_path: Path) -> None:
    """As the Llama 2 page has it: added, the embedding resized and given its padding_idx, the configuration told."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.model.embed_tokens = torch.nn.Embedding(
        model.config.vocab_size, model.config.hidden_size, padding_idx=model.config.pad_token_id
    )
    model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    batch = tokenizer(["one", "a longer text"], padding=True, return_tensors="pt")
    assert tokenizer.pad_token_id == 260 and (batch["input_ids"] == 260).sum() == 10
    args = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, save_strategy="no", report_to="none")
    rows = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(*map(torch.Tensor.tolist, batch.values()))]
    Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    model.save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.config.vocab_size == 261
    with torch.no_grad():
        found, wanted = (m(batch["input_ids"], batch["attention_mask"]).logits for m in (loaded, model))
    assert torch.allclose(found[batch["attention_mask"] == 1], wanted[batch["attention_mask"] == 1], atol=1e-5)


# -- a classifier ------------------------------------------------------------------------------------------------


def compute_metrics(eval_pred: Any) -> dict[str, float]:
    logits, labels = eval_pred
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}


@NO_GPU
def test_a_classifier_with_lora_and_weighted_classes(checkpoint: str, tmp_path: Path) -> None:
    """The guide's script: device_map {"": 0}, SEQ_CLS, padding by batch, a loss of one's own, metrics."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token_id, tokenizer.pad_token = tokenizer.eos_token_id, tokenizer.eos_token
    with pytest.warns(UserWarning) as said:
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2, device_map={"": 0})
    assert any("torch sees no CUDA device; the model is on the CPU" in str(w.message) for w in said), [
        w.message for w in said
    ]
    model.config.pad_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.05, bias="none",
                        target_modules=["q_proj", "v_proj"])  # fmt: skip
    model = get_peft_model(model, config)
    texts = [
        (f"{word} {i}", int(word in ("fire", "flood"))) for i in range(8) for word in ("fire", "flood", "tea", "sun")
    ]
    rows = [{**tokenizer(text, truncation=True, max_length=32), "label": label} for text, label in texts]

    class WeightedTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            weights = torch.tensor([0.7, 1.3], device=labels.device)
            loss = torch.nn.functional.cross_entropy(outputs.logits.view(-1, 2).float(), labels.view(-1), weights)
            return (loss, outputs) if return_outputs else loss

    args = TrainingArguments(
        output_dir=str(tmp_path / "out"), learning_rate=5e-3, lr_scheduler_type="constant", warmup_ratio=0.1,
        max_grad_norm=0.3, per_device_train_batch_size=8, per_device_eval_batch_size=8, num_train_epochs=6,
        weight_decay=0.001, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = WeightedTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:16],
                              data_collator=DataCollatorWithPadding(tokenizer=tokenizer),
                              compute_metrics=compute_metrics)  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.8
    model.save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    classify = pipeline("text-classification", model=str(tmp_path / "adapter"))
    assert [found["label"] for found in classify(["fire 3", "tea 4"])] == ["LABEL_1", "LABEL_0"]


# -- one's own files ---------------------------------------------------------------------------------------------


def test_training_on_files_of_ones_own(checkpoint: str, tmp_path: Path) -> None:
    """Notes in .jsonl and .csv files, read as rows, are trained on with an adapter; the model answers with what it
    learnt."""
    from llama2.train.data import read

    notes = [{"note": f"the {thing} is {colour}"} for thing, colour in (("sky", "blue"), ("sea", "green")) * 8]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in notes))
    rows = [{"text": row["note"]} for row in read(tmp_path / "notes.jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), LoraConfig(r=16, lora_alpha=64,
                           target_modules="all-linear", task_type="CAUSAL_LM"))  # fmt: skip
    args = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=60, learning_rate=1e-2, warmup_steps=2,
                             per_device_train_batch_size=4, save_strategy="no", report_to="none",
                             logging_steps=10)  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
