"""Settings of two files, empty tokens, template folders, keywords: what transformers reads from the same folders."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from llama2 import AutoTokenizer
from llama2.tokenizer import AddedToken, LlamaTokenizer, LlamaTokenizerFast

CLASSES = [LlamaTokenizer, LlamaTokenizerFast]


def entry(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture
def folder(tokenizer_model: Path, tmp_path: Path) -> Any:
    """write(tokenizer_config, special_tokens_map) makes a folder beside tokenizer.model."""
    shutil.copy(tokenizer_model, tmp_path / "tokenizer.model")

    def write(config: dict[str, Any], tokens_map: dict[str, Any] | None = None) -> Path:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if tokens_map is not None:
            (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens_map))
        return tmp_path

    return write


@pytest.mark.parametrize("cls", CLASSES)
def test_a_null_never_beats_a_value(cls: Any, folder: Any) -> None:
    """Vicuna's files."""
    path = folder({"pad_token": None, "bos_token": entry("<s>")}, {"pad_token": "<unk>", "bos_token": entry("<s>")})
    assert cls.from_pretrained(path).pad_token_id == 0
    decoder = {"0": {**entry("<unk>"), "special": True}}
    path = folder({"pad_token": None, "added_tokens_decoder": decoder}, {"pad_token": "<unk>"})
    assert cls.from_pretrained(path).pad_token_id == 0
    path = folder({"pad_token": "</s>"}, {"pad_token": None})
    assert cls.from_pretrained(path).pad_token_id == 2
    assert cls.from_pretrained(folder({"pad_token": None}, {})).pad_token is None


@pytest.mark.parametrize("cls", CLASSES)
def test_which_value_counts(cls: Any, folder: Any) -> None:
    """transformers takes special_tokens_map.json, except where tokenizer_config.json lists its added tokens."""
    assert cls.from_pretrained(folder({"pad_token": "</s>"}, {"pad_token": "<unk>"})).pad_token == "<unk>"
    decoder = {"0": {**entry("<unk>"), "special": True}}
    path = folder({"pad_token": "</s>", "added_tokens_decoder": decoder}, {"pad_token": "<unk>"})
    assert cls.from_pretrained(path).pad_token == "</s>"


@pytest.mark.parametrize("cls", CLASSES)
def test_an_empty_token_is_none_given(cls: Any, folder: Any) -> None:
    """Alpaca's files."""
    empty = {"bos_token": "", "eos_token": "", "unk_token": ""}
    tok = cls.from_pretrained(folder({**empty, "added_tokens_decoder": {"0": entry("")}}, empty))
    assert tok.encode("Hello") == [1, 15043]
    assert (tok.bos_token, tok.eos_token, tok.unk_token) == ("<s>", "</s>", "<unk>")
    assert cls(folder({}) / "tokenizer.model", bos_token="").bos_token_id == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_additional_tokens_of_both_files(cls: Any, folder: Any) -> None:
    path = folder(
        {"additional_special_tokens": ["<a>", entry("<b>")]}, {"additional_special_tokens": [entry("<b>"), "<c>"]}
    )
    tok = cls.from_pretrained(path)
    assert tok.additional_special_tokens == ["<a>", "<b>", "<c>"]
    assert tok.encode("x<c>", add_special_tokens=False)[-1] == tok.convert_tokens_to_ids("<c>") == 32002
    assert cls.from_pretrained(folder({"additional_special_tokens": None}, {})).additional_special_tokens == []


@pytest.mark.parametrize("cls", CLASSES)
def test_folders_of_templates(cls: Any, folder: Any) -> None:
    path = folder({"chat_template": "from config"})
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert cls.from_pretrained(path).chat_template == {"default": "from config", "tool_use": "tools"}
    (path / "chat_template.jinja").write_text("from file")
    tok = cls.from_pretrained(path)
    assert tok.chat_template == {"default": "from file", "tool_use": "tools"}
    assert tok.get_chat_template(tools=[{}]) == "tools"
    out = path / "out"
    tok.save_pretrained(out, save_jinja_files=True)
    assert (out / "chat_template.jinja").read_text() == "from file"
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert cls.from_pretrained(out).chat_template == tok.chat_template
    tok.save_pretrained(out)  # and back into the configuration, with no old file left to win over it
    assert not (out / "chat_template.jinja").exists()
    assert cls.from_pretrained(out).chat_template == tok.chat_template


