"""Patterns of a tokenizer.json: those in use run as they are, others first where they can harm nobody."""

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from bytewise import SPECIAL, _byte_alphabet, write_tokenizer

from llama2 import AddedToken, AutoTokenizer
from llama2.errors import TokenizerError
from llama2.tokenizer import gguf, trial
from llama2.tokenizer.trial import unknown


def cutting(folder: Path, pattern: str) -> Any:
    """A byte-level tokenizer that cuts by a pattern."""
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return AutoTokenizer.from_pretrained(folder)


def of(pattern: str) -> list[str]:
    return unknown({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}}]})


def test_patterns_in_use_are_not_tried() -> None:
    for patterns in gguf._CUTS.values():
        for pattern in patterns:
            assert not of(pattern), pattern
    for pattern in (
        *(r"\d", r"[\r\n]", r"\s?\p{L}+", r"\p{N}{1,3}", "[一-龥ࠀ-一가-퟿]+", r" ?[^(\s|.,!?…。，、।۔،)]+", r"\d| |x+"),
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    ):
        assert not of(pattern), pattern
    assert not unknown(None, {"type": "Replace", "pattern": {"String": "(a+)+"}})


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "a*a*b", "a+b", "a?a?a", "a{3,900}", "(a|a)*", r"(.)\1", "(?=a+)b", "a*", "a{9}", "", "a||b", "[a",
     "aaaaaaaaa(", r"[a&&[b]]+", r"\p{L", "a+?", "a++", "^a", "(?i)a"],
)  # fmt: skip
def test_what_could_try_twice_is_not_plain(pattern: str) -> None:
    assert of(pattern) == [pattern]


def test_plainness_is_seen_at_once() -> None:
    began = time.monotonic()
    for pattern in (
        "a?" * 30_000,
        "a" * 100_000 + "(",
        "[" * 50_000,
        "\\p{" * 30_000,
        "a|" * 50_000,
        "[a" * 5000 + "]" * 5000,
    ):
        of(pattern)
    assert time.monotonic() - began < 5


def test_a_pattern_that_tries_for_ever_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stars on a thousand letters: more than ten minutes in the Rust library, which nothing interrupts."""
    monkeypatch.setattr(trial, "SECONDS", 0.3)
    tokenizer = cutting(tmp_path, r"a*a*a*[xy]")
    wanted = tokenizer.backend_tokenizer.encode("aaax a", add_special_tokens=False).ids
    assert tokenizer.encode("aaax a", add_special_tokens=False) == wanted
    for call in (tokenizer, tokenizer.encode, tokenizer.tokenize):
        with pytest.raises(TokenizerError, match=r"'a\*a\*a\*\[xy\]', takes more than 0.3 s of processor time"):
            call("a" * 1000 + "-x")
    assert tokenizer.encode("aaax a", add_special_tokens=False) == wanted


@pytest.mark.parametrize("key", ["Regex", "\\u0052egex"])
def test_a_normaliser_that_meets_the_tokens_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """They are normalised when the file is read; also where the key is written with an escape."""
    monkeypatch.setattr(trial, "SECONDS", 0.3)
    cutting(tmp_path, r"\p{L}+")
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Replace", "pattern": {"Regex": "a*a*a*[xy]"}, "content": "z"}
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    text = json.dumps(document).replace('"Regex": "a', f'"{key}": "a')
    (tmp_path / "tokenizer.json").write_text(text)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("x") == [len(SPECIAL) + _byte_alphabet().index("z")]
    with pytest.raises(TokenizerError, match=r"takes more than 0.3 s .* on a text of 902 characters"):
        AutoTokenizer.from_pretrained(tmp_path).add_tokens([AddedToken("a" * 900 + "-x", normalized=True)])
    document["added_tokens"].append({"id": 300, "content": "a" * 900 + "-x", **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document).replace('"Regex": "a', f'"{key}": "a'))
    with pytest.raises(TokenizerError, match=r"'a\*a\*a\*\[xy\]', takes more than 0.3 s .* on the tokens of its file"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_pattern_that_gives_up(tmp_path: Path) -> None:
    """Oniguruma's own limit, ten million tries from one character: the Rust library panics."""
    tokenizer = cutting(tmp_path, "(a+)+[bc]")
    with pytest.raises(TokenizerError, match=r"'\(a\+\)\+\[bc\]', cannot be used on this text: 'Onig: .*retry-limit"):
        tokenizer.encode("a" * 60 + "-b")


def test_an_unknown_pattern_gives_what_the_library_gives(tmp_path: Path) -> None:
    tokenizer = cutting(tmp_path, r"\p{L}+(?=x)|\d+(?:,\d+)*|\s+(?!\S)")
    texts = ["axx 1,2,3  \n b", "", "é\u2028ü </s> 🙂"]
    ids = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == ids
    assert pickle.loads(pickle.dumps(tokenizer))(texts, add_special_tokens=False)["input_ids"] == ids
    tokenizer.add_tokens(["<new>"])
    assert tokenizer.encode("a<new>b", add_special_tokens=False)[1] == tokenizer.convert_tokens_to_ids("<new>")
    assert tokenizer.encode("<|end|>", split_special_tokens=True) != tokenizer.encode("<|end|>")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode("\ud800")
    child = os.fork()
    if child == 0:
        os._exit(tokenizer(texts, add_special_tokens=False)["input_ids"] != ids)
    assert os.waitpid(child, 0)[1] == 0
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == ids
