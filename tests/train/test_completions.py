"""Collators that learn from answers only, and that make one row of several: values worked out by hand after TRL's and
transformers' rules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2 import (
    AutoTokenizer,
    DataCollatorForCompletionOnlyLM,
    DataCollatorWithFlattening,
    InputError,
    Trainer,
    TrainingArguments,
)

NONE = -100


class Ids:
    """A tokenizer of one id a character, behind a first id that a line break makes disappear, as SentencePiece's
    dummy space does: encode("b") is [1, 12], and within a text "b" is [12]."""

    pad_token_id, eos_token_id, padding_side = 0, 99, "right"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1, *(ord(c) % 50 for c in text)]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def pad(self, rows: Any, **_: Any) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": [[*row["input_ids"], *[0] * (longest - len(row["input_ids"]))] for row in rows],
            "attention_mask": [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows],
        }


def labels(collator: Any, *rows: list[int]) -> list[list[int]]:
    return collator([{"input_ids": row} for row in rows])["labels"].tolist()


def test_targets_follow_the_last_answer_template() -> None:
    collator = DataCollatorForCompletionOnlyLM([7, 8], tokenizer=Ids())
    assert labels(collator, [3, 7, 8, 4, 5], [7, 8, 6]) == [[NONE, NONE, NONE, 4, 5], [NONE, NONE, 6, NONE, NONE]]
    assert labels(collator, [7, 8, 4, 7, 8, 5]) == [[NONE] * 5 + [5]]


def test_turns_alternate() -> None:
    collator = DataCollatorForCompletionOnlyLM([7, 8], [5, 6], tokenizer=Ids())
    assert labels(collator, [2, 5, 6, 3, 7, 8, 10, 11, 5, 6, 4, 7, 8, 12]) == [
        [NONE] * 6 + [10, 11] + [NONE] * 5 + [12]
    ]
    assert labels(collator, [7, 8, 10, 5, 6, 4, 7, 8, 12]) == [[NONE, NONE, 10, NONE, NONE, NONE, NONE, NONE, 12]]
    assert labels(collator, [5, 6, 3, 7, 8, 10, 5, 6, 4]) == [[NONE] * 5 + [10] + [NONE] * 3]  # the last is unanswered


def test_a_template_is_found_as_it_stands_within_a_text() -> None:
    tok = Ids()
    within = tok.encode("q\n#a:x")  # no dummy before "#a:"
    collator = DataCollatorForCompletionOnlyLM("#a:", tokenizer=tok)
    assert labels(collator, within) == [[NONE] * (len(within) - 1) + within[-1:]]


@pytest.mark.parametrize("instruction", [None, [5, 6]])
def test_a_row_without_a_template_is_told(instruction: Any) -> None:
    collator = DataCollatorForCompletionOnlyLM([7, 8], instruction, tokenizer=Ids())
    with pytest.warns(UserWarning, match=r"response_template \[7, 8\] does not occur in a row.*'3 4'"):
        assert labels(collator, [3, 4]) == [[NONE, NONE]]
    if instruction:
        with pytest.warns(UserWarning, match="instruction_template .* does not occur"):
            assert labels(collator, [7, 8, 4]) == [[NONE] * 3]


def test_arguments_that_cannot_be_obeyed() -> None:
    with pytest.raises(InputError, match="ignore_index is -1"):
        DataCollatorForCompletionOnlyLM([7], tokenizer=Ids(), ignore_index=-1)
    with pytest.raises(InputError, match="mlm is True"):
        DataCollatorForCompletionOnlyLM([7], tokenizer=Ids(), mlm=True)


def test_padding_free_rows() -> None:
    batch = DataCollatorForCompletionOnlyLM([7], tokenizer=Ids(), padding_free=True)(
        [{"input_ids": [3, 7, 4]}, {"input_ids": [7, 6]}]
    )
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[3, 7, 4, 7, 6]],
        "labels": [[NONE, NONE, 4, NONE, 6]],
        "position_ids": [[0, 1, 2, 0, 1]],
    }


def test_flattening() -> None:
    rows = [{"input_ids": [4, 5, 6]}, {"input_ids": torch.tensor([7, 8])}]
    found = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    assert {name: value.tolist() if torch.is_tensor(value) else value for name, value in found.items()} == {
        "input_ids": [[4, 5, 6, 7, 8]],
        "labels": [[NONE, 5, 6, NONE, 8]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "seq_idx": [[0, 0, 0, 1, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
        "max_length_q": 3,
        "max_length_k": 3,
    }
    assert found["seq_idx"].dtype == found["cu_seq_lens_q"].dtype == torch.int32
    own = DataCollatorWithFlattening(separator_id=9)([{"input_ids": [4, 5], "labels": [1, 2]}])
    assert own["labels"].tolist() == [[9, 2]]


@pytest.mark.parametrize("given", [{}, {"return_position_ids": False, "return_flash_attn_kwargs": True}])
def test_a_run_on_flattened_rows_is_one_on_padded_rows(tmp_path: Path, given: dict[str, Any]) -> None:
    rows = [{"input_ids": list(range(4 + i, 9 + 2 * i))} for i in range(6)]
    losses = []
    for number, collator in enumerate((None, DataCollatorWithFlattening(**given))):
        args = TrainingArguments(str(tmp_path / str(number)), max_steps=3, logging_steps=1, save_strategy="no",
                                 per_device_train_batch_size=2, learning_rate=1e-2)  # fmt: skip
        labelled = [{**row, "labels": row["input_ids"]} for row in rows]
        trainer = Trainer(tiny_model(torch.float32), args, collator, labelled)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # Adam makes much of the last bits of small gradients


def test_a_run_on_answers_only(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tok = AutoTokenizer.from_pretrained(tmp_path)
    tok.pad_token = "<|system|>"
    rows = [dict(tok(f"count {i} # {i} cups")) for i in range(4)]
    collator = DataCollatorForCompletionOnlyLM(" #", tokenizer=tok)
    kept = [(row != NONE).sum().item() for row in collator(rows)["labels"]]
    assert kept == [len(tok(f" {i} cups", add_special_tokens=False)["input_ids"]) for i in range(4)]
    args = TrainingArguments(str(tmp_path / "out"), max_steps=4, logging_steps=1, save_strategy="no",
                             learning_rate=1e-2)  # fmt: skip
    trainer = Trainer(tiny_model(torch.float32, vocab_size=260), args, collator, rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
