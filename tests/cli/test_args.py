"""Flags from a dataclass."""

from dataclasses import dataclass
from typing import Literal

import pytest

from llama2.cli.args import nearest, option, parse
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Shared:
    """shared flags."""

    seed: int | None = option(None, "a seed")


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    """What it does, 100% of it."""

    text: tuple[str, ...] = option((), "the text", positional=True, metavar="TEXT")
    ratio: float = option(0.5, "50% by default", alias="-r")
    stop: tuple[str, ...] = option((), "may be repeated")
    mode: Literal["a", "b"] = option("a", "one of two")
    show: Literal["table", "ids"] = option("table", "a table | only ids", switches=True)
    chat: bool = option(False, "off by default")
    special: bool = option(True, "on by default")


def words(*argv: str) -> Options:
    return parse(Options, "prog", argv)


def test_defaults() -> None:
    assert words() == Options()


def test_every_kind_of_flag() -> None:
    got = words("-r", "0.25", "--stop", "x", "--stop=-y", "--mode", "b", "--ids", "--chat", "--no-special", "--seed=7")
    assert got == Options(ratio=0.25, stop=("x", "-y"), mode="b", show="ids", chat=True, special=False, seed=7)


@pytest.mark.parametrize(
    "argv",
    [
        ("one", "two", "--seed", "3"),
        ("--seed", "3", "one", "two"),
        ("one", "--seed", "3", "two"),
        ("--seed", "3", "--", "one", "two"),
        ("one", "--seed", "3", "--", "two"),
    ],
)
def test_text_may_stand_anywhere(argv: tuple[str, ...]) -> None:
    assert words(*argv) == Options(text=("one", "two"), seed=3)


def test_text_behind_two_dashes_is_text() -> None:
    assert words("a", "--", "--seed", "-", "--").text == ("a", "--seed", "-", "--")
    assert words("-").text == ("-",)


def test_a_negative_number_is_a_value() -> None:
    assert words("--ratio", "-1").ratio == -1.0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--sed", "3"), "did you mean --seed?"),
        (("--ratio", "much"), "--ratio: 'much' is not a number"),
        (("--seed", "1.5"), "'1.5' is not a whole number"),
        (("--seed",), "--seed: expected one argument"),
        (("--mode", "c"), "choose from 'a', 'b'"),
        (("--see", "3"), "does not know '--see'"),  # no abbreviations: they break when a flag is added
    ],
)
def test_mistakes(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError) as caught:
        words(*argv)
    assert said in str(caught.value).replace("/", "")


def test_words_where_none_are_taken() -> None:
    with pytest.raises(InputError, match="does not know 'stray'"):
        parse(Shared, "prog", ("stray",))


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        words("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for part in (
        "What it does, 100% of it.",
        "TEXT",
        "-r X",
        "50% by default",
        "--ids",
        "--no-special",
        "shared flags:",
    ):
        assert part in text


def test_nearest() -> None:
    assert nearest("generat", ["generate", "chat"]) == "; did you mean generate?"
    assert nearest("xyz", ["generate", "chat"]) == ""