def test_padding_side_is_that_of_the_class(folder: Any, tmp_path: Path) -> None:
    path = folder({})
    assert LlamaTokenizer.from_pretrained(path).padding_side == "right"
    assert LlamaTokenizerFast.from_pretrained(path).padding_side == "left"
    assert AutoTokenizer.from_pretrained(path).padding_side == "left"
    assert AutoTokenizer.from_pretrained(path, use_fast=False).padding_side == "right"
    LlamaTokenizerFast.from_pretrained(path).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    del config["padding_side"]
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").padding_side == "right"
    assert AutoTokenizer.from_pretrained(folder({"padding_side": "right"})).padding_side == "right"


@pytest.mark.parametrize("cls", CLASSES)
def test_keywords_of_transformers(cls: Any, folder: Any) -> None:
    path = folder({"do_lower_case": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tok = cls.from_pretrained(path, verbose=False, use_fast=True, trust_remote_code=True, from_slow=True)
    assert tok.verbose is False
    with pytest.warns(UserWarning, match="keep_accents, nonsense") as said:
        tok = cls.from_pretrained(path, keep_accents=True, nonsense=1)
    assert len(said) == 1 and tok.init_kwargs["keep_accents"] is True
    tok = cls.from_pretrained(path, image_token="<image>")
    assert tok.additional_special_tokens == ["<image>"] and tok.encode("a<image>")[-1] == 32000


def test_from_slow_takes_the_model(folder: Any) -> None:
    path = folder({})
    LlamaTokenizerFast.from_pretrained(path, legacy=False).save_pretrained(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": True}))
    text = "abs</s>USER"
    assert LlamaTokenizerFast.from_pretrained(path).encode(text) == [1, 6425, 2, 11889]
    assert LlamaTokenizerFast.from_pretrained(path, from_slow=True).encode(text) == [1, 6425, 2, 3148, 1001]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_inside_words(cls: Any, legacy: bool, tokenizer_model: Path, tmp_path: Path) -> None:
    tok = cls(tokenizer_model, legacy=legacy)
    tok.add_tokens(["<|im_end|>", AddedToken("<word>", single_word=True), AddedToken("<l>", lstrip=True, special=True)])
    tok.add_tokens([AddedToken("<r>", rstrip=True), AddedToken("<n>", normalized=True)])
    assert tok.tokenize("bye<|im_end|>") == ["▁by", "e", "<|im_end|>"]
    assert tok.tokenize("a<n>") == ["▁a", "<n>"]
    assert 32001 not in tok.encode("a<word>b") and 32001 in tok.encode("a <word> b")
    assert tok.tokenize("a   <l>") == ["▁a", "<l>"] and tok.tokenize("<r>   ") == ["<r>"]
    if legacy:
        assert tok.tokenize(" <l>") == ["<l>"]
    tok.save_pretrained(tmp_path)
    for other in CLASSES:
        assert other.from_pretrained(tmp_path).encode("bye<|im_end|> <n>x") == tok.encode("bye<|im_end|> <n>x")


def test_files_of_transformers_4_find_added_tokens_inside_words(tokenizer_model: Path, tmp_path: Path) -> None:
    """Its tokenizer.json says normalized=true, which in the Rust object means word starts only."""
    LlamaTokenizerFast(tokenizer_model).save_pretrained(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["added_tokens"].append({"id": 32000, **entry("<|im_end|>"), "normalized": True, "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["32000"] = {**entry("<|im_end|>"), "normalized": True, "special": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for cls in CLASSES:
        assert cls.from_pretrained(tmp_path).tokenize("bye<|im_end|>") == ["▁by", "e", "<|im_end|>"]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_token_added_again_takes_the_new_flags(cls: Any, tokenizer_model: Path) -> None:
    tok = cls(tokenizer_model)
    assert tok.add_tokens(["<x>"]) == 1
    assert tok.encode("a <x>", add_special_tokens=False) == [263, 29871, 32000]
    assert tok.add_tokens([AddedToken("<x>", lstrip=True)]) == 0
    assert tok.encode("a <x>", add_special_tokens=False) == [263, 32000]
    assert tok.add_tokens(["<x>"], special_tokens=True) == 0  # a string keeps the flags
    assert tok.encode("a <x>", add_special_tokens=False) == [263, 32000] and 32000 in tok.special_ids
