"""Patterns that come with files: as Python's engine where that ends, and soon where it does not."""

import random
import re

import pytest

from llama2 import pattern
from llama2.errors import InputError
from llama2.pattern import Pattern

ATOMS = ("a", "b", ".", r"\d", "[ab]", "[^a]", "[a-c.]", r"\.", r"\w", r"\b", "^", "$", "(?=a)", "(?!b)", "(?<=a)",
         "(?<!b)", "é")  # fmt: skip


def made(rng: random.Random, depth: int = 0) -> str:
    found = ""
    for _ in range(rng.randrange(1, 4)):
        atom = rng.choice(ATOMS)
        if depth < 3 and rng.random() < 0.4:
            atom = rng.choice(("({})", "(?:{})", "(?i:{})", f"(?P<n{rng.randrange(10**9)}>{{}})")).format(
                made(rng, depth + 1)
            )
        found += atom + rng.choice(("", "", "*", "+", "?", "{2}", "{1,3}", "*?", "|"))
    return found


def test_it_is_pythons_engine() -> None:
    rng, compared = random.Random(0), 0
    while compared < 3000:
        source = made(rng)
        text = "".join(rng.choice("aabB.1é\n") for _ in range(rng.randrange(8)))
        try:
            theirs = re.compile(source)
        except re.error:
            continue
        compared += 1
        ours = Pattern(source)
        assert ours.fullmatch(text) == (theirs.fullmatch(text) is not None), (source, text)
        assert ours.match(text) == (theirs.match(text) is not None), (source, text)


@pytest.mark.parametrize(
    "source", [r"(a+)+b", r"(a|a)*b", r"(.*)*(.*)*(.*)*x", r"(?=(a+)+b)a*", r"((a{1,30}){1,30})b", r"(x?){300}y"]
)
def test_what_backtracks_for_ever_ends(source: str) -> None:
    assert not Pattern(source).fullmatch("a" * 60)


@pytest.mark.parametrize(
    "source", ["model.layers.*", r".*\.(q|v)_proj", r"^(?!.*vision).*(?:q_proj|v_proj).*", r"(.*\.)?(0\.q_proj)$"]
)
def test_patterns_of_adapters(source: str) -> None:
    for name in ("model.layers.0.self_attn.q_proj", "vision.layers.0.q_proj", "lm_head", "model.layers.10.mlp.up_proj"):
        assert Pattern(source).match(name) == (re.match(source, name) is not None)
        assert Pattern(source).fullmatch(name) == (re.fullmatch(source, name) is not None)


REFUSED = [
    ("(", "is not a pattern"),
    (r"(a+)\1", "groupref, which is no regular"),
    ("(a{1000}){1000}", "more than 20,000 steps"),
    ("a" * 10_001 + "*", "10,002 characters; at most 10,000"),
    ("(?>a*)b", "no regular expression"),
    ("(" * 4000 + ")" * 4000, "is not a pattern"),
]


@pytest.mark.parametrize(("source", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(source: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        pattern.check(source)


def test_lookarounds_share_one_budget() -> None:
    with pytest.raises(InputError, match="takes more than 1,000,000 tries"):
        Pattern("((?=(((a?){40}){20}){2}b)a?)*c").fullmatch("a" * 200)


def test_paths() -> None:
    for source in ("q_proj", "0.q_proj", "(q|v)_proj"):
        for path in ("q_proj", "model.layers.0.q_proj", "model.xq_proj", "model.layers.0.v_proj"):
            assert pattern.ends(source, path) == (re.match(rf"(.*\.)?({source})$", path) is not None)
