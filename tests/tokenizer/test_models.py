"""SentencePiece models of other settings than Llama 2's: slow = fast = sentencepiece; said where ranks fall short."""

import io
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llama2.errors import TokenizerError
from llama2.tokenizer import LlamaTokenizer, LlamaTokenizerFast
from llama2.tokenizer.sentencepiece_model import _number, _serialize, _string

TEXTS = [
    "Hello world",
    "  two  spaces \n and\tmore  ",
    "ﬁne ½ ＡＢＣ ｶﾞ e\u0301 Ⅷ \u3000x",
    "naïve 東京 🦙 \u200b",
    "",
    " ",
    "a<tag>b <tag> c",
    "ＺＺＺ\u00a0 9.5%",
]


def train(news_text: str, **options: Any) -> bytes:
    """A small BPE model; sentencepiece's own defaults are nmt_nfkc and no extra whitespace."""
    out = io.BytesIO()
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(news_text.splitlines()[:20]), model_writer=out, **settings
    )
    return out.getvalue()


def pair(data: bytes, folder: Path, **options: Any) -> tuple[Any, LlamaTokenizer, LlamaTokenizerFast]:
    path = folder / "tokenizer.model"
    path.write_bytes(data)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    return reference, LlamaTokenizer(path, **options), LlamaTokenizerFast(path, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "nmt_nfkc"),
        ({"normalization_rule_name": "nfkc_cf"}, "nfkc_cf"),
        ({"normalization_rule_name": "identity"}, "extra whitespace"),
        ({"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False}, "nmt_nfkc"),
        (
            {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": False},
            "fallback",
        ),
        (
            {
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "user_defined_symbols": ["<tag>"],
            },
            "'<tag>'",
        ),
        ({"user_defined_symbols": ["<tag>", "99"], "add_dummy_prefix": False}, "nmt_nfkc"),
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}, None),
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": False}, None),
    ],
)
def test_settings_of_tokenizer_model_are_obeyed(
    options: dict[str, Any],
    reason: str | None,
    news_text: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = train(news_text, **options)
    with caplog.at_level(logging.WARNING):
        reference, slow, fast = pair(data, tmp_path)
    texts = [*TEXTS, *news_text.splitlines()[20:30]]
    expected = [reference.encode(text) for text in texts]
    for tok in (slow, fast):
        assert tok(texts, add_special_tokens=False)["input_ids"] == expected
        assert [tok.encode(text, add_special_tokens=False) for text in texts] == expected
        spans = tok(texts, add_special_tokens=False, return_offsets_mapping=True)
        assert spans["input_ids"] == expected
        for text, row in zip(texts, spans["offset_mapping"], strict=True):
            assert all(0 <= a <= b <= len(text) for a, b in row)
        if options.get("byte_fallback", True):
            assert [tok.decode(ids) for ids in expected] == [reference.decode(ids) for ids in expected]
    said = [record.getMessage() for record in caplog.records if "merge ranks" in record.getMessage()]
    assert len(said) == (reason is not None) and (reason is None or reason in said[0])
    # a saved folder goes on the same way
    fast.save_pretrained(tmp_path / "saved")
    for cls in (LlamaTokenizer, LlamaTokenizerFast):
        assert cls.from_pretrained(tmp_path / "saved")(texts, add_special_tokens=False)["input_ids"] == expected


def test_added_tokens_beside_a_normalizer(news_text: str, tmp_path: Path) -> None:
    reference, *both = pair(train(news_text), tmp_path)
    for tok in both:
        tok.add_tokens(["<|x|>"])
        number = len(tok) - 1
        found = tok.encode("ＡＢ<|x|>ｃ", add_special_tokens=False)
        assert found == [*reference.encode("ＡＢ"), number, *reference.encode("ｃ")]


def merged_vocabulary(tokenizer_model: Path) -> tuple[bytes, list[str]]:
    """Llama 2's model with Chinese pieces behind, all of score 0: as the script of Chinese-LLaMA merges them."""
    rng = random.Random(3)
    characters = [chr(c) for c in range(0x4E00, 0x4E20)]
    words = list(dict.fromkeys("".join(rng.choices(characters, k=rng.choice([2, 2, 2, 3, 4]))) for _ in range(600)))
    data = tokenizer_model.read_bytes()
    known = set(sentencepiece.SentencePieceProcessor(model_proto=data).encode("".join(characters), out_type=str))
    for piece in [*(c for c in characters if c not in known), *words]:
        data += _string(1, _string(1, piece.encode()) + b"\x15\0\0\0\0")
    texts = ["".join(rng.choices([*characters, " ", "a", "\n"], k=rng.randrange(2, 30))) for _ in range(400)]
    return data, texts


def test_equal_scores_take_the_exact_path(
    tokenizer_model: Path, tmp_path: Path, random_texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    data, texts = merged_vocabulary(tokenizer_model)
    with caplog.at_level(logging.WARNING):
        reference, slow, fast = pair(data, tmp_path)
    assert sum("share one score" in record.getMessage() for record in caplog.records) == 1
    texts += random_texts[:300]
    expected = reference.encode(texts)
    assert slow(texts, add_special_tokens=False)["input_ids"] == expected
    assert fast(texts, add_special_tokens=False)["input_ids"] == expected
    # the ranks of the Rust object would have been another tokenizer
    assert [row.ids for row in fast.backend_tokenizer.encode_batch(texts, add_special_tokens=False)] != expected
    a, b = (tok(texts, return_offsets_mapping=True) for tok in (slow, fast))
    assert a["offset_mapping"] == b["offset_mapping"]
    with pytest.raises(TokenizerError, match="share one score"):
        fast.to_transformers()


def test_llama2_itself_needs_no_exact_path(fast: LlamaTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    assert fast._encoder is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data + _string(2, _number(3, 1)), "model_type 1"),
        (lambda data: data + _string(3, _number(5, 0)), "escape_whitespaces"),
        (lambda data: data + _string(2, _number(24, 1)), "treat_whitespace_as_suffix"),
    ],
)
def test_what_no_llama_tokenizer_has_is_refused_by_name(
    change: Callable[[bytes], bytes], said: str, tokenizer_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(change(tokenizer_model.read_bytes()))
    for cls in (LlamaTokenizer, LlamaTokenizerFast):
        with pytest.raises(TokenizerError, match=said):
            cls(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [15043]),  # without a dummy prefix in the model "Hello" is its piece without "▁"
        ({"legacy": False}, [15043]),
        ({"legacy": False, "add_prefix_space": True}, None),
    ],
)
def test_add_dummy_prefix(
    options: dict[str, Any], expected: list[int] | None, tokenizer_model: Path, tmp_path: Path, slow: LlamaTokenizer
) -> None:
    """As transformers' slow class: legacy=False with add_prefix_space=True puts the "▁" there by itself."""
    bare = [10994]  # "Hello"
    data = tokenizer_model.read_bytes() + _string(3, _number(3, 0))
    reference, *both = pair(data, tmp_path, **options)
    assert reference.encode("Hello") == bare
    for tok in both:
        assert tok.encode("Hello", add_special_tokens=False) == (bare if expected else [15043])


def test_serialising_without_the_file_keeps_the_settings(slow: LlamaTokenizer) -> None:
    proto = sentencepiece.SentencePieceProcessor(model_proto=_serialize(slow._vocab))
    assert proto.encode("Hello  world") == slow.encode("Hello  world", add_special_tokens=False)
