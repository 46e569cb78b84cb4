"""Drafts: what is guessed of a text, how many of the guesses hold, and how many are made next. No torch here.

generate()'s speculation and the engine both propose, check and count here. They differ in how a token is picked at a
guess: generate() accepts a guess with the probability min(1, p / q) (Leviathan et al. 2023), the engine where it is the
token that the request's seed draws without any.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from llama2.errors import InputError

Logits = TypeVar("Logits")


def look_up(tokens: Sequence[int], count: int, longest: int = 3, window: int | None = 2048) -> list[int]:
    """Returns the tokens that followed the latest earlier occurrence of the last few tokens: `count` guesses at most
    (prompt lookup).

    longest: of the last tokens compared, the longest match wins. window: how far back to look, None for all.
    """
    recent = list(tokens if window is None else tokens[-window:])
    for size in range(min(longest, len(recent) - 1), 0, -1):
        tail = recent[-size:]
        for start in range(len(recent) - size - 1, -1, -1):
            if recent[start] == tail[0] and recent[start : start + size] == tail:
                return recent[start + size : start + size + count]
    return []


def check_drafts(drafted: int, rows: Iterable[Logits], take: Callable[[int, Logits], tuple[bool, bool]]) -> int:
    """Picks a token per row of logits until a guess does not hold or the text ends; returns how many guesses held.

    rows: behind the last token and behind each of the `drafted` guesses. take: picks and keeps a token from the logits
    of a row, and returns whether the guess at that row held (False behind the last one) and whether the text has ended.
    """
    for index, logits in enumerate(rows):
        holds, ended = take(index, logits)
        if ended or not holds:
            return index + int(holds)
    return drafted


def check_vocabularies(role: str, draft: int, model: int) -> None:
    """Raises InputError where a draft model (`role`: its name in messages) has another vocabulary than the model."""
    if draft != model:
        raise InputError(f"the {role}'s vocabulary is {draft} but the model's is {model}; both must be the same")


def heuristic_count(count: int, proposed: int, held: int) -> int:
    """The guesses after a proposal by transformers' schedule "heuristic": two more after a full success, else one less.

    Returns at least 1."""
    return count + 2 if held == proposed else max(1, count - 1)


def adaptive_count(proposed: int, held: int, most: int) -> int:
    """The guesses after a proposal in the engine, `most` at most: one more after a full success, else one more than
    held, since each costs every request of the step."""
    return min((proposed if held == proposed else held) + 1, most)
