"""Filters on distributions of a few entries, worked out by hand; draws against exact probabilities."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.generation.arrays import NUMPY
from llama2.generation.config import GenerationConfig
from llama2.generation.filters import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    Prompt,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    build_processors,
)
from llama2.generation.sampler import Sampler
from llama2.generation.seeded import SeededSampler, row_seeds

NO_IDS = torch.empty((1, 0), dtype=torch.long)


def kept(warper: Any, p: list[float]) -> list[int]:
    """Which tokens a filter leaves of the distribution p; those left must keep their logits."""
    logits = torch.tensor([p]).log()
    out = warper(NO_IDS, logits)
    left = (out > -math.inf).nonzero()[:, 1].tolist()
    assert torch.equal(out[:, left], logits[:, left])
    return left


@pytest.mark.parametrize(
    ("warper", "p", "left"),
    [
        (TopKLogitsWarper(1), [0.1, 0.6, 0.3], [1]),
        (TopKLogitsWarper(2), [0.1, 0.6, 0.3], [1, 2]),
        (TopKLogitsWarper(2), [0.25, 0.5, 0.25], [0, 1, 2]),  # ties with the second stay
        (TopKLogitsWarper(9), [0.1, 0.6, 0.3], [0, 1, 2]),
        (TopKLogitsWarper(1, min_tokens_to_keep=2), [0.1, 0.6, 0.3], [1, 2]),
        (TopPLogitsWarper(0.5), [0.1, 0.6, 0.3], [1]),
        (TopPLogitsWarper(0.7), [0.1, 0.6, 0.3], [1, 2]),
        (TopPLogitsWarper(0.89), [0.1, 0.6, 0.3], [1, 2]),
        (TopPLogitsWarper(0.91), [0.1, 0.6, 0.3], [0, 1, 2]),
        (TopPLogitsWarper(0.0), [0.1, 0.6, 0.3], [1]),
        (TopPLogitsWarper(0.1, min_tokens_to_keep=2), [0.1, 0.6, 0.3], [1, 2]),
        (MinPLogitsWarper(0.4), [0.1, 0.6, 0.3], [1, 2]),  # bound 0.24
        (MinPLogitsWarper(0.6), [0.1, 0.6, 0.3], [1]),  # bound 0.36
        (MinPLogitsWarper(0.6, min_tokens_to_keep=2), [0.1, 0.6, 0.3], [1, 2]),
        # entropy of (.6 .3 .1) = 0.898; surprises 0.51 1.20 2.30 -> distances 0.39 0.31 1.40
        (TypicalLogitsWarper(0.2), [0.1, 0.6, 0.3], [2]),
        (TypicalLogitsWarper(0.5), [0.1, 0.6, 0.3], [1, 2]),
        (TypicalLogitsWarper(0.2, min_tokens_to_keep=2), [0.1, 0.6, 0.3], [1, 2]),
        (EpsilonLogitsWarper(0.2), [0.1, 0.6, 0.3], [1, 2]),
        (EpsilonLogitsWarper(0.9), [0.1, 0.6, 0.3], [1]),
        # entropy 0.898: sqrt(.2) exp(-.898) = 0.182 < 0.2
        (EtaLogitsWarper(0.2), [0.1, 0.6, 0.3], [1, 2]),
        # uniform over 4: entropy 1.386, sqrt(.3)/4 = 0.137; nothing below
        (EtaLogitsWarper(0.3), [0.25, 0.25, 0.25, 0.25], [0, 1, 2, 3]),
        (EtaLogitsWarper(0.9, min_tokens_to_keep=1), [0.05, 0.9, 0.05], [1]),
        # shares of the entropy: .306 .361 .230 of .898; half is .449
        (TopHLogitsWarper(0.5), [0.1, 0.6, 0.3], [1]),
        (TopHLogitsWarper(0.8), [0.1, 0.6, 0.3], [1, 2]),
    ],
    ids=lambda x: type(x).__name__ if hasattr(x, "filter_value") else str(x),
)
def test_filter(warper: Any, p: list[float], left: list[int]) -> None:
    assert kept(warper, p) == left


def test_temperature_is_exact() -> None:
    p = TemperatureLogitsWarper(0.5)(NO_IDS, torch.tensor([[0.2, 0.8]]).log()).softmax(-1)
    torch.testing.assert_close(p, torch.tensor([[0.04 / 0.68, 0.64 / 0.68]]))


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_top_p_of_the_likely_ones_equals_the_full_sort(
    rows: int, behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(rows, 5000, generator=torch.Generator().manual_seed(1)).mul(2).round(decimals=1)  # many ties
    left = TopKLogitsWarper(40)(NO_IDS, scores) if behind else scores
    fast = [TopPLogitsWarper(p, min_tokens_to_keep=2)(NO_IDS, left) for p in (0.0, 0.3, 0.9, 0.999)]
    monkeypatch.setattr(NUMPY, "likely", lambda p, least, keep: None)
    for p, got in zip((0.0, 0.3, 0.9, 0.999), fast, strict=True):
        assert torch.equal(got, TopPLogitsWarper(p, min_tokens_to_keep=2)(NO_IDS, left))
    assert int((fast[1] > -math.inf).sum()) < int((fast[2] > -math.inf).sum())


@pytest.mark.parametrize(
    "make",
    [
        lambda: TemperatureLogitsWarper(0.0),
        lambda: TopKLogitsWarper(0),
        lambda: TopPLogitsWarper(1.1),
        lambda: MinPLogitsWarper(-0.1),
        lambda: TypicalLogitsWarper(0.0),
        lambda: EpsilonLogitsWarper(1.0),
        lambda: EtaLogitsWarper(0.0),
        lambda: TopHLogitsWarper(2.0),
        lambda: TopKLogitsWarper(3, min_tokens_to_keep=0),
    ],
)
def test_refused_arguments(make: Any) -> None:
    with pytest.raises(InputError, match="must be"):
        make()


def names(**fields: Any) -> list[str]:
    config = GenerationConfig(eos_token_id=2, **fields)
    return [type(p).__name__ for p in build_processors(config, Prompt(torch.tensor([[1, 3]])), 9)]


def test_min_new_tokens_counts_beside_min_length() -> None:
    """As transformers' _prepare_generated_length: min_length is then the prompt and min_new_tokens, also for 0."""
    assert names(min_length=3) == ["MinLengthLogitsProcessor"]
    assert names(min_length=30, min_new_tokens=2) == ["MinNewTokensLengthLogitsProcessor"]
    assert names(min_length=30, min_new_tokens=0) == []


