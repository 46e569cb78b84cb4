"""The four tokenizers most tests run on, made once; and the strings they run over."""

import random
from pathlib import Path

import pytest

from llama2.tokenizer import LlamaTokenizer, LlamaTokenizerFast
from llama2.tokenizer.sentencepiece_model import SentencePieceModel


@pytest.fixture(scope="session")
def spm(tokenizer_model: Path) -> SentencePieceModel:
    """Parsed once: a fast tokenizer built from it is spared the search for merges."""
    return SentencePieceModel.from_file(tokenizer_model)


@pytest.fixture(scope="session")
def slow(tokenizer_model: Path) -> LlamaTokenizer:
    return LlamaTokenizer(tokenizer_model)


@pytest.fixture(scope="session")
def fast(tokenizer_model: Path) -> LlamaTokenizerFast:
    return LlamaTokenizerFast(tokenizer_model)


@pytest.fixture(scope="session")
def slow_c(tokenizer_model: Path) -> LlamaTokenizer:
    return LlamaTokenizer(tokenizer_model, legacy=False)


@pytest.fixture(scope="session")
def fast_c(tokenizer_model: Path) -> LlamaTokenizerFast:
    return LlamaTokenizerFast(tokenizer_model, legacy=False)


@pytest.fixture(scope="session")
def random_texts(slow: LlamaTokenizer) -> list[str]:
    """10,000 strings of vocabulary pieces, runs of spaces, newlines, CJK, emoji, bytes outside the vocabulary."""
    rng = random.Random(20230718)
    pieces = [p.replace("▁", " ") for p in list(slow.get_vocab())[259:]]
    emoji = ["🦙", "👩‍🚀", "🇨🇭", "é", "e\u0301", "\u200b", "\ufeff", "\x00", "\U0010ffff"]

    def part() -> str:
        kind = rng.randrange(8)
        if kind < 3:
            return rng.choice(pieces)
        if kind == 3:
            return " " * rng.choice([1, 2, 3, 4, 7, 16, 17, 40])
        if kind == 4:
            return rng.choice(["\n", "\n\n", "\t", "\r\n", "\n  "])
        if kind == 5:
            return chr(rng.randrange(0x4E00, 0x9FFF)) * rng.randrange(1, 4)
        if kind == 6:
            return rng.choice(emoji)
        return "".join(chr(rng.choice([*range(32, 127), *range(0xA0, 0x250)])) for _ in range(rng.randrange(1, 8)))

    return ["".join(part() for _ in range(rng.randrange(0, 12))) for _ in range(10_000)]
