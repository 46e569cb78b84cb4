"""Collators: transformers' values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2 import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
    InputError,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

ROWS = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, {"input_ids": [8, 0], "attention_mask": [1, 1]}]


@pytest.fixture
def tok(tmp_path: Path) -> Any:
    """The byte-level tokenizer; its end is 0, its pad token 3."""
    write_tokenizer(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    found.pad_token, found.padding_side = "<|system|>", "right"
    return found


def lists(batch: Any) -> dict[str, Any]:
    return {name: value.tolist() for name, value in batch.items()}


def test_values_that_are_stacked() -> None:
    rows = [{"a": [1, 2], "label": 1, "t": "x", "n": None}, {"a": [3, 4], "label": 0, "t": "y", "n": None}]
    found = default_data_collator(rows)
    assert lists(found) == {"a": [[1, 2], [3, 4]], "labels": [1, 0]} and found["labels"].dtype == torch.int64
    floats = DefaultDataCollator()([{"label": 0.5}, {"label": 1.5}])
    assert floats["labels"].tolist() == [0.5, 1.5] and floats["labels"].dtype == torch.float32
    assert default_data_collator([{"label_ids": [0.0, 1.0]}])["labels"].tolist() == [[0.0, 1.0]]
    assert default_data_collator([{"x": torch.ones(2)}, {"x": torch.zeros(2)}])["x"].shape == (2, 2)
    with pytest.raises(InputError, match="the rows' a are of several lengths .* use DataCollatorWithPadding"):
        default_data_collator([{"a": [1]}, {"a": [1, 2]}])
    with pytest.raises(InputError, match="return_tensors is 'tf'"):
        default_data_collator(rows, "tf")


def test_padding(tok: Any) -> None:
    labelled = [{**row, "label": i} for i, row in enumerate(ROWS)]
    found = lists(DataCollatorWithPadding(tok)(labelled))
    assert found == {"input_ids": [[5, 6, 7], [8, 0, 3]], "attention_mask": [[1, 1, 1], [1, 1, 0]], "labels": [0, 1]}
    wide = DataCollatorWithPadding(tok, pad_to_multiple_of=4)(ROWS)
    assert wide["input_ids"].tolist() == [[5, 6, 7, 3], [8, 0, 3, 3]]
    tok.padding_side = "left"
    assert DataCollatorWithPadding(tok)(ROWS)["input_ids"].tolist() == [[5, 6, 7], [3, 8, 0]]


def test_labels_are_padded_too(tok: Any) -> None:
    labelled = [{**row, "labels": row["input_ids"]} for row in ROWS]
    for collator in (DataCollatorForSeq2Seq(tok), DataCollatorForTokenClassification(tok)):
        assert lists(collator(labelled))["labels"] == [[5, 6, 7], [8, 0, -100]]
    assert lists(DataCollatorForSeq2Seq(tok, label_pad_token_id=9)(labelled))["labels"] == [[5, 6, 7], [8, 0, 9]]
    tok.padding_side = "left"
    assert lists(DataCollatorForSeq2Seq(tok)(labelled))["labels"] == [[5, 6, 7], [-100, 8, 0]]
    assert "labels" not in DataCollatorForSeq2Seq(tok)(ROWS)


def test_language_modelling(tok: Any) -> None:
    found = lists(DataCollatorForLanguageModeling(tok, mlm=False)(ROWS))
    assert found["labels"] == [[5, 6, 7], [8, 0, -100]] and found["input_ids"] == [[5, 6, 7], [8, 0, 3]]
    assert lists(DataCollatorForLanguageModeling(tok, mlm=False)([[5, 6], [7]]))["labels"] == [[5, 6], [7, -100]]
    with pytest.raises(InputError, match="mlm is True, and a causal model has no masked tokens; use mlm=False"):
        DataCollatorForLanguageModeling(tok)
    tok.pad_token = tok.eos_token
    with pytest.warns(UserWarning, match="the pad token is the end token, so the ends of texts are no targets"):
        collator = DataCollatorForLanguageModeling(tok, mlm=False)
    assert lists(collator(ROWS))["labels"] == [[5, 6, 7], [8, -100, -100]]  # transformers' value


def test_a_tokenizer_without_a_pad_token(tok: Any) -> None:
    tok.pad_token = None
    with pytest.raises(InputError, match="rows are of several lengths, and the tokenizer has no pad token"):
        DataCollatorWithPadding(tok)(ROWS)
    assert DataCollatorWithPadding(tok)(ROWS[:1])["input_ids"].tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("kind", [DataCollatorForSeq2Seq, DataCollatorForLanguageModeling])
def test_a_run_with_a_collator_is_one_without(tmp_path: Path, tok: Any, kind: Any) -> None:
    """Rows go through the collator one by one, so the loss needs no whole logits."""
    rows = [{"input_ids": list(range(4, 9 + i)), "labels": list(range(4, 9 + i))} for i in range(6)]
    given = {"mlm": False} if kind is DataCollatorForLanguageModeling else {}
    found = []
    for collator in (None, kind(tok, **given)):
        args = TrainingArguments(str(tmp_path / "out"), max_steps=3, logging_steps=1, save_strategy="no",
                                 per_device_train_batch_size=2)  # fmt: skip
        trainer = Trainer(tiny_model(torch.float32), args, collator, rows)
        assert not trainer._trains_by_hand
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == found[1]
