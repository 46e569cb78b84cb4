"""A tokenizer's pickled state is what it is, not what it was used for: datasets finds its cache by a hash of it."""

import copy
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llama2 import AutoTokenizer, LlamaTokenizer, LlamaTokenizerFast, TokenizerError

MESSAGES = [{"role": "user", "content": "Hello there"}]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

USES: dict[str, Callable[[Any], Any]] = {
    "call": lambda t: t("Hello world <s> again</s>"),
    "batch": lambda t: t(["one", "and two"], truncation=True, max_length=4),
    "padding": lambda t: t(["one", "and two"], padding=True),
    "pair": lambda t: t("one", "two", return_offsets_mapping=True) if t.is_fast else t("one", "two"),
    "literal": lambda t: t("a</s>b", split_special_tokens=True),
    "words": lambda t: t(["one", "two"], is_split_into_words=True),
    "tokenize": lambda t: t.tokenize("Hello world"),
    "decode": lambda t: t.decode([5, 6, 300], skip_special_tokens=True),
    "batch_decode": lambda t: t.batch_decode([[5], [6, 300]]),
    "chat": lambda t: t.apply_chat_template(MESSAGES, chat_template=TEMPLATE),
    "vocabulary": lambda t: (t.get_vocab(), len(t), t.all_special_ids, t.convert_tokens_to_ids("a")),
    "pieces": lambda t: t.convert_ids_to_tokens([5, 6], skip_special_tokens=True),
    "stream": lambda t: t.stream_decoder(skip_special_tokens=True).put([5, 6]),
    "pad": lambda t: t.pad([{"input_ids": [1]}, {"input_ids": [1, 2]}]),
    "pickle": lambda t: pickle.loads(pickle.dumps(t))("Hello"),
    "deepcopy": lambda t: copy.deepcopy(t)("Hello"),
    "repr": repr,
}


@pytest.fixture(params=["slow", "fast", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "bytes":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    model: Path = request.getfixturevalue("tokenizer_model")
    return (LlamaTokenizer if request.param == "slow" else LlamaTokenizerFast)(model)


def test_use_leaves_no_trace(tokenizer: Any) -> None:
    before = pickle.dumps(tokenizer)
    for name, use in USES.items():
        with suppress(TokenizerError):  # two of them have no padding token
            use(tokenizer)
        assert pickle.dumps(tokenizer) == before, name
    again = pickle.loads(before)
    assert again("Hello world </s>") == tokenizer("Hello world </s>")
    assert again.get_vocab() == tokenizer.get_vocab() and again.decode([5, 6]) == tokenizer.decode([5, 6])


def test_a_change_leaves_one(tokenizer: Any) -> None:
    before = pickle.dumps(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    assert pickle.dumps(tokenizer) != before


def test_datasets_finds_its_cache(tokenizer: Any) -> None:
    """A function over the tokenizer has the same fingerprint before and after the tokenizer has been used."""
    fingerprint = pytest.importorskip("datasets.fingerprint")
    hash_of = fingerprint.Hasher.hash

    def rows(batch: dict[str, Any]) -> Any:
        return tokenizer(batch["text"])

    before = hash_of(rows)
    rows({"text": ["some text", "and more of it"]})
    tokenizer.decode([5, 6, 300], skip_special_tokens=True)
    assert hash_of(rows) == before
