"""Regular expressions that come with files, matched in time that grows with the pattern times the text.

Python's engine tries every way to match, so that `(a+)+b` on forty letters never ends. Here a pattern is parsed by
Python and becomes a small program, of which each instruction is tried once at each place of a text (as in RE2's
BitState: Cox, Regular Expression Matching: the Virtual Machine Approach, 2009). Groups capture nothing: once is enough.
Lookaheads and lookbehinds are programs of their own, within one budget; backreferences, conditions and atomic groups,
which are no regular expressions, are refused. A pattern without repeats and choices goes through Python's engine.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from llama2.errors import InputError
from llama2.text_file import shown

MAX_CHARACTERS, MAX_STEPS, MAX_TRIES = 10_000, 20_000, 1_000_000
_WAYS = frozenset("*+?{|")  # what gives an engine more than one way to try


class _Step(NamedTuple):
    """One instruction: "char" (a test of one character), "place" (a test of a position), "look" (a program that must
    match there, or must not), "split" (two ways on), "jump", "match"."""

    kind: str
    to: int = 0
    other: int = 0
    test: Any = None


class Pattern:
    """A pattern as a program. Raises InputError for one that is no pattern, too large, or not regular."""

    def __init__(self, source: str) -> None:
        try:
            if len(source) > MAX_CHARACTERS:
                raise InputError(f"a pattern has {len(source):,} characters; at most {MAX_CHARACTERS:,} are allowed")
            tree = _parser.parse(source)
            self._steps: list[_Step] = []
            self._add(tree, tree.state.flags)
            self._put("match")
        except (re.error, RecursionError, OverflowError, TypeError) as error:
            raise InputError(f"{shown(source)} is not a pattern: {error}") from error

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches."""
        return any(end == len(text) for end in self._ends(text, 0))

    def match(self, text: str) -> bool:
        """Whether the text matches from its beginning."""
        return any(True for _ in self._ends(text, 0))

    # -- running -------------------------------------------------------------------------------------------------

    def _ends(self, text: str, at: int, budget: list[int] | None = None) -> Iterator[int]:
        """Every place where a match that begins at `at` can end. budget: what may still be tried, lookarounds included.

        Raises InputError where that is used up."""
        budget = [MAX_TRIES] if budget is None else budget
        seen: set[tuple[int, int]] = set()
        waiting = [(0, at)]
        while waiting:
            state = waiting.pop()
            if state in seen:
                continue
            seen.add(state)
            budget[0] -= 1
            if budget[0] < 0:
                raise InputError(f"a pattern takes more than {MAX_TRIES:,} tries on {shown(text)}; simplify it")
            number, place = state
            step = self._steps[number]
            if step.kind == "match":
                yield place
            elif step.kind == "jump":
                waiting.append((step.to, place))
            elif step.kind == "split":
                waiting += [(step.to, place), (step.other, place)]
            elif step.kind == "char":
                if place < len(text) and step.test(text[place]):
                    waiting.append((number + 1, place + 1))
            elif step.test(text, place, budget):
                waiting.append((number + 1, place))

    # -- compiling -----------------------------------------------------------------------------------------------

    def _put(self, kind: str, to: int = 0, other: int = 0, test: Any = None) -> int:
        if len(self._steps) >= MAX_STEPS:
            raise InputError(f"a pattern becomes more than {MAX_STEPS:,} steps; repeat less in it")
        self._steps.append(_Step(kind, to, other, test))
        return len(self._steps) - 1

    def _add(self, tree: Any, flags: int) -> None:
        for operator, value in tree:
            self._operator(operator, value, flags)

    def _operator(self, operator: Any, value: Any, flags: int) -> None:
        if operator in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            self._put("char", test=_character(operator, value, flags))
        elif operator == sre.AT:
            self._put("place", test=_position(value, flags))
        elif operator == sre.SUBPATTERN:
            _, added, removed, inner = value
            self._add(inner, (flags | added) & ~removed)
        elif operator == sre.BRANCH:
            self._branches(value[1], flags)
        elif operator in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, inner = value
            self._repeat(least, most, inner, flags)
        elif operator in (sre.ASSERT, sre.ASSERT_NOT):
            self._put("place", test=_look(operator, value, flags))
        else:
            raise InputError(
                f"a pattern uses {str(operator).lower()}, which is no regular expression; write it without"
            )

    def _branches(self, branches: list[Any], flags: int) -> None:
        ends = []
        for branch in branches[:-1]:
            split = self._put("split")
            self._add(branch, flags)
            ends.append(self._put("jump"))
            self._steps[split] = _Step("split", split + 1, len(self._steps))
        self._add(branches[-1], flags)
        for end in ends:
            self._steps[end] = _Step("jump", len(self._steps))

    def _repeat(self, least: int, most: int, inner: Any, flags: int) -> None:
        for _ in range(least):
            self._counted(inner, flags)
        if most == sre.MAXREPEAT:
            split = self._put("split")
            self._counted(inner, flags)
            self._put("jump", split)
            self._steps[split] = _Step("split", split + 1, len(self._steps))
            return
        splits = []
        for _ in range(most - least):
            splits.append(self._put("split"))
            self._counted(inner, flags)
        for split in splits:
            self._steps[split] = _Step("split", split + 1, len(self._steps))

    def _counted(self, inner: Any, flags: int) -> None:
        """One repetition; an empty one counts as a step, so that a number of them is bounded too."""
        self._put("jump", len(self._steps) + 1)
        self._add(inner, flags)


