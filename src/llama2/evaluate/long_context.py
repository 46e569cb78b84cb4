"""How well a model uses a long context: a fact hidden in a text, and the loss by the position of a token.

The needle: a sentence with a number stands at some depth of a text, and the model is asked for the number at the end
(Kamradt 2023; the passkey of Mohtashami and Jaggi 2023). The loss by position: windows as long as the context, in which
a model that uses its context predicts later tokens better, and one whose positions fail worse.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama2.engine.engine import Engine
from llama2.errors import InputError
from llama2.evaluate import statistics
from llama2.evaluate.perplexity import window_scores
from llama2.evaluate.report import Row
from llama2.evaluate.statistics import Interval, percent

CITIES = (
    "Lisbon", "Nairobi", "Quito", "Oslo", "Hanoi", "Tunis", "Perth", "Lima", "Riga", "Dakar", "Kyoto", "Malmo",
)  # fmt: skip
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Needle:
    """A prompt in whose text `number` stands at a depth, and where that was: tokens of the whole, share before it."""

    tokens: list[int]
    number: str
    length: int
    depth: float


def needles(
    tokenizer: Any, haystack: str, lengths: Sequence[int], depths: Sequence[float], trials: int, seed: int = 0
) -> list[Needle]:
    """Prompts of each length in tokens with the needle at each depth (0 the beginning, 1 the end), `trials` of each.

    Raises InputError where a length leaves no room, or the text is too short (it is not repeated).
    """
    if trials < 1 or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"{trials} trials at depths {list(depths)}; give at least 1 trial, and depths between 0 and 1")
    draw = random.Random(seed)
    words = tokenizer(haystack, verbose=False, add_special_tokens=False)["input_ids"]
    found = []
    for length in lengths:
        for depth in depths:
            for _ in range(trials):
                city, number = draw.choice(CITIES), str(draw.randint(1000, 9999))
                found.append(_needle(tokenizer, words, length, depth, city, number, draw))
    return found


def _needle(
    tokenizer: Any, words: Sequence[int], length: int, depth: float, city: str, number: str, draw: random.Random
) -> Needle:
    def ids(text: str) -> list[int]:
        made: list[int] = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        return made

    before = tokenizer("", verbose=False)["input_ids"]  # BOS where the tokenizer adds one
    fact = ids(f"\nRemember this: the secret number of {city} is {number}.\n")
    question = ids(f"\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is")
    room = length - len(before) - len(fact) - len(question)
    if room < 1:
        raise InputError(
            f"{length} tokens hold no text beside the needle and its question; give at least {length - room + 1}"
        )
    if room > len(words):
        raise InputError(f"the text has {len(words)} tokens and {length} need {room}; give a longer --text")
    start = draw.randrange(len(words) - room + 1)
    text, place = list(words[start : start + room]), round(depth * room)
    return Needle([*before, *text[:place], *fact, *text[place:], *question], number, length, depth)


def find_needles(engine: Engine, prompts: Sequence[Needle]) -> list[bool]:
    """Whether the model tells each number within a few tokens of greedy decoding."""
    found = engine.generate([prompt.tokens for prompt in prompts], max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return [prompt.number in result.text for prompt, result in zip(prompts, found, strict=True)]


def needle_rows(
    name: str, prompts: Sequence[Needle], hits: Sequence[bool]
) -> tuple[list[Row], list[int], list[float], list[list[float]]]:
    """The report's rows, and of the map the lengths, the depths and the shares by depth and length."""
    lengths = sorted({prompt.length for prompt in prompts})
    depths = sorted({prompt.depth for prompt in prompts})
    rows: list[Row] = []
    cells: list[list[float]] = []
    for depth in depths:
        cells.append([])
        for length in lengths:
            own = [hit for p, hit in zip(prompts, hits, strict=True) if p.length == length and p.depth == depth]
            cells[-1].append(sum(own) / len(own))
            test = f"needle found @ {length} tokens, depth {depth:.0%}"
            rows.append(_share_row(name, test, own))
    rows.append(_share_row(name, "needle found", hits))
    return rows, lengths, depths, cells


def _share_row(name: str, test: str, hits: Sequence[bool]) -> Row:
    found: Interval = statistics.share(sum(hits), len(hits))
    return Row(
        name,
        test,
        100 * found.value,
        None,
        "%",
        "higher",
        percent(found.low),
        percent(found.high),
        {"trials": len(hits)},
    )


def loss_by_position(
    model: Any, ids: Sequence[int], window: int, runner: Any, places: int = 16
) -> list[tuple[float, float, float | None]]:
    """For each of `places` stretches of the window its middle, the mean loss in nats there and its standard error, with
    windows as the independent units; only whole windows count."""
    sums: list[list[float]] = []
    edges = np.linspace(0, window - 1, min(places, window - 1) + 1).round().astype(int)
    for (start, end, scored), nll, _ in window_scores(model, ids, window, None, runner):
        if end - start == window and scored == window - 1:
            sums.append([float(nll[a:b].mean()) for a, b in itertools.pairwise(edges)])
    if not sums:
        raise InputError(f"the text has {len(ids)} tokens, which is no whole window of {window}; give a longer --text")
    columns = [statistics.mean(list(column)) for column in zip(*sums, strict=True)]
    middles = [(float(a) + float(b)) / 2 + 1 for a, b in itertools.pairwise(edges)]
    return [(x, found.value, found.error) for x, found in zip(middles, columns, strict=True)]


def position_rows(name: str, window: int, losses: Sequence[tuple[float, float, float | None]]) -> list[Row]:
    """The report's rows of a loss by position; `details` says where each stretch is."""
    return [
        Row(
            name,
            f"loss near position {x:.0f} of {window}",
            y,
            error,
            "nats",
            "lower",
            details={"position": x, "window": window},
        )
        for x, y, error in losses
    ]
