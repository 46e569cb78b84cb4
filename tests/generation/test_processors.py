"""Penalties and bans on logits chosen by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llama2 import processors as pr
from llama2.errors import InputError

INF = math.inf


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def zeros(rows: int = 1, size: int = 6) -> Tensor:
    return torch.zeros(rows, size)


def bans(processor: Any, context: Tensor, size: int = 6) -> list[list[int]]:
    out = processor(context, zeros(len(context), size))
    assert set(out.flatten().tolist()) <= {0.0, -INF}
    return [(row == -INF).nonzero().flatten().tolist() for row in out]


def test_repetition_penalty() -> None:
    out = pr.RepetitionPenaltyLogitsProcessor(2.0)(ids([0, 1, 1]), torch.tensor([[4.0, -4.0, 4.0, -4.0]]))
    assert out.tolist() == [[2.0, -8.0, 4.0, -4.0]]


def test_repetition_penalty_ignores_padding() -> None:
    mask = torch.tensor([[False, False, True]])
    processor = pr.RepetitionPenaltyLogitsProcessor(2.0, mask)
    scores = torch.tensor([[4.0, 4.0, 4.0, 4.0]])
    assert processor(ids([0, 0, 1]), scores).tolist() == [[4.0, 2.0, 4.0, 4.0]]
    assert processor(ids([0, 0, 1, 3]), scores).tolist() == [[4.0, 2.0, 4.0, 2.0]]
    # two rows of one prompt share its mask; a generated id equal to the pad id counts
    both = processor(ids([0, 0, 1, 0], [0, 0, 1, 2]), scores.repeat(2, 1))
    assert both.tolist() == [[2.0, 2.0, 4.0, 4.0], [4.0, 2.0, 2.0, 4.0]]


def test_encoder_repetition_penalty_favours_the_prompt() -> None:
    processor = pr.EncoderRepetitionPenaltyLogitsProcessor(2.0, ids([1]))
    assert processor(ids([1, 2]), torch.tensor([[4.0, 4.0, -4.0]])).tolist() == [[4.0, 8.0, -4.0]]


def test_ngrams() -> None:
    assert bans(pr.NoRepeatNGramLogitsProcessor(2), ids([1, 2, 1], [3, 4, 5])) == [[2], []]
    assert bans(pr.NoRepeatNGramLogitsProcessor(3), ids([1, 2, 3, 1, 2])) == [[3]]
    assert bans(pr.NoRepeatNGramLogitsProcessor(1), ids([1, 2])) == [[1, 2]]
    assert bans(pr.NoRepeatNGramLogitsProcessor(4), ids([1, 2])) == [[]]
    padded = pr.NoRepeatNGramLogitsProcessor(1, torch.tensor([[False, True]]))
    assert bans(padded, ids([0, 2])) == [[2]]
    assert bans(pr.EncoderNoRepeatNGramLogitsProcessor(2, ids([1, 2])), ids([1, 2, 5, 1])) == [[2]]
    assert bans(pr.EncoderNoRepeatNGramLogitsProcessor(2, ids([1, 2])), ids([1, 2, 5, 5])) == [[]]


def test_bad_words() -> None:
    processor = pr.NoBadWordsLogitsProcessor([[1], [2, 3], [2]], eos_token_id=2)
    assert bans(processor, ids([0, 2], [2, 0])) == [[1, 3], [1]]
    assert bans(pr.NoBadWordsLogitsProcessor([[2]], 2), ids([0])) == [[]]
    with pytest.raises(InputError, match="99"):
        pr.NoBadWordsLogitsProcessor([[99]])(ids([0]), zeros())
    with pytest.raises(InputError, match="non-empty"):
        pr.NoBadWordsLogitsProcessor([[]])


def test_sequence_bias() -> None:
    processor = pr.SequenceBiasLogitsProcessor({(1,): 0.5, (3, 2): 2.0, (4, 3, 2): 4.0})
    assert processor(ids([4, 3]), zeros()).tolist() == [[0, 0.5, 6.0, 0, 0, 0]]
    assert processor(ids([3, 4]), zeros()).tolist() == [[0, 0.5, 0, 0, 0, 0]]
    assert pr.SequenceBiasLogitsProcessor([[[1], 0.5]]).sequence_bias == {(1,): 0.5}


def test_lengths() -> None:
    assert bans(pr.MinLengthLogitsProcessor(3, [2, 4]), ids([0, 1])) == [[2, 4]]
    assert bans(pr.MinLengthLogitsProcessor(3, [2, 4]), ids([0, 1, 1])) == [[]]
    assert bans(pr.MinNewTokensLengthLogitsProcessor(2, 1, 2), ids([0, 1])) == [[2]]
    assert bans(pr.MinNewTokensLengthLogitsProcessor(2, 1, 2), ids([0, 1, 1])) == [[]]
    assert bans(pr.ForcedEOSTokenLogitsProcessor(3, 2), ids([0, 1])) == [[0, 1, 3, 4, 5]]
    assert bans(pr.ForcedEOSTokenLogitsProcessor(3, 2), ids([0])) == [[]]
    assert bans(pr.ForcedBOSTokenLogitsProcessor(1), ids([0])) == [[0, 2, 3, 4, 5]]
    decay = pr.ExponentialDecayLengthPenalty((1, 2.0), 2, 1)
    scores = torch.tensor([[1.0, 1.0, -3.0]])
    assert decay(ids([0, 0]), scores).tolist() == [[1.0, 1.0, -3.0]]
    assert decay(ids([0, 0, 0, 0]), scores).tolist() == [[1.0, 1.0, -3.0 + 3.0 * 3.0]]


def test_suppression_and_prefixes() -> None:
    assert bans(pr.SuppressTokensLogitsProcessor([1, 2]), ids([0])) == [[1, 2]]
    assert bans(pr.SuppressTokensAtBeginLogitsProcessor([1], 2), ids([0, 0])) == [[1]]
    assert bans(pr.SuppressTokensAtBeginLogitsProcessor([1], 2), ids([0])) == [[]]
    allowed = pr.PrefixConstrainedLogitsProcessor(lambda row, context: [row, int(context[-1])], 2)
    assert bans(allowed, ids([5], [5], [4])) == [[1, 2, 3, 4], [1, 2, 3, 4], [0, 2, 3, 5]]
    with pytest.raises(InputError, match="no token"):
        pr.PrefixConstrainedLogitsProcessor(lambda row, context: [], 1)(ids([5]), zeros())


def test_invalid_values_and_normalisation() -> None:
    out = pr.InfNanRemoveLogitsProcessor()(ids([0]), torch.tensor([[math.nan, INF, -INF, 1.0]]))
    assert out.tolist() == [[0.0, torch.finfo(torch.float32).max, -INF, 1.0]]
    assert float(pr.LogitNormalization()(ids([0]), torch.randn(1, 5)).exp().sum()) == pytest.approx(1.0)


def test_guidance_of_halves() -> None:
    out = pr.ClassifierFreeGuidanceLogitsProcessor(2.0)(ids([0]), torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    assert out.tolist() == [[5.0, 1.0]]
    with pytest.raises(InputError, match="twice"):
        pr.ClassifierFreeGuidanceLogitsProcessor(2.0)(ids([0]), zeros())


def test_processors_leave_their_input_alone() -> None:
    scores, before = torch.randn(1, 6), None
    for processor in (
        pr.NoRepeatNGramLogitsProcessor(1),
        pr.SuppressTokensLogitsProcessor([1]),
        pr.SequenceBiasLogitsProcessor({(1,): 1.0, (2, 3): 1.0}),
        pr.RepetitionPenaltyLogitsProcessor(2.0),
    ):
        before = scores.clone()
        assert not torch.equal(processor(ids([1, 2]), scores), before)
        assert torch.equal(scores, before)
