"""Slow = fast = sentencepiece, and the stream of pieces joined = decode."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llama2 import AutoTokenizer
from llama2.tokenizer import AddedToken, LlamaTokenizer, LlamaTokenizerFast
from llama2.tokenizer.fast import AT_ONCE

SPECIALS = ["<s>", "</s>", "<unk>", "<pad>", "newtok", " <a b>", "zyword", "<lr>"]


@pytest.fixture(scope="module")
def reference(tokenizer_model: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))


def test_ids_equal_sentencepiece(
    slow: LlamaTokenizer, fast: LlamaTokenizerFast, reference: Any, random_texts: list[str]
) -> None:
    expected = [[1, *ids] for ids in reference.encode(random_texts)]
    assert slow(random_texts)["input_ids"] == expected
    assert fast(random_texts)["input_ids"] == expected


def test_single_texts_equal_batches(slow: LlamaTokenizer, fast: LlamaTokenizerFast, random_texts: list[str]) -> None:
    texts = random_texts[:500]
    assert [slow.encode(t) for t in texts] == fast(texts)["input_ids"] == [fast.encode(t) for t in texts]


def test_a_text_longer_than_what_is_encoded_at_once_has_the_same_ids(
    slow: LlamaTokenizer, fast: LlamaTokenizerFast, smollm2: Path, random_texts: list[str]
) -> None:
    text = " ".join(random_texts)
    assert len(text) > 2 * AT_ONCE
    assert fast.encode(text) == slow.encode(text)
    byte_level = AutoTokenizer.from_pretrained(smollm2)
    ids = byte_level.encode(text, add_special_tokens=False)
    assert ids == byte_level.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_decode_and_stream_equal_sentencepiece(
    slow: LlamaTokenizer, fast: LlamaTokenizerFast, reference: Any, random_texts: list[str]
) -> None:
    for text in random_texts:
        ids = reference.encode(text)
        assert slow.decode(ids) == fast.decode(ids) == reference.decode(ids)
        assert fast.decode(ids) == text.replace("▁", " ")
        stream = fast.stream_decoder()
        assert "".join([*map(stream.put, ids), stream.finish()]) == text.replace("▁", " ")


def test_random_ids_decode_as_sentencepiece(slow: LlamaTokenizer, fast: LlamaTokenizerFast, reference: Any) -> None:
    """Half of the ids are bytes: truncated characters, stray continuations, overlong forms, surrogates."""
    rng = random.Random(1)
    for _ in range(5000):
        n = rng.randrange(1, 12)
        ids = [rng.randrange(3, 259) if rng.random() < 0.5 else rng.randrange(259, 32000) for _ in range(n)]
        expected = reference.decode(ids)
        assert slow.decode(ids) == fast.decode(ids) == expected
        stream = slow.stream_decoder()
        assert "".join([*map(stream.put, ids), stream.finish()]) == expected


@pytest.mark.parametrize("options", [{}, {"legacy": False}, {"add_prefix_space": False}, {"prefix": "metaspace"}])
def test_slow_equals_fast_around_added_tokens(tokenizer_model: Path, random_texts: list[str], options: Any) -> None:
    pair = [LlamaTokenizer(tokenizer_model, **options), LlamaTokenizerFast(tokenizer_model, **options)]
    for tok in pair:
        assert tok.add_special_tokens({"pad_token": "<pad>"}) == 1
        assert tok.add_tokens(["newtok", AddedToken(" <a b>", normalized=False)]) == 2
        assert tok.add_tokens(AddedToken("zyword", single_word=True)) == 1
        assert tok.add_tokens(AddedToken("<lr>", lstrip=True, rstrip=True, special=True)) == 1
    slow, fast = pair
    rng = random.Random(f"7 {options}")  # other texts for each
    texts = []
    for i in range(150):
        parts = [rng.choice([*SPECIALS, " ", "  ", "▁", random_texts[rng.randrange(10_000)]]) for _ in range(i % 7)]
        texts.append("".join(parts))
    for split in (False, True):
        a, b = (tok(texts, return_offsets_mapping=True, split_special_tokens=split) for tok in pair)
        for i, text in enumerate(texts):
            assert a["input_ids"][i] == b["input_ids"][i], text
            assert a["offset_mapping"][i] == b["offset_mapping"][i], text
            assert a.word_ids(i) == b.word_ids(i), text
            assert slow.decode(a["input_ids"][i]) == fast.decode(a["input_ids"][i])
        assert fast(texts, split_special_tokens=split)["input_ids"] == b["input_ids"]
        assert slow(texts, split_special_tokens=split)["input_ids"] == b["input_ids"]


def test_words_and_spaces_around_added_tokens_are_those_of_unicode(tokenizer_model: Path) -> None:
    """Marks belong to words, superscripts and signs do not; the separators of ASCII are no white space."""
    pair = [LlamaTokenizer(tokenizer_model), LlamaTokenizerFast(tokenizer_model)]
    for tok in pair:
        tok.add_tokens(AddedToken("zyword", single_word=True))
        tok.add_tokens(AddedToken("<lr>", lstrip=True, rstrip=True, special=True))
    signs = [
        "\u0301",
        "\u00b2",
        "\u2160",
        "\u0903",
        "\u203f",
        "\u200d",
        "\u24b6",
        "\u00bd",
        "\u20ac",
        "\x1c",
        "\x85",
        "\u3000",
    ]
    texts = [text for sign in signs for text in (f"e{sign}zyword", f"zyword{sign}e", f"a{sign}<lr>{sign}b")]
    slow, fast = (tok(texts, return_offsets_mapping=True) for tok in pair)
    for i, text in enumerate(texts):
        assert slow["input_ids"][i] == fast["input_ids"][i], ascii(text)
        assert slow["offset_mapping"][i] == fast["offset_mapping"][i], ascii(text)


def test_many_added_tokens_stay_fast(tokenizer_model: Path) -> None:
    """The work for a text does not grow with the number of tokens: fifty times as many cost less than five times."""
    text = "some plain words <token7> and more " * 50
    for cls in (LlamaTokenizer, LlamaTokenizerFast):
        few, many = cls(tokenizer_model), cls(tokenizer_model)
        few.add_tokens([f"<token{i}>" for i in range(200)], special_tokens=True)
        many.add_tokens([f"<token{i}>" for i in range(10_000)], special_tokens=True)
        assert few.encode(text) == many.encode(text)
        slow, fast = ([], [])  # one after the other, so that both meet the same processor
        for _ in range(5):
            slow.append(_seconds(many, text))
            fast.append(_seconds(few, text))
        assert min(slow) < 5 * min(fast)


def _seconds(tok: Any, text: str) -> float:
    """Of the processor, for this thread: what else runs does not count."""
    start = time.thread_time()
    tok.encode(text)
    return time.thread_time() - start


@pytest.mark.parametrize("text", ["\N{GRINNING FACE}" * 5000, "x" * 9000, "ab " * 4000, "\u2581" * 5000 + "end"])
def test_a_long_text_is_encoded_without_the_interpreters_lock(
    fast: LlamaTokenizerFast, slow: LlamaTokenizer, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """`encode` and `model.tokenize` hold it until they are done: 450,000 emoji stopped every thread for 1.6 s."""
    held: list[int] = []

    class Watched:
        """The Rust object; notes how long the texts are that it takes with the lock held."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._inner, name)
            if name == "model":
                return Watched(found)
            if name in ("encode", "tokenize"):
                return lambda given, *args, **more: (held.append(len(given)), found(given, *args, **more))[1]
            return found

    monkeypatch.setattr(fast, "_tokenizer", Watched(fast._tokenizer))
    for keep in (True, False):
        monkeypatch.setattr(fast, "_literals", {})
        assert fast(text, verbose=False, split_special_tokens=not keep)["input_ids"] == slow(text)["input_ids"]
    assert fast.encode_bytes(text.encode()) == slow.encode_bytes(text.encode())
    assert max(held, default=0) <= 4096
