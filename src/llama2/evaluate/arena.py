"""Two models' answers beside each other, judged: by a model, a server or a function of yours. No torch.

Every pair is judged twice, with its answers swapped: a judge that prefers a place contradicts itself then, and the
pair is a tie. Ratings of people are read too, on the 7-point scale of Llama 2's paper: 7 "the first is much better",
4 "about the same", 1 "the second is much better".
"""

import importlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from llama2.errors import InputError, Llama2Error
from llama2.evaluate import statistics
from llama2.evaluate.report import Row

Verdict = Literal["first", "second", "tie", "unreadable"]
Judge = Callable[[str, str, str], Any]  # prompt, first answer, second answer -> a verdict in any readable form
SECONDS = 300
INSTRUCTION = (
    "Act as an impartial judge of two answers to the question below. Weigh whether they are helpful, correct, "
    "relevant, deep and harmless; their order and their length must not influence you. Explain briefly, then end with "
    "exactly [[A]] if answer A is better, [[B]] if answer B is better, or [[C]] for a tie.\n\n"
    "[Question]\n{prompt}\n\n[Answer A]\n{first}\n[End of answer A]\n\n[Answer B]\n{second}\n[End of answer B]"
)
_MARK = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)
_WORDS: dict[str, Verdict] = {
    "a": "first", "first": "first", "1st": "first", "b": "second", "second": "second", "2nd": "second",
    "c": "tie", "tie": "tie", "draw": "tie", "equal": "tie", "same": "tie",
}  # fmt: skip


class JudgedPair(NamedTuple):
    """A pair as it was judged in both orders; `winner` is a tie where the two contradict each other."""

    winner: Verdict
    forward: Verdict
    swapped: Verdict


def read_verdict(said: Any) -> Verdict:
    """Parses a judge's verdict: a mark such as [[A]], a word, or a rating from 1 to 7 (from 5 on the first is
    better)."""
    if isinstance(said, bool):
        return "unreadable"
    if isinstance(said, int | float):
        if not 1 <= said <= 7:
            return "unreadable"
        return "first" if said > 4 else "second" if said < 4 else "tie"
    marks = _MARK.findall(str(said))
    if marks:
        return _WORDS[marks[-1].lower()]
    return _WORDS.get(str(said).strip().strip(".").lower(), "unreadable")


def judge_pair(judge: Judge, prompt: str, first: str, second: str) -> JudgedPair:
    """Asks a judge in both orders."""
    forward, back = read_verdict(judge(prompt, first, second)), read_verdict(judge(prompt, second, first))
    turned: dict[Verdict, Verdict] = {"first": "second", "second": "first"}
    swapped = turned.get(back, back)
    return JudgedPair(forward if forward == swapped and forward != "unreadable" else "tie", forward, swapped)


def rows(first: str, second: str, outcomes: Sequence[JudgedPair]) -> list[Row]:
    """The report's rows: the win rate with ties as half a win, its Wilson interval, and how the judge behaved."""
    count = len(outcomes)
    wins = sum(o.winner == "first" for o in outcomes)
    losses = sum(o.winner == "second" for o in outcomes)
    ties = count - wins - losses
    agreed = sum(o.forward == o.swapped for o in outcomes)
    unread = sum("unreadable" in (o.forward, o.swapped) for o in outcomes)
    rate = statistics.share(wins + ties / 2, count)
    details = {"wins": wins, "losses": losses, "ties": ties, "pairs": count, "against": second}
    low, high = statistics.percent(rate.low), statistics.percent(rate.high)
    return [
        Row(first, f"win rate against {second}", 100 * rate.value, None, "%", "higher", low, high, details),
        Row(first, "wins", wins),
        Row(first, "losses", losses),
        Row(first, "ties", ties),
        Row(first, "judged alike in both orders", 100 * agreed / count, None, "%"),
        Row(first, "verdicts that could not be read", unread),
    ]


def read_ratings(lines: Sequence[Any]) -> list[JudgedPair]:
    """Outcomes from people's 7-point ratings, as numbers or as objects with "rating". Raises InputError for others."""
    found = []
    for number, line in enumerate(lines):
        rating = line.get("rating") if isinstance(line, dict) else line
        if isinstance(rating, bool) or not isinstance(rating, int | float) or not 1 <= rating <= 7:
            raise InputError(f'line {number + 1} has the rating {rating!r}; give a number from 1 to 7 as "rating"')
        verdict = read_verdict(rating)
        found.append(JudgedPair(verdict, verdict, verdict))
    return found


def python_judge(name: str) -> Judge:
    """The function of "module:function". Raises InputError where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"--judge python:{name}: {error}; give python:module:function of a module on the path"
        ) from error
    if not callable(found):
        raise InputError(f"--judge python:{name} is no function; it is called with a prompt and two answers")
    judge: Judge = found
    return judge


def url_judge(url: str, model: str = "judge", key: str | None = None) -> Judge:
    """A server with OpenAI's chat API: the address of /v1/chat/completions, or what stands before it."""
    base = url.rstrip("/")
    address = base if base.endswith("/chat/completions") else f"{base.removesuffix('/v1')}/v1/chat/completions"

    def ask(prompt: str, first: str, second: str) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": INSTRUCTION.format(prompt=prompt, first=first, second=second)}],
            "temperature": 0,
            "max_tokens": 512,
        }
        headers = {"Content-Type": "application/json", **({} if key is None else {"Authorization": f"Bearer {key}"})}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except (urllib.error.URLError, OSError, ValueError, LookupError, TypeError) as error:
            raise JudgeError(f"the judge at {address} gave no verdict: {error}") from error

    return ask


class JudgeError(Llama2Error, RuntimeError):
    """A judge that cannot be reached, or whose answer is none."""
