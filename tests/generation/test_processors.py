"""Penalties and bans on logits chosen by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.generation import filters
from llama2.generation import processors as pr
from llama2.generation.guidance import PrefixConstrainedLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
from llama2.generation.stopping import EosTokenCriteria, MaxTimeCriteria

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
    processor = pr.RepetitionPenaltyLogitsProcessor(2.0, prompt_mask=mask)
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
    allowed = PrefixConstrainedLogitsProcessor(lambda row, context: [row, int(context[-1])], 2)
    assert bans(allowed, ids([5], [5], [4])) == [[1, 2, 3, 4], [1, 2, 3, 4], [0, 2, 3, 5]]
    with pytest.raises(InputError, match="no token"):
        PrefixConstrainedLogitsProcessor(lambda row, context: [], 1)(ids([5]), zeros())


def _allow(row: int, context: Tensor) -> list[int]:
    return [1]


ATTRIBUTES: list[tuple[Any, dict[str, Any]]] = [  # what transformers 4.46 and 5.0 show of each
    (pr.MinLengthLogitsProcessor(3, 2, device="cpu"), {"min_length": 3, "eos_token_id": [2]}),
    (
        pr.MinNewTokensLengthLogitsProcessor(4, 3, [2, 5], device="cpu"),
        {"prompt_length_to_skip": 4, "min_new_tokens": 3, "eos_token_id": [2, 5]},
    ),
    (filters.TemperatureLogitsWarper(0.5), {"temperature": 0.5}),
    (pr.RepetitionPenaltyLogitsProcessor(2.0, 1), {"penalty": 2.0, "prompt_ignore_length": 1}),
    (
        pr.EncoderRepetitionPenaltyLogitsProcessor(2.0, ids([1, 3])),
        {"penalty": 0.5, "encoder_input_ids": [[1, 3]]},
    ),
    (filters.TopPLogitsWarper(0.5), {"top_p": 0.5, "filter_value": -INF, "min_tokens_to_keep": 1}),
    (filters.TopKLogitsWarper(2, min_tokens_to_keep=3), {"top_k": 3, "filter_value": -INF}),
    (filters.TopHLogitsWarper(0.5), {"top_h": 0.5, "top_n": 100, "filter_value": -INF}),
    (filters.MinPLogitsWarper(0.1), {"min_p": 0.1, "filter_value": -INF, "min_tokens_to_keep": 1}),
    (filters.TypicalLogitsWarper(0.4), {"mass": 0.4, "filter_value": -INF, "min_tokens_to_keep": 1}),
    (filters.EpsilonLogitsWarper(0.1), {"epsilon": 0.1, "filter_value": -INF, "min_tokens_to_keep": 1}),
    (filters.EtaLogitsWarper(0.1, device="cpu"), {"epsilon": 0.1, "filter_value": -INF, "min_tokens_to_keep": 1}),
    (pr.NoRepeatNGramLogitsProcessor(2), {"ngram_size": 2}),
    (pr.EncoderNoRepeatNGramLogitsProcessor(2, ids([1], [3])), {"ngram_size": 2, "batch_size": 2}),
    (pr.SequenceBiasLogitsProcessor([[[4, 5], -0.5]]), {"sequence_bias": {(4, 5): -0.5}}),
    (pr.NoBadWordsLogitsProcessor([[4, 5]], 2), {"bad_word_ids": [[4, 5]], "sequence_bias": {(4, 5): -INF}}),
    (PrefixConstrainedLogitsProcessor(_allow, 3), {"_prefix_allowed_tokens_fn": _allow, "_num_beams": 3}),
    (pr.ForcedBOSTokenLogitsProcessor(1), {"bos_token_id": 1}),
    (pr.ForcedEOSTokenLogitsProcessor(9, 2, device="cpu"), {"max_length": 9, "eos_token_id": [2]}),
    (
        pr.ExponentialDecayLengthPenalty((3, 1.5), 2, 4),
        {"regulation_start": 7, "regulation_factor": 1.5, "eos_token_id": [2]},
    ),
    (pr.SuppressTokensLogitsProcessor([1, 3], device="cpu"), {"suppress_tokens": [1, 3]}),
    (
        pr.SuppressTokensAtBeginLogitsProcessor([1, 3], 5, device="cpu"),
        {"begin_suppress_tokens": [1, 3], "begin_index": 5},
    ),
    (pr.ClassifierFreeGuidanceLogitsProcessor(2.0), {"guidance_scale": 2.0}),
    (UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, print), {"guidance_scale": 1.5, "model": print}),
    (EosTokenCriteria(2), {"eos_token_id": [2]}),
    (MaxTimeCriteria(2.0, initial_timestamp=3.0), {"max_time": 2.0, "initial_timestamp": 3.0}),
]


@pytest.mark.parametrize(("processor", "expected"), ATTRIBUTES, ids=lambda x: type(x).__name__)
def test_public_attributes_have_the_names_of_transformers(processor: Any, expected: dict[str, Any]) -> None:
    shown = {name: getattr(processor, name) for name in expected}
    assert {n: v.tolist() if isinstance(v, Tensor) else v for n, v in shown.items()} == expected


def test_repetition_penalty_without_the_prompt() -> None:
    """The first ids do not count, those that come later do; a prompt alone changes nothing."""
    processor = pr.RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=2)
    scores = torch.tensor([[4.0, 4.0, -4.0]])
    assert torch.equal(processor(ids([0, 1]), scores), scores)
    assert processor(ids([0, 1, 2]), scores).tolist() == [[4.0, 4.0, -8.0]]
    with pytest.raises(InputError, match="prompt_ignore_length is -1"):
        pr.RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=-1)


def test_the_place_of_suppression_moves() -> None:
    processor = pr.SuppressTokensAtBeginLogitsProcessor([1], 2)
    processor.set_begin_index(1)
    assert bans(processor, ids([0])) == [[1]] and bans(processor, ids([0, 0])) == [[]]


def test_a_prompt_without_rows_is_one_row() -> None:
    processor = pr.EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor([1, 2, 1, 1]))
    assert bans(processor, ids([1, 2, 1], [8, 0, 2]), 3) == [[1, 2], [1]]


def test_keywords_go_to_those_that_take_them() -> None:
    """As transformers': a processor with further arguments gets all of them, one without gets none."""

    def shift(input_ids: Tensor, scores: Tensor, by: float) -> Tensor:
        return scores + by

    both = pr.LogitsProcessorList([pr.NoRepeatNGramLogitsProcessor(1), shift])
    assert both(ids([1]), zeros(), by=2.0).tolist() == [[2.0, -INF, 2.0, 2.0, 2.0, 2.0]]
    with pytest.raises(InputError, match="needs by"):
        both(ids([1]), zeros(), other=1)


def test_guidance_asks_any_model_of_ids_and_mask() -> None:
    """scale * (log p(cond) - log p(uncond)) + log p(uncond); no positions where there is no padding."""

    class Plain:
        def __call__(self, input_ids: Tensor, attention_mask: Any, use_cache: Any, past_key_values: Any) -> Any:
            return SimpleNamespace(logits=torch.tensor([[[1.0, 0.0, 1.5]]]), past_key_values=None)

    out = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, Plain(), ids([0]))(ids([0]), torch.ones(1, 3))
    uncond, cond = torch.tensor([1.0, 0.0, 1.5]).log_softmax(-1), torch.ones(3).log_softmax(-1)
    assert torch.allclose(out[0], uncond + 1.5 * (cond - uncond))


def test_invalid_values_and_normalisation() -> None:
    out = pr.InfNanRemoveLogitsProcessor()(ids([0]), torch.tensor([[math.nan, INF, -INF, 1.0]]))
    assert out.tolist() == [[0.0, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min, 1.0]]
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
