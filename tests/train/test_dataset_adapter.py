"""Data sets as users of transformers give them to a Trainer: streams, texts, what is said of rows that are not used."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2 import AutoTokenizer, InputError, Trainer, TrainingArguments
from llama2.train.dataset_adapter import objective_for


@pytest.fixture
def tok(tmp_path: Path) -> Any:
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def model(**changes: Any) -> Any:
    return tiny_model(torch.float32, vocab_size=300, **changes)


def test_an_endless_stream(tmp_path: Path) -> None:
    """transformers: a data set without a length needs max_steps, and is not read further than the steps need."""
    served: list[int] = []

    def endless() -> Any:
        for i in itertools.count():
            served.append(i)
            yield {"input_ids": [1 + i % 5, 2, 3]}

    settings = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "save_strategy": "no"}
    done = Trainer(model=model(), args=TrainingArguments(**settings, max_steps=3), train_dataset=endless()).train()
    assert done.global_step == 3 and len(served) == 6
    with pytest.raises(InputError, match=r"has no length; say how many steps to train \(max_steps\)"):
        Trainer(model=model(), args=TrainingArguments(**settings), train_dataset=endless())


def test_rows_that_are_cut_left_out_or_not_used_are_told(tok: Any) -> None:
    rows = [{"text": "a" * 100, "id": 1}, {"prompt": "a", "completion": "b", "label": False}, {"text": "fine", "id": 2}]
    with pytest.warns(UserWarning, match=r"of 3 rows: 1 answers are cut at the longest length of 64 tokens") as said:
        items = objective_for(model(), rows, tok)[1]
    assert len(items) == 2 and len(said) == 1
    assert "1 rows left out, a label beside one answer" in str(said[0].message)
    assert "columns that are not used: id (2 rows)" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective_for(model(), [{"text": "fine"}], tok)


def test_rows_of_which_none_can_be_used(tmp_path: Path, tok: Any) -> None:
    verdicts = [{"prompt": "a", "completion": "b", "label": False}]
    with pytest.raises(InputError, match="(?s)no row of the data set can be used.*KTO"):
        objective_for(model(), verdicts, tok)
    args, fine = TrainingArguments(output_dir=str(tmp_path / "out")), [{"text": "fine"}]
    for rows, said in (([], "eval_dataset has no rows"), (verdicts, "no row of the data set can be used")):
        with pytest.raises(InputError, match=said):
            Trainer(model=model(), args=args, train_dataset=fine, eval_dataset=rows, processing_class=tok)
    with pytest.raises(InputError, match="there are no rows to measure on"):
        Trainer(model=model(), args=args, train_dataset=fine, processing_class=tok).evaluate()
