"""Scripts as the guides to Llama 2 write them, with nothing replaced but the packages that the names come from."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_config, tiny_model

from llama2 import LlamaForSequenceClassification

# A QLoRA run as the guides of 2023 have it: peft's preparation, TRL 0.x's keywords, then the merge.
QLORA = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainingArguments
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model, prepare_model_for_kbit_training
from trl import SFTTrainer

def lesson(row):
    return f"### Task:\\n{row['task']}\\n\\n### Solution:\\n{row['solution']}"

quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
model = AutoModelForCausalLM.from_pretrained(
    model_id, quantization_config=quantization, use_cache=False, device_map="auto"
)
model.config.pretraining_tp = 1
tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.pad_token = tokenizer.eos_token
tokenizer.padding_side = "right"

peft_config = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=4, bias="none", task_type="CAUSAL_LM")
model = prepare_model_for_kbit_training(model)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

args = TrainingArguments(
    output_dir=out, num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    gradient_checkpointing=True, optim="paged_adamw_32bit", logging_steps=1, save_strategy="epoch",
    learning_rate=2e-2, bf16=True, max_grad_norm=0.3, warmup_ratio=0.03, lr_scheduler_type="constant",
    disable_tqdm=True,
)
trainer = SFTTrainer(
    model=model, train_dataset=lessons, peft_config=peft_config, max_seq_length=64, tokenizer=tokenizer, packing=True,
    formatting_func=lesson, args=args,
)
trainer.train()
trainer.save_model()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

model = AutoPeftModelForCausalLM.from_pretrained(out, torch_dtype=torch.float32, low_cpu_mem_usage=True)
merged = model.merge_and_unload()
merged.save_pretrained(final, safe_serialization=True)
tokenizer.save_pretrained(final)
answer = AutoModelForCausalLM.from_pretrained(final)
"""

# TRL 1.x: the model as a path, its settings in the configuration.
SFT = """
from transformers import EarlyStoppingCallback
from trl import SFTConfig, SFTTrainer
from peft import LoraConfig, TaskType

args = SFTConfig(
    output_dir=out, max_length=64, packing=False, assistant_only_loss=True, per_device_train_batch_size=4,
    learning_rate="1e-2", num_train_epochs=4, logging_steps=1, eval_strategy="epoch", save_strategy="epoch",
    load_best_model_at_end=True, metric_for_best_model="eval_loss", report_to="none", bf16=False,
    model_init_kwargs={"dtype": "float32"}, lr_scheduler_type="cosine", warmup_steps=0.1,
)
trainer = SFTTrainer(
    model_id, args=args, train_dataset=chats, eval_dataset=chats[:2],
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=TaskType.CAUSAL_LM),
    callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
)
result = trainer.train()
trainer.save_model(final)
metrics = result.metrics
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
answer = trainer.model
"""

# Preferences as the guide of 2023 has them: the SFT adapter is trained on, with a copy of it as the reference.
DPO = """
import torch
from transformers import AutoTokenizer, TrainingArguments
from peft import AutoPeftModelForCausalLM, LoraConfig
from trl import DPOTrainer

tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.pad_token = tokenizer.eos_token
model = AutoPeftModelForCausalLM.from_pretrained(
    tuned, low_cpu_mem_usage=True, torch_dtype=torch.float32, is_trainable=True
)
model_ref = AutoPeftModelForCausalLM.from_pretrained(tuned, low_cpu_mem_usage=True, torch_dtype=torch.float32)
model.config.use_cache = False

def asked(row):
    prompt = "Question: " + row["question"] + "\\n\\nAnswer: "
    return {"prompt": prompt, "chosen": row["better"], "rejected": row["worse"]}

args = TrainingArguments(
    per_device_train_batch_size=2, max_steps=6, logging_steps=1, save_steps=100, gradient_accumulation_steps=2,
    gradient_checkpointing=True, learning_rate=5e-3, eval_strategy="steps", eval_steps=3, output_dir=out,
    report_to="none", lr_scheduler_type="cosine", warmup_steps=1, optim="paged_adamw_32bit",
    remove_unused_columns=False, run_name="dpo",
)
trainer = DPOTrainer(
    model, model_ref, args=args, beta=0.1, train_dataset=[asked(row) for row in questions],
    eval_dataset=[asked(row) for row in questions[:2]], tokenizer=tokenizer, max_prompt_length=32, max_length=64,
)
trainer.train()
trainer.save_model(final)
trainer.model.save_pretrained(final)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
answer = trainer.model
"""