def test_order_of_everything() -> None:
    everything = names(
        sequence_bias={(1,): 1.0},
        encoder_repetition_penalty=1.1,
        repetition_penalty=1.1,
        no_repeat_ngram_size=2,
        encoder_no_repeat_ngram_size=2,
        bad_words_ids=[[5]],
        min_new_tokens=2,
        forced_bos_token_id=1,
        forced_eos_token_id=2,
        remove_invalid_values=True,
        exponential_decay_length_penalty=(1, 1.1),
        suppress_tokens=[4],
        begin_suppress_tokens=[4],
        do_sample=True,
        temperature=0.5,
        top_h=0.5,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.5,
        epsilon_cutoff=0.1,
        eta_cutoff=0.1,
        renormalize_logits=True,
    )
    assert everything == [
        "SequenceBiasLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "SuppressTokensLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "LogitNormalization",
    ]


def test_neutral_values_build_nothing() -> None:
    assert names() == []
    assert names(temperature=0.5, top_k=3) == []  # greedy
    assert names(do_sample=True) == ["TopKLogitsWarper"]
    assert names(do_sample=True, top_k=0, temperature=1, top_p=1.0, typical_p=1.0, min_p=None) == []


def test_own_processors_come_before_the_filters_and_replace_their_kind() -> None:
    def own(ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 1

    config, prompt = GenerationConfig(do_sample=True, temperature=0.5, renormalize_logits=True), Prompt(NO_IDS)
    built = build_processors(config, prompt, 9, [own])
    assert built[0] is own and len(built) == 4
    mine = TopKLogitsWarper(3)
    with pytest.warns(UserWarning, match="TopKLogitsWarper replaces"):
        built = build_processors(config, prompt, 9, [mine])
    assert [p for p in built if isinstance(p, TopKLogitsWarper)] == [mine]


P = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])


def chi_square(counts: Tensor, p: Tensor) -> float:
    """Pearson's statistic over the entries that can occur."""
    expected = p[p > 0] * counts.sum()
    return float(((counts[p > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seeded", [False, True])
def test_draws_follow_the_distribution(seeded: bool) -> None:
    rows, steps = 100, 100
    sampler = Sampler(True, seeds=range(rows)) if seeded else Sampler(True, generator=torch.Generator().manual_seed(0))
    logits = P.log().expand(rows, -1)
    counts = torch.bincount(torch.cat([sampler(logits)[0] for _ in range(steps)]), minlength=5)
    assert counts[4] == 0
    assert chi_square(counts, P) < 16.3  # 0.1 % point of 3 degrees of freedom


def test_inverse_of_the_cumulative_distribution_at_its_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = SeededSampler(True, [0])
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    # [0, .25) is token 1, [.25, 1) token 3; a number that rounds up to 1 is still token 3, never the empty token 4
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (1.0, 3)):
        monkeypatch.setattr(sampler, "uniform", lambda u=u: np.array([u]))
        assert sampler.draw(p).tolist() == sampler.draw(p.numpy()).tolist() == [token]


def test_a_seeded_row_draws_the_same_in_any_company() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    together, alone = Sampler(True, seeds=[7, 8, 9, 10]), Sampler(True, seeds=[9])
    for _ in range(70):  # more than one block of numbers
        assert together(logits)[0][2] == alone(logits[2:3])[0][0]


def test_greedy_takes_the_first_best() -> None:
    tokens, peak = Sampler(False)(torch.tensor([[0.0, 3.0, 3.0], [math.nan, 1.0, 2.0]]))
    assert tokens[0] == 1 and peak[0] == 3.0 and not peak[1].isfinite()


def test_row_seeds() -> None:
    assert row_seeds(None, 2, 2) is None
    assert row_seeds(5, 2, 2) == [5, 6, 7, 8]
    assert row_seeds([5, 50], 2, 2) == [5, 6, 50, 51]
    assert row_seeds([1, 2, 3, 4], 2, 2) == [1, 2, 3, 4]
    with pytest.raises(InputError, match="3 entries"):
        row_seeds([1, 2, 3], 2, 2)
