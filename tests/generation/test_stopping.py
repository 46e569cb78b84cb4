"""Criteria one by one; stop strings across the borders of tokens."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from generation.fakes import Pieces
from tiny import tiny_ids, tiny_model

from llama2.errors import InputError
from llama2.generation.loop import generate
from llama2.generation.stopping import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

ROWS = torch.tensor([[1, 2, 3], [1, 2, 4]])


def test_length_time_and_ends() -> None:
    assert MaxLengthCriteria(3)(ROWS).tolist() == [True, True]
    assert MaxLengthCriteria(4)(ROWS).tolist() == [False, False]
    assert EosTokenCriteria([4, 5])(ROWS).tolist() == [False, True]
    assert MaxTimeCriteria(60.0)(ROWS).tolist() == [False, False]
    assert MaxTimeCriteria(1.0, initial_timestamp=time.time() - 2)(ROWS).tolist() == [True, True]
    with pytest.raises(InputError, match="positive"):
        MaxTimeCriteria(0)


@pytest.mark.parametrize(("settings", "new"), [({}, 30), ({"max_new_tokens": 3}, 30), ({"max_length": 8}, 30)], ids=str)
def test_a_length_among_the_criteria_counts(settings: dict[str, int], new: int) -> None:
    """As in transformers 5, where the caller's criterion takes the place of the one made from the settings."""
    model, ids = tiny_model(max_position_embeddings=64), tiny_ids(1, 5)
    how: dict[str, Any] = {"eos_token_id": None, "runner": "torch", **settings}
    with pytest.warns(UserWarning, match="which counts; max_") if settings else nullcontext():
        out = generate(model, ids, stopping_criteria=[MaxLengthCriteria(5 + new)], **how)
    assert out.shape[1] == 5 + new
    assert generate(model, ids, stopping_criteria=[MaxLengthCriteria(2)], eos_token_id=None).shape[1] == 6
    from_embeddings = model.get_input_embeddings()(ids)
    out = generate(model, inputs_embeds=from_embeddings, stopping_criteria=[MaxLengthCriteria(4)], eos_token_id=None)
    assert out.shape[1] == 4


def test_a_list_takes_any_callable_and_refuses_nonsense() -> None:
    rows = StoppingCriteriaList([lambda ids, scores: False, lambda ids, scores: ids[:, -1] == 3])
    assert rows(ROWS).tolist() == [True, False]
    assert StoppingCriteriaList([lambda ids, scores: True])(ROWS).tolist() == [True, True]
    assert StoppingCriteriaList()(ROWS).tolist() == [False, False]
    assert StoppingCriteriaList([MaxLengthCriteria(9)]).max_length == 9
    for wrong in (None, "yes", torch.tensor([True]), torch.tensor([1, 0])):
        with pytest.raises(InputError, match="must return a bool"):
            StoppingCriteriaList([lambda ids, scores, wrong=wrong: wrong])(ROWS)


PIECES = Pieces(b" the", b" e", b"nd", b"s here", b"END", b" ", b"\xe2", b"\x82", b"\xac", b"\n", b"x\n\nQ", b" end")
THE, E, ND, S_HERE, END, SPACE, EURO1, EURO2, EURO3, LINE, X_Q, E_ND = range(1, 13)


@pytest.mark.parametrize(
    ("stop", "ids", "done"),
    [
        ("end", [THE, E, ND], True),  # over two tokens
        ("ends", [THE, E, ND, S_HERE], True),  # ends inside the last token
        (" end", [E_ND], True),  # the space of the first token counts
        (" end", [END], False),
        ("end", [THE, E, ND, THE], False),  # ended before the last token
        ("en", [THE, E, ND], True),
        ("the e", [THE, E], True),
        ("the e", [THE, E, ND], False),
        ("€", [THE, EURO1, EURO2], False),
        ("€", [THE, EURO1, EURO2, EURO3], True),
        ("\n\n", [X_Q], True),
        ("\n\n", [LINE, LINE], True),
        ("\n\n", [LINE, X_Q], True),
        ("\n\n", [LINE], False),
        ("zzz", [THE], False),
    ],
)
def test_stop_strings(stop: str, ids: list[int], done: bool) -> None:
    assert StopStringCriteria(PIECES, stop)(torch.tensor([ids])).tolist() == [done]
    assert StopStringCriteria(PIECES, ["qqq", stop])(torch.tensor([[THE] * 40 + ids])).tolist() == [done]


def test_stop_strings_refuse_the_empty() -> None:
    for wrong in ("", [], [""], [3]):
        with pytest.raises(InputError, match="stop_strings"):
            StopStringCriteria(PIECES, wrong)  # type: ignore[arg-type]


def test_stop_strings_with_the_real_vocabulary(tokenizer_model: Path) -> None:
    tokenizer = pytest.importorskip("llama2.tokenizer").load(tokenizer_model)
    text = "The cat sat.\n\nUser: what else? €5 日本"
    ids = tokenizer(text)["input_ids"]
    for stop in ("User:", "\n\nUs", " sat", "ser: w", "€5", "本", ".\n"):
        criterion = StopStringCriteria(tokenizer, stop)
        ends = [n for n in range(1, len(ids) + 1) if criterion.matches(ids[:n])]
        # The first id after which the text holds the whole string, and no id from which on it lies in the past.
        whole = [n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n])]
        assert ends == whole[:1], stop
