"""Beam search against exhaustive search and hand-made tables; parity with transformers is in test_parity."""

import itertools
from typing import Any

import pytest
import torch
from generation.fakes import TableModel
from tiny import tiny_ids, tiny_model

from llama2.generation.loop import compute_transition_scores, generate

END, PAD = 2, 1


def table(*rows: list[float], **fields: Any) -> TableModel:
    """A model over rows of next-token probabilities."""
    return TableModel(torch.tensor(rows).log(), **fields)


def exhaustive(p: torch.Tensor, steps: int, penalty: float) -> tuple[float, list[int]]:
    """The best of all continuations of id 0 that end in END or after `steps` tokens."""
    best: tuple[float, list[int]] = (-1e9, [])
    for length in range(1, steps + 1):
        for path in itertools.product(range(len(p)), repeat=length):
            if END in path[:-1] or (length < steps and path[-1] != END):
                continue
            chain = (0, *path)
            score = sum(float(p[a, b].log()) for a, b in itertools.pairwise(chain)) / length**penalty
            best = max(best, (score, list(path)))
    return best


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_wide_beams_find_the_best_of_all(seed: int, penalty: float) -> None:
    p = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).mul(1.5).softmax(-1)
    score, path = exhaustive(p, 4, penalty)
    out = generate(
        TableModel(p.log(), eos_token_id=END, pad_token_id=PAD),
        torch.tensor([[0]]),
        num_beams=64,
        max_new_tokens=4,
        early_stopping="never",
        length_penalty=penalty,
        return_dict_in_generate=True,
    )
    assert out.sequences[0, 1 : len(path) + 1].tolist() == path
    assert set(out.sequences[0, len(path) + 1 :].tolist()) <= {PAD}
    assert float(out.sequences_scores[0]) == pytest.approx(score, abs=1e-5)


def test_beams_beat_greedy() -> None:
    # greedy takes 1 (0.6) then anything at 0.34; beams find 3 (0.4) then the end at 0.9
    rows = [[0.0, 0.6, 0.0, 0.4], [0.33, 0.33, 0.34, 0.0], [1.0, 0, 0, 0], [0.05, 0.05, 0.9, 0.0]]
    model, start = table(*rows, eos_token_id=END, pad_token_id=PAD), torch.tensor([[0]])
    assert generate(model, start, max_new_tokens=2).tolist() == [[0, 1, 2]]
    assert generate(model, start, max_new_tokens=2, num_beams=2).tolist() == [[0, 3, 2]]


def test_finished_rows_are_padded_with_pad_zero() -> None:
    model = tiny_model(eos_token_id=list(range(5, 25)))
    out = generate(model, tiny_ids(3, 6), num_beams=4, num_return_sequences=4, max_new_tokens=12, pad_token_id=0)
    ends = (out[:, 6:] >= 5) & (out[:, 6:] < 25)
    short = [row for row, end in zip(out[:, 6:].tolist(), ends, strict=True) if bool(end[:-1].any())]
    assert short
    for row in short:
        first = next(i for i, t in enumerate(row) if 5 <= t < 25)
        assert set(row[first + 1 :]) <= {0}


def test_returned_beams_are_distinct_and_sorted() -> None:
    out = generate(
        tiny_model(),
        tiny_ids(2, 5),
        num_beams=4,
        num_return_sequences=3,
        max_new_tokens=5,
        return_dict_in_generate=True,
    )
    assert len({tuple(row) for row in out.sequences.tolist()}) == 6
    scores = out.sequences_scores.view(2, 3)
    assert torch.equal(scores, scores.sort(1, descending=True).values)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4}, {"do_sample": True, "seed": 1}], ids=str)
def test_transition_scores_add_up_to_the_score(settings: dict[str, Any]) -> None:
    model = tiny_model(eos_token_id=list(range(5, 15)))
    out = generate(
        model,
        tiny_ids(2, 5),
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=8,
        length_penalty=0.5,
        output_scores=True,
        return_dict_in_generate=True,
        **settings,
    )
    moves = compute_transition_scores(model, out.sequences, out.scores, out.beam_indices)
    lengths = (out.beam_indices >= 0).sum(1)
    torch.testing.assert_close((moves.sum(1) / lengths**0.5).float(), out.sequences_scores.float())


def test_early_stopping_true_stops_earlier_than_never() -> None:
    steps = {}
    for early in (True, "never"):
        model = tiny_model(eos_token_id=list(range(5, 45)))
        calls: list[int] = []
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        generate(model, tiny_ids(1, 5), num_beams=3, max_new_tokens=20, early_stopping=early)
        steps[early] = len(calls)
    assert steps[True] < steps["never"]


def test_sampled_beams_follow_the_distribution() -> None:
    # One step: 2 * K = 4 of 5 tokens are drawn without replacement, and the likelier 2 of them are the result.
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    model, counts = TableModel(p.log().expand(5, 5)), torch.zeros(5)
    out = generate(
        model,
        torch.zeros(4000, 1, dtype=torch.long),
        do_sample=True,
        top_k=0,
        num_beams=2,
        num_return_sequences=2,
        max_new_tokens=1,
        seed=0,
    )
    for token in out[:, 1]:
        counts[token] += 1
    included = torch.zeros(5)
    for drawn in itertools.permutations(range(5), 4):
        left, chance = 1.0, 1.0
        for i in drawn:
            chance, left = chance * float(p[i]) / left, left - float(p[i])
        included[sorted(drawn)[:2]] += chance
    assert not counts[3:].any() and not included[3:].any()  # never among the likelier two
    error = (counts / 4000 - included)[:3].abs() / (included * (1 - included) / 4000)[:3].sqrt()
    assert float(error.max()) < 4


def test_no_token_left_is_no_crash() -> None:
    model = table([0.5, 0.5, 0.0, 0.0], [1.0, 0, 0, 0], [1.0, 0, 0, 0], [1.0, 0, 0, 0])
    out = generate(model, torch.tensor([[0]]), num_beams=3, do_sample=True, top_k=1, max_new_tokens=3, seed=0)
    assert out.shape == (1, 4)
