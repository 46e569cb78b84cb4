"""Instructions that hold for a whole dialogue, how they are combined, and programs that check whether they are obeyed.

Llama 2's pool (arXiv 2307.09288, 3.3): hobbies, languages and figures; here forms too, which a program can check. No
torch here.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from llama2.errors import InputError

Checker = Callable[[str], bool]
_STOPS = {
    "en": "the and is of to in that it you for with are",
    "fr": "le la les et est de un une que dans pour vous",
    "de": "der die das und ist ein eine nicht zu mit sie den",
    "es": "el la los y es de un una que en para con",
    "it": "il la e di che un una per non con sono del",
    "pt": "o a os e de que um uma para com em do",
}


@dataclass(frozen=True)
class Instruction:
    """text: as it is said; short: the same in a few words; check: a name that `checker_of` knows, or ""."""

    category: str
    text: str
    short: str = ""
    check: str = ""


def _pool() -> tuple[Instruction, ...]:
    hobbies = ("tennis", "chess", "gardening", "sailing", "baking", "stargazing", "pottery", "hiking")
    figures = ("Napoleon", "Mozart", "Marie Curie", "Cleopatra", "Oscar Wilde", "Ada Lovelace", "Galileo", "Aesop")
    languages = {"French": "fr", "German": "de", "Spanish": "es", "Italian": "it", "Portuguese": "pt"}
    forms = (
        Instruction("form", "Always answer in lower case letters only.", "Form: lower case", "lower"),
        Instruction("form", "Always answer in capital letters only.", "Form: capital letters", "upper"),
        Instruction("form", "Start every answer with the word Ahoy.", "Start: Ahoy", "starts:Ahoy"),
        Instruction("form", "End every answer with the word over.", "End: over", "ends:over"),
        Instruction("form", "Always answer with exactly one sentence.", "Form: one sentence", "sentence"),
    )
    return (
        *(Instruction("hobby", f"You enjoy {one}, and it shows in your answers.", f"Hobby: {one}") for one in hobbies),
        *(Instruction("figure", f"Always act as if you were {one}.", f"Figure: {one}") for one in figures),
        *(Instruction("language", f"Always answer in {name}.", f"Language: {name}", f"language:{code}")
          for name, code in languages.items()),
        *forms,
    )  # fmt: skip


POOL = _pool()


def checker_of(name: str) -> Checker:
    """The program of a name: lower, upper, sentence, starts:WORD, ends:WORD, contains:WORD, language:CODE.

    Raises InputError for any other.
    """
    kind, _, rest = name.partition(":")
    plain: dict[str, Checker] = {
        "lower": lambda text: bool(text.strip()) and text == text.lower(),
        "upper": lambda text: bool(text.strip()) and text == text.upper(),
        "sentence": lambda text: len(re.findall(r"[.!?]+(?:\s|$)", text.strip())) == 1,
    }
    if not rest and kind in plain:
        return plain[kind]
    if rest and kind == "starts":
        return lambda text: text.lstrip().lower().startswith(rest.lower())
    if rest and kind == "ends":
        return lambda text: text.rstrip(" \n.!?\"'").lower().endswith(rest.lower())
    if rest and kind == "contains":
        return lambda text: rest.lower() in text.lower()
    if kind == "language" and rest in _STOPS:
        return lambda text: _language(text) == rest
    raise InputError(
        f"check is {name!r}; it must be {', '.join(plain)}, starts:WORD, ends:WORD, contains:WORD or language:CODE, a "
        f"code of {', '.join(_STOPS)}"
    )


def _language(text: str) -> str:
    """The code of the language most of whose stop words a text has; "" for a text with none."""
    words = re.findall(r"\w+", text.lower())
    counts = {code: sum(word in stops.split() for word in words) for code, stops in _STOPS.items()}
    best = max(counts, key=lambda code: counts[code])
    return best if counts[best] else ""


def pool_of(rows: Iterable[Mapping[str, Any]]) -> tuple[Instruction, ...]:
    """Instructions of rows {"text", "short", "category", "check"}, of which text alone is needed. Raises InputError."""
    found = []
    for number, row in enumerate(rows):
        given = {name: row.get(name) or "" for name in ("text", "short", "category", "check")}
        if not given["text"] or not all(isinstance(value, str) for value in given.values()):
            raise InputError(f"instruction {number} has no text; give {{text, short, category, check}}, each a text")
        if given["check"]:
            checker_of(given["check"])
        found.append(Instruction(given["category"] or "other", given["text"], given["short"], given["check"]))
    if not found:
        raise InputError("there are no instructions; give at least one")
    return tuple(found)


@dataclass(frozen=True)
class Order:
    """The instructions of one dialogue: some, of different categories, in full or shortened."""

    parts: tuple[Instruction, ...]
    shortened: bool

    @property
    def text(self) -> str:
        """As it is said."""
        said = [part.short if self.shortened and part.short else part.text for part in self.parts]
        return "\n".join(said) if self.shortened else " ".join(said)

    @property
    def checks(self) -> list[str]:
        """Names of the programs that check it; [] where none can."""
        return [part.check for part in self.parts if part.check]

    def obeyed(self, answer: str) -> bool | None:
        """Whether an answer obeys all that can be checked; None where nothing can be."""
        return all(checker_of(name)(answer) for name in self.checks) if self.checks else None


def drawn(pool: Sequence[Instruction], most: int, seed: str) -> Order:
    """One to `most` instructions of different categories; half of the time shortened. A function of the seed."""
    dice = random.Random(seed)
    by_category = {
        name: list(group) for name, group in groupby(sorted(pool, key=lambda i: i.category), lambda i: i.category)
    }
    count = dice.randint(1, max(1, min(most, len(by_category))))
    chosen = dice.sample(sorted(by_category), count)
    return Order(tuple(dice.choice(by_category[name]) for name in chosen), dice.random() < 0.5)