def _character(operator: Any, value: Any, flags: int) -> Callable[[str], bool]:
    """The test of one character, made by Python's own engine: a pattern of one character has one way to match."""
    compiled = re.compile(_one(operator, value), flags & (re.IGNORECASE | re.DOTALL | re.ASCII | re.UNICODE))
    return lambda character: compiled.fullmatch(character) is not None


def _one(operator: Any, value: Any) -> str:
    if operator == sre.ANY:
        return "."
    if operator == sre.LITERAL:
        return re.escape(chr(value))
    if operator == sre.NOT_LITERAL:
        return f"[^{_escaped(value)}]"
    negated = bool(value) and value[0][0] == sre.NEGATE
    return f"[{'^' if negated else ''}{''.join(map(_item, value[negated:]))}]"


def _item(item: Any) -> str:
    kind, value = item
    if kind == sre.LITERAL:
        return _escaped(value)
    if kind == sre.RANGE:
        return f"{_escaped(value[0])}-{_escaped(value[1])}"
    return _CATEGORIES[value]


def _escaped(code: int) -> str:
    return f"\\U{code:08x}"


_CATEGORIES = {
    sre.CATEGORY_DIGIT: r"\d", sre.CATEGORY_NOT_DIGIT: r"\D", sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S", sre.CATEGORY_WORD: r"\w", sre.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip


def _position(where: Any, flags: int) -> Callable[[str, int, list[int]], bool]:
    """The test of a place: beginnings, ends, edges of words."""
    source = {
        sre.AT_BEGINNING: "^", sre.AT_BEGINNING_STRING: r"\A", sre.AT_BOUNDARY: r"\b", sre.AT_NON_BOUNDARY: r"\B",
        sre.AT_END: "$", sre.AT_END_STRING: r"\Z",
    }[where]  # fmt: skip
    compiled = re.compile(source, flags & (re.MULTILINE | re.ASCII | re.UNICODE))
    return lambda text, place, budget: compiled.match(text, place) is not None


def _look(operator: Any, value: Any, flags: int) -> Callable[[str, int, list[int]], bool]:
    """The test of what comes after a place, or before it: lookbehinds have one length."""
    direction, tree = value
    inner = Pattern.__new__(Pattern)
    inner._steps = []
    inner._add(tree, flags)
    inner._put("match")
    wanted, back = operator == sre.ASSERT, tree.getwidth()[0] if direction < 0 else 0

    def test(text: str, position: int, budget: list[int]) -> bool:
        if back > position:
            return not wanted
        ends = inner._ends(text, position - back, budget)
        return any(end == position if direction < 0 else True for end in ends) == wanted

    return test


@lru_cache(maxsize=1024)
def _compiled(source: str) -> tuple[Callable[[str], bool], Callable[[str], bool], Callable[[str], bool]]:
    """Whether a whole text matches, whether its beginning does, and whether the end of a dotted path does."""
    if _WAYS.isdisjoint(source) and len(source) <= MAX_CHARACTERS:
        try:
            plain, end = re.compile(source), re.compile(rf"(?:.*\.)?(?:{source})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{shown(source)} is not a pattern: {error}") from error
        return (lambda text: plain.fullmatch(text) is not None, lambda text: plain.match(text) is not None,
                lambda text: end.match(text) is not None)  # fmt: skip
    pattern = Pattern(source)
    return pattern.fullmatch, pattern.match, Pattern(rf"(.*\.)?({source})$").match


def check(source: str) -> None:
    """Raises InputError for what is no pattern, or too large a one."""
    _compiled(source)


def fullmatch(source: str, text: str) -> bool:
    """As re.fullmatch; raises InputError as `check`, and where there is too much to try."""
    return _compiled(source)[0](text)


def match(source: str, text: str) -> bool:
    """As re.match; raises as `fullmatch`."""
    return _compiled(source)[1](text)


def ends(source: str, path: str) -> bool:
    """Whether a dotted path, or what follows one of its dots, matches as a whole; raises as `fullmatch`."""
    return _compiled(source)[2](path)
