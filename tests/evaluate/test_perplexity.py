"""Perplexity against its definition, token by token."""

import math

import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2.errors import InputError
from llama2.evaluate.perplexity import perplexity, windows


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 1), (20, 20), (64, 5), (2, 2)])
@pytest.mark.parametrize("length", [2, 7, 8, 9, 20])
def test_every_token_with_context_is_scored_once(length: int, window: int, stride: int) -> None:
    scored: list[int] = []
    for start, end, count in windows(length, window, stride):
        assert 0 < end - start <= window and count < end - start
        scored += range(end - count, end)
    unscored = {0} if stride < window else set(range(0, length, window))
    assert scored == [i for i in range(length) if i not in unscored]


@pytest.mark.parametrize("stride", [None, 5])
def test_value_is_the_definition(stride: int | None) -> None:
    model, ids = tiny_model(), tiny_ids(tokens=20)[0]
    total, count = 0.0, 0
    for start, end, scored in windows(20, 8, stride or 8):
        with torch.no_grad():
            p = model(ids[None, start:end]).logits[0].softmax(-1)
        for i in range(end - scored, end):
            total -= math.log(p[i - start - 1, ids[i]])
            count += 1
    result = perplexity(model, ids, 8, stride)
    assert result.tokens == count
    assert result.nll == pytest.approx(total / count, rel=1e-12) and result.value == pytest.approx(math.exp(result.nll))


def test_progress_is_told() -> None:
    told: list[tuple[int, int, float]] = []
    result = perplexity(tiny_model(), tiny_ids(tokens=20)[0].tolist(), 8, None, lambda *args: told.append(args))
    assert [entry[:2] for entry in told] == [(8, 20), (16, 20), (20, 20)]
    assert told[-1][2] == result.value


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "said"),
    [
        (20, 1, None, "between 2 and 64"),
        (20, 65, None, "between 2 and 64"),
        (20, 8, 0, "between 1 and the window"),
        (20, 8, 9, "between 1 and the window"),
        (1, 8, None, "at least 2"),
    ],
)
def test_sizes_that_cannot_work(tokens: int, window: int, stride: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        perplexity(tiny_model(), tiny_ids(tokens=tokens)[0], window, stride)