# A causal model with a collator, as the course on language models has it.
CLM = """
from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer,
                          TrainingArguments, get_scheduler)
import math

tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.pad_token = "<|system|>"
model = AutoModelForCausalLM.from_pretrained(model_id)

def tokenize(row):
    return tokenizer(row["text"], truncation=True, max_length=48)

encoded = [{**tokenize(row)} for row in texts]
args = TrainingArguments(
    output_dir=out, per_device_train_batch_size=4, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=5,
    logging_steps=5, num_train_epochs=5, weight_decay=0.1, warmup_steps=2, lr_scheduler_type="cosine",
    learning_rate=5e-3, save_steps=5_000, fp16=False, push_to_hub=False, dataloader_num_workers=0,
)
trainer = Trainer(
    model=model, processing_class=tokenizer, args=args,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    train_dataset=encoded, eval_dataset=encoded[:4],
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
perplexity = math.exp(trainer.evaluate()["eval_loss"])
losses = [before, math.log(perplexity)]
trainer.save_model(final)
answer = AutoModelForCausalLM.from_pretrained(final)
"""

# A classifier with an adapter, padded batches and a metric.
CLASSIFIER = """
import numpy as np
from transformers import (AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer,
                          TrainingArguments)
from peft import LoraConfig, TaskType, get_peft_model

tokenizer = AutoTokenizer.from_pretrained(classifier_id)
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForSequenceClassification.from_pretrained(classifier_id, num_labels=2)
model.config.pad_token_id = tokenizer.pad_token_id
model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=16, lora_dropout=0.0))

def tokenize(row):
    return {**tokenizer(row["text"], truncation=True, max_length=32), "label": row["label"]}

encoded = [tokenize(row) for row in labelled]

def compute_metrics(eval_pred):
    logits, labels = eval_pred
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}

args = TrainingArguments(
    output_dir=out, learning_rate=2e-2, per_device_train_batch_size=4, per_device_eval_batch_size=4,
    num_train_epochs=6, weight_decay=0.01, eval_strategy="epoch", save_strategy="epoch", logging_steps=1,
    load_best_model_at_end=True,
)
trainer = Trainer(
    model=model, args=args, train_dataset=encoded, eval_dataset=encoded, processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer=tokenizer), compute_metrics=compute_metrics,
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
predictions = trainer.predict(encoded).predictions
assert predictions.shape == (8, 2) and trainer.evaluate()["eval_accuracy"] == 1.0
trainer.save_model(final)
answer = model
"""

# A reward model.
REWARD = """
from transformers import AutoTokenizer
from peft import LoraConfig, TaskType
from trl import RewardConfig, RewardTrainer

args = RewardConfig(
    output_dir=out, per_device_train_batch_size=2, num_train_epochs=4, learning_rate=1e-2, logging_steps=1,
    center_rewards_coefficient=0.01, bf16=False, max_length=64,
)
trainer = RewardTrainer(
    model=model_id, args=args, train_dataset=judged, processing_class=AutoTokenizer.from_pretrained(model_id),
    peft_config=LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8),
)
trainer.train()
trainer.save_model(final)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
answer = trainer.model
"""
SCRIPTS = {"qlora": QLORA, "sft": SFT, "dpo": DPO, "clm": CLM, "classifier": CLASSIFIER, "reward": REWARD}


def run(script: str, **names: Any) -> dict[str, Any]:
    """Runs a script with its packages replaced."""
    replaced = re.sub(r"from (transformers|peft|trl) import", "from llama2 import", script)
    assert "transformers" not in replaced
    space = dict(names)
    exec(compile(replaced, "guide", "exec"), space)
    return space


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Models, folders and rows of a script."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    tiny_model(torch.float32, vocab_size=260).save_pretrained(base)
    write_tokenizer(base)
    classifier = tmp_path / "classifier"
    LlamaForSequenceClassification(tiny_config(vocab_size=260, num_labels=2)).save_pretrained(classifier)
    write_tokenizer(classifier)
    cups = [f"{i} cups" for i in range(8)]
    return {
        "model_id": str(base), "classifier_id": str(classifier), "out": str(tmp_path / "out"),
        "final": str(tmp_path / "final"),
        "lessons": [{"task": f"count {cup}", "solution": cup} for cup in cups],
        "chats": [{"messages": [{"role": "user", "content": f"count {cup}"}, {"role": "assistant", "content": cup}]}
                  for cup in cups],
        "questions": [{"question": cup, "better": "yes", "worse": "no, never"} for cup in cups],
        "texts": [{"text": f"there are {cup} on the table"} for cup in cups],
        "labelled": [{"text": "good" if i % 2 else "bad", "label": i % 2} for i in range(8)],
        "judged": [{"prompt": f"{cup}? ", "chosen": "yes", "rejected": "no, never"} for cup in cups],
    }  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings(
    "ignore:.*have no effect here",
    "ignore:the packed weights are unpacked",
    "ignore:the loaded.*",
    "ignore:.*newly initialised",
)
def test_a_guides_script_runs_as_it_stands(name: str, given: dict[str, Any]) -> None:
    if name == "dpo":
        run(SFT, **{**given, "out": given["out"] + "-sft", "final": (tuned := given["final"] + "-sft")})
        given["tuned"] = tuned
    found = run(SCRIPTS[name], **given)
    losses = found["losses"]
    assert losses[-1] < 0.8 * losses[0], losses
    with torch.no_grad():
        assert torch.isfinite(found["answer"](torch.tensor([[70, 71, 72]])).logits).all()
    assert any(Path(given["final"]).iterdir())
