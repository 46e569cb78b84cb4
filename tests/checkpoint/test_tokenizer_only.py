"""Folders with tokenizer.json alone, as transformers 5 saves every Llama: GGUF and Meta tokenizers with equal ids."""

import json
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2 import AutoConfig, AutoTokenizer, LlamaForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.gguf import read_metadata
from llama2.checkpoint.tokenizer_files import gguf_keys
from llama2.checkpoint.tokenizer_model import rebuild
from llama2.errors import CheckpointError
from llama2.tokenizer import from_gguf, load
from llama2.tokenizer.sentencepiece_model import SentencePieceModel

HARD = [
    "",
    " ",
    "   a",
    "a    b",
    "\n\n",
    "日本語 é ẞ 🦙",
    "a\tb",
    "x" * 40,
    "    " * 9,
    "<s> </s>",
    "1234567",
    "\x00\x7f",
]


@pytest.fixture(scope="module")
def llama2_folder(tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of the real Llama 2 tokenizer, without tokenizer.model."""
    folder = tmp_path_factory.mktemp("json-only")
    load(tokenizer_model).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    return folder


def texts(news: str) -> list[str]:
    return [*HARD, *news.splitlines()]


def test_the_rebuilt_model_is_meta_s(llama2_folder: Path, tokenizer_model: Path, news_text: str) -> None:
    """Same pieces, types and merges; SentencePiece itself gives the same ids with it."""
    original = SentencePieceModel.from_file(tokenizer_model)
    made = rebuild(llama2_folder, load(llama2_folder))
    assert made is not None
    assert (made.pieces, made.types) == (original.pieces, original.types)
    assert made.merges() == original.merges()
    ours, theirs = sentencepiece.SentencePieceProcessor(), sentencepiece.SentencePieceProcessor()
    ours.LoadFromSerializedProto(made.to_bytes())
    theirs.Load(str(tokenizer_model))
    assert [ours.encode(text) for text in texts(news_text)] == [theirs.encode(text) for text in texts(news_text)]


@pytest.mark.parametrize("to", ["gguf", "meta"])
def test_conversion_keeps_the_ids(llama2_folder: Path, tmp_path: Path, news_text: str, to: str) -> None:
    tiny_model(torch.float16, vocab_size=32000, hidden_size=16, num_attention_heads=2, num_key_value_heads=2,
               intermediate_size=16).save_pretrained(tmp_path / "source")  # fmt: skip
    for file in llama2_folder.iterdir():
        shutil.copy(file, tmp_path / "source")
    target = tmp_path / ("x.gguf" if to == "gguf" else "meta")
    convert(tmp_path / "source", target, ConversionSettings(to))
    before, after = AutoTokenizer.from_pretrained(tmp_path / "source"), AutoTokenizer.from_pretrained(target)
    for text in texts(news_text):
        assert after(text).input_ids == before(text).input_ids, text
    if to == "gguf":
        keys = read_metadata(target)
        assert keys["tokenizer.ggml.model"] == "llama" and len(keys["tokenizer.ggml.tokens"]) == 32000
        assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)


def test_byte_level_needs_no_scores(tmp_path: Path, news_text: str) -> None:
    write_tokenizer(tmp_path)
    keys = gguf_keys(tmp_path, 260, chat=False)
    assert keys["tokenizer.ggml.model"] == "gpt2"
    before, after = load(tmp_path), from_gguf(keys)
    for text in texts(news_text)[:50]:
        assert after(text).input_ids == before(text).input_ids


def test_smollm2(smollm2: Path, tmp_path: Path, news_text: str) -> None:
    """A byte-level tokenizer with merges, from GGUF to tokenizer.json and back."""
    before = AutoTokenizer.from_pretrained(smollm2)
    before.save_pretrained(tmp_path)
    after = from_gguf(gguf_keys(tmp_path, 49152, chat=False))
    for text in texts(news_text):
        assert after(text).input_ids == before(text).input_ids, text


@pytest.mark.filterwarnings("error")
def test_added_tokens_without_an_embedding_are_left_out(llama2_folder: Path, tmp_path: Path) -> None:
    """convert_hf_to_gguf: "ignore token: id is out of range"."""
    shutil.copytree(llama2_folder, tmp_path / "folder")
    tokenizer: Any = load(tmp_path / "folder")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder/tokenizer.model").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match=r"<pad>, <\|im_end\|> \(2 tokens\).*beyond the model's 32000 embeddings"):
        keys = gguf_keys(tmp_path / "folder", 32000, chat=False)
    assert len(keys["tokenizer.ggml.tokens"]) == 32000 and "tokenizer.ggml.padding_token_id" not in keys
    keys = gguf_keys(tmp_path / "folder", 32064, chat=False)
    assert keys["tokenizer.ggml.tokens"][32000:32003] == ["<pad>", "<|im_end|>", "[PAD32002]"]
    assert keys["tokenizer.ggml.padding_token_id"] == 32000
    with pytest.raises(CheckpointError, match="has 32000 tokens, the model only 31000"):
        gguf_keys(tmp_path / "folder", 31000, chat=False)


@pytest.mark.filterwarnings("error")
def test_the_order_of_pairs_of_one_piece_says_nothing(llama2_folder: Path, tmp_path: Path, news_text: str) -> None:
    """transformers 5 lists ("▁t", "h") before ("▁", "th"), and ("▁▁", "▁▁") before ("▁", "▁▁▁")."""
    shutil.copytree(llama2_folder, tmp_path / "folder")
    document = json.loads((tmp_path / "folder/tokenizer.json").read_text())
    merges = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in document["model"]["merges"]]
    groups = groupby(merges, key="".join)
    turned = [pair for _, pairs in groups for pair in sorted(pairs, key=lambda pair: -len(pair[0]))]
    assert turned != merges
    document["model"]["merges"] = turned
    (tmp_path / "folder/tokenizer.json").write_text(json.dumps(document))
    before, after = load(tmp_path / "folder"), from_gguf(gguf_keys(tmp_path / "folder", 32000, chat=False))
    for text in texts(news_text):
        assert after(text).input_ids == before(text).input_ids, text


def test_merges_that_no_sentencepiece_model_has_are_told(llama2_folder: Path, tmp_path: Path) -> None:
    """As `tokenizers` trains them: one way to each piece."""
    shutil.copytree(llama2_folder, tmp_path / "folder")
    document = json.loads((tmp_path / "folder/tokenizer.json").read_text())
    merges = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in document["model"]["merges"]]
    seen: set[str] = set()
    document["model"]["merges"] = [m for m in merges if "".join(m) not in seen and not seen.add("".join(m))]
    (tmp_path / "folder/tokenizer.json").write_text(json.dumps(document))
    with pytest.warns(UserWarning, match="merges that no SentencePiece model has"):
        rebuild(tmp_path / "folder", load(tmp_path / "folder"))


# -- ids in configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["pad_token_id", "eos_token_id"])
def test_an_id_outside_the_vocabulary_is_none(tmp_path: Path, role: str) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, role: 97}))
    with pytest.warns(UserWarning, match=rf"config.json: {role} is 97.*0 to 96.*None"):
        assert getattr(AutoConfig.from_pretrained(tmp_path), role) is None
    with pytest.warns(UserWarning, match=f"config.json: {role} is 97"):
        model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert getattr(model.config, role) is None


def test_one_of_several_ends_outside_the_vocabulary(tmp_path: Path) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 128009]}))
    with pytest.warns(UserWarning, match="eos_token_id is 128009"):
        assert AutoConfig.from_pretrained(tmp_path).eos_token_id == [2]


@pytest.mark.parametrize(
    ("rope", "kept", "named"),
    [
        ({"type": "linear", "factor": 2.0, "finetuned": True}, {"rope_type": "linear", "factor": 2.0}, "finetuned"),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "finetuned": True,
             "extrapolation_factor": 1.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            "extrapolation_factor, finetuned",
        ),
        ({"type": "linear", "factor": 2.0, "beta_fast": 32}, {"rope_type": "linear", "factor": 2.0}, "beta_fast"),
    ],
)  # fmt: skip
def test_rope_settings_without_a_meaning_are_named(tmp_path: Path, rope: Any, kept: Any, named: str) -> None:
    """transformers ignores them with a warning too ("Unrecognized keys in `rope_scaling`")."""
    tiny_model(torch.float32, rope_scaling=kept).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": rope}))
    with pytest.warns(UserWarning, match=f"{tmp_path}/config.json: .*{named}.* no effect"):
        config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_scaling == kept
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_scaling"], config["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": {**rope, "rope_theta": 5000.0}}))
    with pytest.warns(UserWarning, match=f"{tmp_path}/config.json: .*{named}.* no effect"):
        assert AutoConfig.from_pretrained(tmp_path).rope_theta == 5000.0
