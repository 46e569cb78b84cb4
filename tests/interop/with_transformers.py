"""transformers' Trainer, collators and pipelines with these models and tokenizers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from product import BYTES, IDS, byte_model, byte_tokenizer, demo, llama2, tiny_config, tiny_model
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

ROWS = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1).tolist()]


def _arguments(folder: Path, **how: Any) -> TrainingArguments:
    fixed: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **{**fixed, **how})


def _losses(model: Any, folder: Path, **how: Any) -> list[float]:
    trainer = Trainer(
        model=model, args=_arguments(folder, **how), train_dataset=ROWS, data_collator=default_data_collator
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def case_trainer_has_the_losses_of_transformers_model(folder: Path) -> None:
    """Accumulated steps too: the loss is divided by the number of targets of the whole batch."""
    tiny_model(torch.float32).save_pretrained(folder / "base")
    for number, how in enumerate(({}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1})):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        want = _losses(theirs, folder / f"a{number}", **how)
        got = _losses(tiny_model(torch.float32), folder / f"b{number}", **how)
        assert all(abs(x - y) < 2e-3 * abs(y) for x, y in zip(got, want, strict=True)), (how, got, want)


def case_trainer_evaluates_and_predicts(folder: Path) -> None:
    for number, smoothing in enumerate((0.0, 0.1)):
        trainer = Trainer(
            model=tiny_model(torch.float32),
            args=_arguments(folder / str(number), label_smoothing_factor=smoothing),
            train_dataset=ROWS,
            eval_dataset=ROWS,
            data_collator=default_data_collator,
        )
        assert trainer.evaluate()["eval_loss"] > 0
        assert trainer.predict(ROWS).predictions.shape == (8, 10, 97)


def case_trainer_options(folder: Path) -> None:
    how: dict[str, Any] = {
        "gradient_checkpointing": True,
        "bf16": True,
        "save_steps": 1,
        "eval_steps": 1,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "load_best_model_at_end": True,
        "neftune_noise_alpha": 5,
    }
    trainer = Trainer(
        model=tiny_model(torch.float32),
        args=_arguments(folder, **how),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    trainer.model.save_pretrained(folder / "saved")
    again = dict(llama2.AutoModelForCausalLM.from_pretrained(folder / "saved").named_parameters())
    assert all(torch.equal(again[name], p) for name, p in trainer.model.named_parameters())


def case_the_saved_folder_says_what_to_do(folder: Path) -> None:
    trainer = Trainer(model=tiny_model(torch.float32), args=_arguments(folder), train_dataset=ROWS)
    trainer.save_model(str(folder / "saved"))
    try:
        llama2.AutoModelForCausalLM.from_pretrained(folder / "saved")
    except llama2.CheckpointError as error:
        assert "to_transformers()" in str(error)
    else:
        assert (folder / "saved" / "config.json").exists()


def case_to_transformers(folder: Path) -> None:
    model = tiny_model(torch.float32, tie_word_embeddings=True)
    _losses(model.to_transformers(), folder, save_steps=3)
    again = llama2.AutoModelForCausalLM.from_pretrained(folder / "checkpoint-3")
    torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits, rtol=0, atol=1e-4)


def case_collators(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder)
    rows = [dict(tokenizer("hello there")), dict(tokenizer("a much longer sentence, really"))]
    longest = max(len(row["input_ids"]) for row in rows)
    for collator in (DataCollatorForLanguageModeling(tokenizer, mlm=False), DataCollatorWithPadding(tokenizer)):
        batch = collator([dict(row) for row in rows])
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, longest)
    labelled = [{**row, "labels": list(row["input_ids"])} for row in rows]
    batch = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in labelled])
    assert batch["labels"].shape == (2, longest) and int((batch["labels"] == -100).sum()) > 0
    flat = DataCollatorWithFlattening()([{k: row[k] for k in ("input_ids", "labels")} for row in labelled])
    assert byte_model()(**flat).loss.isfinite()


def case_pipelines(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder)
    write = pipeline("text-generation", model=byte_model().eval(), tokenizer=tokenizer)
    assert write("hello", max_new_tokens=3)[0]["generated_text"].startswith("hello")
    assert len(write(["a", "b"], max_new_tokens=3, return_full_text=False, batch_size=2)) == 2
    config = tiny_config(num_labels=3, pad_token_id=tokenizer.pad_token_id, **BYTES)
    judge = pipeline(
        "text-classification", model=llama2.LlamaForSequenceClassification(config).eval(), tokenizer=tokenizer
    )
    assert {row["label"] for row in judge("good", top_k=None)} == {"LABEL_0", "LABEL_1", "LABEL_2"}


def case_demo_model_in_a_pipeline(folder: Path) -> None:
    model, tokenizer = demo()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = text("The capital of France is", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    own = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert found == tokenizer.decode(own[0], skip_special_tokens=True)
