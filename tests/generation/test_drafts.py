"""Drafts: prompt lookup, how many guesses hold, how many come next."""

import pytest

from llama2 import InputError
from llama2.generation.drafts import adaptive_count, check_drafts, check_vocabularies, heuristic_count, look_up


def test_look_up() -> None:
    assert look_up([1, 2, 3, 9, 1, 2], 2) == [3, 9]
    assert look_up([1, 2, 3], 2) == []
    assert look_up([5], 2) == []
    assert look_up([1, 2, 3, 1, 7, 2, 1, 2], 1, longest=1) == [1] and look_up([1, 2, 3, 1, 7, 2, 1, 2], 1) == [3]
    assert look_up([8, 9, *range(5), 8], 2, window=5) == [] and look_up([8, 9, *range(5), 8], 2, window=None) == [9, 0]


@pytest.mark.parametrize(
    ("tokens", "ends_at", "held", "taken"),
    [
        ([4, 5, 6, 7], None, 3, 4),
        ([4, 9, 6, 7], None, 1, 2),
        ([9], None, 0, 1),
        ([4, 5, 6], 1, 2, 2),
        ([4, 9], 1, 1, 2),
    ],
)
def test_guesses_hold_up_to_the_first_that_does_not_or_the_end(
    tokens: list[int], ends_at: int | None, held: int, taken: int
) -> None:
    guesses, new = [4, 5, 6], list[int]()

    def take(index: int, token: int) -> tuple[bool, bool]:
        new.append(token)
        return index < len(guesses) and token == guesses[index], index == ends_at

    assert check_drafts(len(guesses), tokens, take) == held and len(new) == taken


def test_counts_of_the_next_proposal() -> None:
    assert [heuristic_count(3, 3, 3), heuristic_count(3, 3, 1), heuristic_count(1, 1, 0)] == [5, 2, 1]
    assert [adaptive_count(3, 3, 9), adaptive_count(3, 3, 3), adaptive_count(3, 1, 9), adaptive_count(3, 0, 9)] == [
        4,
        3,
        2,
        1,
    ]


def test_a_draft_model_has_the_same_vocabulary() -> None:
    check_vocabularies("assistant", 7, 7)
    with pytest.raises(InputError, match="the assistant's vocabulary is 8 but the model's is 7"):
        check_vocabularies("assistant", 8, 7)
