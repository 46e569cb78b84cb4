"""Code Llama's <FILL_ME>. The ids are those of transformers 4.46's CodeLlamaTokenizer on the same tokenizer.model."""

import json
from pathlib import Path
from typing import Any

import pytest

import llama2
from llama2 import AutoTokenizer
from llama2.errors import TokenizerError
from llama2.tokenizer import CodeLlamaTokenizer, CodeLlamaTokenizerFast, LlamaTokenizer, LlamaTokenizerFast
from llama2.tokenizer.sentencepiece_model import CONTROL, _number, _string

TEXT = "def f(x):\n    <FILL_ME>\n    return y"
DEF = [822, 285, 29898, 29916, 1125, 13, 268]
RETURN = [13, 1678, 736, 343]


@pytest.fixture(scope="module")
def folder(tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 2's model with the four pieces behind; in Code Llama's they are 32007 to 32010."""
    folder = tmp_path_factory.mktemp("codellama")
    data = tokenizer_model.read_bytes()
    for piece in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"):
        data += _string(1, _string(1, piece.encode()) + b"\x15\0\0\0\0" + _number(3, CONTROL))
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CodeLlamaTokenizer"}))
    return folder


@pytest.fixture(scope="module", params=[True, False])
def tok(request: pytest.FixtureRequest, folder: Path) -> Any:
    found = AutoTokenizer.from_pretrained(folder, use_fast=request.param)
    assert type(found) is (CodeLlamaTokenizerFast if request.param else CodeLlamaTokenizer)
    return found


@pytest.mark.parametrize(
    ("text", "options", "ids"),
    [
        (TEXT, {}, [1, 32000, *DEF, 32001, *RETURN, 32002]),
        (TEXT, {"suffix_first": True}, [1, 32000, 32001, *RETURN, 32002, *DEF]),
        ("<FILL_ME> world", {}, [1, 32000, 32001, 3186, 32002]),
        (" two<FILL_ME> sp", {}, [1, 32000, 29871, 1023, 32001, 805, 32002]),
        ("Hello <FILL_ME>", {}, [1, 15043, 29871]),
        ("Hello", {}, [1, 15043]),
    ],
)
def test_ids(tok: Any, text: str, options: dict[str, Any], ids: list[int]) -> None:
    assert tok(text, **options)["input_ids"] == ids == tok.encode(text, **options)
    assert tok.convert_tokens_to_ids(tok.tokenize(text, **options)) == ids[1:]
    assert tok([text, "Hello"], **options)["input_ids"] == [ids, [1, 15043]] or options
    assert tok(text, return_offsets_mapping=True, **options)["input_ids"] == ids


def test_suffix_as_an_argument(tok: Any) -> None:
    assert tok("def f(x):\n    ", suffix="\n    return y")["input_ids"] == tok(TEXT)["input_ids"]
    assert tok.tokenize("def f(x):\n    ", "\n    return y") == tok.tokenize(TEXT)
    assert (tok.prefix_id, tok.suffix_id, tok.middle_id, tok.eot_id) == (32000, 32001, 32002, 32003)
    assert tok.decode(tok.encode(TEXT), skip_special_tokens=True) == "def f(x):\n    \n    return y"


def test_mistakes(tok: Any, folder: Path) -> None:
    with pytest.raises(TokenizerError, match="one place"):
        tok("a<FILL_ME>b<FILL_ME>c")
    off = type(tok).from_pretrained(folder, prefix_token=None)
    with pytest.raises(TokenizerError, match="no infilling tokens"):
        off(TEXT)
    assert len(type(tok).from_pretrained(folder, fill_token=None)(TEXT)["input_ids"]) > 16


def test_a_saved_folder_is_code_llamas(tok: Any, folder: Path, tmp_path: Path) -> None:
    again = type(tok).from_pretrained(folder, suffix_first=True)
    again.save_pretrained(tmp_path)
    for use_fast in (True, False):
        loaded = AutoTokenizer.from_pretrained(tmp_path, use_fast=use_fast)
        assert isinstance(loaded, CodeLlamaTokenizer | CodeLlamaTokenizerFast)
        assert loaded.encode(TEXT) == tok.encode(TEXT, suffix_first=True)


@pytest.mark.parametrize("cls", [LlamaTokenizer, LlamaTokenizerFast])
def test_another_class_says_what_it_leaves_out(cls: Any, folder: Path) -> None:
    with pytest.warns(UserWarning, match="CodeLlamaTokenizer.*FILL_ME"):
        cls.from_pretrained(folder)


def test_names_at_the_top() -> None:
    for name in ("CodeLlamaTokenizer", "CodeLlamaTokenizerFast", "PreTrainedTokenizer", "PreTrainedTokenizerFast"):
        assert getattr(llama2, name).from_pretrained
