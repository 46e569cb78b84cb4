"""Saving and loading: every combination of files gives the same ids back, with the settings that were changed."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from llama2.errors import CheckpointError, TokenizerError
from llama2.tokenizer import AddedToken, LlamaTokenizer, LlamaTokenizerFast, load

TEXTS = ["Hello world", "  Hello", "<s> Hi</s>there", "a    b\n\tc", "Hellonewtok newtok<pad>", "🦙 ▁x", " <pad> "]
STYLES: list[dict[str, Any]] = [{}, {"legacy": False}, {"add_prefix_space": False}]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("cls", [LlamaTokenizer, LlamaTokenizerFast])
def test_round_trip(cls: Any, style: dict[str, Any], tokenizer_model: Path, tmp_path: Path) -> None:
    tok = cls(tokenizer_model, **style, padding_side="left", model_max_length=4096)
    tok.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<x>"]})
    tok.add_tokens([AddedToken("newtok", normalized=False), "later"])
    tok.add_eos_token = True
    tok.chat_template = "{{ messages }}"
    expected = tok(TEXTS)["input_ids"]
    tok.save_pretrained(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    }
    for other in (LlamaTokenizer, LlamaTokenizerFast):
        again = other.from_pretrained(tmp_path)
        assert again(TEXTS)["input_ids"] == expected
        assert again.special_tokens_map == tok.special_tokens_map
        assert (again.padding_side, again.model_max_length, again.add_eos_token) == ("left", 4096, True)
        assert again.chat_template == tok.chat_template
        assert [again.decode(ids) for ids in expected] == [tok.decode(ids) for ids in expected]
    (tmp_path / "tokenizer.model").unlink()
    assert LlamaTokenizerFast.from_pretrained(tmp_path)(TEXTS)["input_ids"] == expected
    with pytest.raises(TokenizerError, match="LlamaTokenizerFast"):
        LlamaTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", [LlamaTokenizer, LlamaTokenizerFast])
def test_tokenizer_model_only(cls: Any, tokenizer_model: Path, tmp_path: Path) -> None:
    cls(tokenizer_model).save_vocabulary(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer_model.read_bytes()
    assert cls.from_pretrained(tmp_path).encode("a    b") == [1, 263, 1678, 289]
    assert load(tmp_path / "tokenizer.model", use_fast=cls.is_fast).encode("a    b") == [1, 263, 1678, 289]


def test_the_file_wins_over_the_legacy_flag(tokenizer_model: Path, tmp_path: Path) -> None:
    """Hub folders say legacy false beside a tokenizer.json of the other kind; an argument wins over both."""
    LlamaTokenizerFast(tokenizer_model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": False}))
    for cls in (LlamaTokenizer, LlamaTokenizerFast):
        assert cls.from_pretrained(tmp_path).encode("Hello<s>how") == [1, 15043, 1, 920]
        assert cls.from_pretrained(tmp_path, legacy=False).encode("Hello<s>how") == [1, 15043, 1, 3525]


def test_merges_written_either_way(fast: LlamaTokenizerFast, tmp_path: Path) -> None:
    fast.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    for merges in ([" ".join(m) for m in document["model"]["merges"]], document["model"]["merges"]):
        document["model"]["merges"] = merges
        path.write_text(json.dumps(document))
        assert load(path).encode("Hello   world") == fast.encode("Hello   world")
    assert document["pre_tokenizer"] is None
    assert len(document["model"]["merges"]) == 61249


@pytest.mark.parametrize("cls", [LlamaTokenizer, LlamaTokenizerFast])
def test_pickling(cls: Any, tokenizer_model: Path) -> None:
    tok = cls(tokenizer_model, add_eos_token=True)
    tok.add_tokens(["<t>"], special_tokens=True)
    tok.decode([1])
    again = pickle.loads(pickle.dumps(tok))
    assert again.encode("Hi <t>") == tok.encode("Hi <t>")
    batch = pickle.loads(pickle.dumps(tok(["a", "b c"])))
    assert batch["input_ids"] == tok(["a", "b c"])["input_ids"]


def test_errors(tokenizer_model: Path, tmp_path: Path, fast: LlamaTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"Cannot load the tokenizer.*vocab_file is 'None'"):
        LlamaTokenizer(None)
    with pytest.raises(ValueError, match="Cannot load the tokenizer"):
        LlamaTokenizerFast()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        LlamaTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model.read_bytes()[:100_001])
    for cls in (LlamaTokenizer, LlamaTokenizerFast):
        with pytest.raises(CheckpointError, match="truncated"):
            cls.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"not a tokenizer\.json"):
        load(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="not a folder"):
        fast.save_vocabulary(tmp_path / "absent")


def test_slow_class_and_import_stay_light() -> None:
    import subprocess
    import sys

    heavy = ["torch", "transformers", "jinja2", "sentencepiece", "huggingface_hub"]
    code = f"import llama2.tokenizer, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_byte_level_files_get_no_tokens_they_do_not_have(tmp_path: Path) -> None:
    """Llama 3 names no unknown token: the classes' defaults must not grow its vocabulary."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<|begin_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = LlamaTokenizerFast.from_pretrained(tmp_path)
    assert len(tokenizer) == 258
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token) == (256, None, None)
