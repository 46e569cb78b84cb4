"""Files that we save load in transformers with the same ids; and its own results for the same calls."""

from pathlib import Path
from typing import Any

import pytest

from llama2.tokenizer import LlamaTokenizer, LlamaTokenizerFast, from_gguf

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("style", [{}, {"legacy": False}, {"add_prefix_space": False}])
@pytest.mark.parametrize("cls", [LlamaTokenizer, LlamaTokenizerFast])
def test_saved_files_give_the_same_ids(
    cls: Any, style: dict[str, Any], tokenizer_model: Path, tmp_path: Path, random_texts: list[str]
) -> None:
    tok = cls(tokenizer_model, **style, add_eos_token=True)
    tok.add_special_tokens({"pad_token": "<pad>"})
    tok.save_pretrained(tmp_path)
    texts = [*random_texts[:1000], "Hello<s>how", "<pad> x </s>y", " Hello", "a    b"]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs(texts)["input_ids"] == tok(texts)["input_ids"]
    assert theirs.pad_token_id == tok.pad_token_id


def test_auto_tokenizer_agrees_on_plain_text(fast: LlamaTokenizerFast, tmp_path: Path, random_texts: list[str]) -> None:
    """transformers 5 puts Metaspace into any LlamaTokenizer: the same ids unless a text starts with a space."""
    fast.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [t for t in random_texts[:1000] if not t.startswith((" ", "▁"))]
    assert theirs(texts)["input_ids"] == fast(texts)["input_ids"]


def test_call_options_agree(fast: LlamaTokenizerFast, tmp_path: Path, random_texts: list[str]) -> None:
    fast.save_pretrained(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path, pad_token="</s>")
    ours = LlamaTokenizerFast.from_pretrained(tmp_path, pad_token="</s>")
    texts = [t for t in random_texts[:300] if len(t) > 20]
    options: list[dict[str, Any]] = [
        {"padding": True, "return_token_type_ids": True},
        {"truncation": True, "max_length": 7},
        {"truncation": True, "max_length": 9, "stride": 2, "return_overflowing_tokens": True},
        {"return_offsets_mapping": True, "return_special_tokens_mask": True},
        {"padding": "max_length", "max_length": 48, "truncation": True, "pad_to_multiple_of": 16},
        {"add_special_tokens": False, "return_length": True},
    ]
    for option in options:
        expected = theirs(texts, **{"return_token_type_ids": False, **option})
        found = ours(texts, **option)
        for name in expected:
            if name != "length":
                assert [list(r) if isinstance(r, tuple) else r for r in found[name]] == expected[name], (option, name)
        for strategy in ("longest_first", "only_first", "only_second"):
            pairs = {"truncation": strategy, "max_length": 20}
            long = [t * 3 for t in texts]
            both = [
                t(["some words here"] * len(long) if strategy != "only_first" else long,
                  long if strategy != "only_first" else ["some words here"] * len(long), **pairs)["input_ids"]
                for t in (ours, theirs)
            ]  # fmt: skip
            assert both[0] == both[1]


def test_smollm2_files(smollm2: Path, tmp_path: Path, random_texts: list[str]) -> None:
    import importlib

    tok = from_gguf(importlib.import_module("llama2.checkpoint.gguf").read_metadata(smollm2))
    tok.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tok(random_texts[:1000])["input_ids"]
    assert theirs(random_texts[:1000])["input_ids"] == ids
    assert [tok.decode(row) for row in ids] == theirs.batch_decode(ids, clean_up_tokenization_spaces=False)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert tok.apply_chat_template(chat) == theirs.apply_chat_template(chat)["input_ids"]
