"""What other libraries call on a tokenizer: values are those of transformers 4.46."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from llama2 import AutoTokenizer
from llama2.errors import TokenizerError
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE, AddedToken, LlamaTokenizer, LlamaTokenizerFast


@pytest.fixture(params=[LlamaTokenizer, LlamaTokenizerFast])
def tok(request: Any, spm: Any) -> Any:
    return request.param(spm, pad_token="<unk>")


def test_vocabularies(tok: Any) -> None:
    tok.add_tokens(["<new>"])
    assert tok.vocab == tok.get_vocab() and tok.vocab["<new>"] == 32000
    assert tok.get_added_vocab() == {"<unk>": 0, "<s>": 1, "</s>": 2, "<new>": 32000}


def test_special_tokens_with_flags(tok: Any) -> None:
    tok.add_special_tokens({"additional_special_tokens": [AddedToken("<x>", lstrip=True, special=True)]})
    found = tok.special_tokens_map_extended
    assert found["bos_token"].content == "<s>" and found["bos_token"].special
    assert found["additional_special_tokens"][0].lstrip
    assert [str(token) for token in tok.all_special_tokens_extended] == tok.all_special_tokens
    assert tok.sanitize_special_tokens() == 0
    tok.additional_special_tokens = None
    assert tok.additional_special_tokens is None and tok.extra_special_tokens == []
    tok.additional_special_tokens_ids = [2]
    assert tok.additional_special_tokens == tok.extra_special_tokens == ["</s>"]
    assert tok.add_special_tokens({"extra_special_tokens": ["<y>"]}, replace_extra_special_tokens=False) == 1
    assert tok.extra_special_tokens_ids == [2, 32001] and tok.backend in ("sentencepiece", "tokenizers")


def test_added_tokens_of_the_tokenizers_package(tok: Any) -> None:
    flags = {"lstrip": True, "special": True, "normalized": False}
    theirs = tokenizers.AddedToken("<x>", **flags)
    assert AddedToken("<x>", **flags) == theirs and AddedToken("<x>") != theirs and AddedToken("<x>") != "<x>"
    assert tok.add_tokens([theirs]) == 1 and theirs in tok.added_tokens_decoder.values()


def test_padding_to_no_length(tok: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As both versions of transformers: nothing is padded, and that is said; again after the notes are cleared."""
    for _ in range(2):
        assert tok("a", padding="max_length")["input_ids"] == [1, 263]
    assert sum("nothing is padded" in record.getMessage() for record in caplog.records) == 1
    tok.deprecation_warnings = {}
    tok("a", padding="max_length")
    assert sum("nothing is padded" in record.getMessage() for record in caplog.records) == 2


def test_keywords_of_calls(tok: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert tok("a", padding="max_length", max_length=4) == tok("a", pad_to_max_length=True, max_length=4)
    for _ in range(2):
        assert tok("a", max_target_length=3)["input_ids"] == [1, 263]
        assert tok.decode([263], use_source_tokenizer=False) == "a" == tok.batch_decode([[263]])[0]
    said = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert len(said) == 2 and "max_target_length" in said[0] and "use_source_tokenizer" in said[1]


def test_both_sides_of_a_token(spm: Any) -> None:
    """transformers' test_special_token_special_word, in all modes."""
    for cls in (LlamaTokenizer, LlamaTokenizerFast):
        tok = cls(spm, legacy=False)
        tok.add_tokens([AddedToken("<REPR_END>", rstrip=True, lstrip=True)])
        assert tok.encode("<REPR_END>inform", add_special_tokens=False) == [32000, 262, 689]
        assert tok.encode(" <REPR_END>inform", add_special_tokens=False) == [32000, 262, 689]
        assert tok.encode("a  <REPR_END> b", add_special_tokens=False) == [263, 32000, 29890]
    assert LlamaTokenizer(spm, legacy=False).sp_model.encode("<s>>", out_type=str) == ["<", "s", ">>"]
    assert LlamaTokenizer(spm).sp_model.encode("<s>>", out_type=str) == ["▁<", "s", ">>"]


def test_truncate_sequences(tok: Any) -> None:
    ids, pair = [1, 2, 3, 4, 5], [6, 7, 8]
    assert tok.truncate_sequences(ids, num_tokens_to_remove=2) == ([1, 2, 3], None, [4, 5])
    assert tok.truncate_sequences(ids, num_tokens_to_remove=2, stride=1) == ([1, 2, 3], None, [3, 4, 5])
    assert tok.truncate_sequences(ids, pair, 2, "only_second") == (ids, [6], [7, 8])
    assert tok.truncate_sequences(ids, pair, 3, "longest_first") == ([1, 2, 3], [6, 7], [])
    assert tok.truncate_sequences(ids, pair, 0) == (ids, pair, [])
    tok.truncation_side = "left"
    assert tok.truncate_sequences(ids, num_tokens_to_remove=2) == ([3, 4, 5], None, [1, 2])
    with pytest.raises(TokenizerError, match="only_first"):
        tok.truncate_sequences([1], [2, 3], 2, "only_first")


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_padding_of_tensors_gives_tensors(tok: Any, kind: Any) -> None:
    tok.padding_side = "right"
    rows = [{"input_ids": kind([1, 2, 3])}, {"input_ids": kind([4])}]
    found = tok.pad(rows)["input_ids"]
    assert type(found) is type(kind([1])) and found.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert isinstance(tok.pad(rows, return_tensors="np")["input_ids"], np.ndarray)
    assert tok.pad({"input_ids": kind([[1, 2]])}, padding="max_length", max_length=3)["input_ids"].tolist() == [
        [1, 2, 0]
    ]
    assert isinstance(tok.pad([{"input_ids": [1]}])["input_ids"], list)


def test_lengths_of_numpy(tok: Any) -> None:
    whole = tok("one two three", padding="max_length", truncation=True, max_length=9, pad_to_multiple_of=3)
    numpy = tok(
        "one two three", padding="max_length", truncation=True, max_length=np.int64(9), pad_to_multiple_of=np.int32(3)
    )
    assert whole["input_ids"] == numpy["input_ids"] and len(whole["input_ids"]) == 9
    assert tok("a b c d", truncation=True, max_length=torch.tensor(3), stride=np.int8(0))["input_ids"] == [1, 263, 289]
    assert LlamaTokenizer(tok._spm, model_max_length=np.int64(7)).model_max_length == 7
    for wrong in (2.5, "9", -1):
        with pytest.raises(TokenizerError, match="max_length"):
            tok("a", truncation=True, max_length=wrong)


def test_train_a_new_vocabulary(tok: Any, news_text: str) -> None:
    lines = news_text.splitlines()
    new = tok.train_new_from_iterator(
        (lines[i : i + 8] for i in range(0, 80, 8)),
        700,
        new_special_tokens=["<new>"],
        special_tokens_map={"<s>": "<b>"},
    )
    assert isinstance(new, LlamaTokenizerFast) and len(new) == 700
    assert (new.bos_token, new.eos_token, new.unk_token) == ("<b>", "</s>", "<unk>")
    assert new.additional_special_tokens == ["<new>"]
    for text in (*lines[100:105], "東京 🦙\n"):
        ids = new.encode(text)
        assert ids[0] == new.bos_token_id and new.decode(ids, skip_special_tokens=True) == text
    assert len(new.encode(lines[0])) < len(lines[0]) / 2
    with pytest.raises(TokenizerError, match="vocab_size=100"):
        tok.train_new_from_iterator(lines, 100)


def test_train_a_byte_level_vocabulary(smollm2: Path, news_text: str) -> None:
    new = AutoTokenizer.from_pretrained(smollm2).train_new_from_iterator(news_text.splitlines()[:50], 600)
    assert new.decode(new.encode("Some 東京 text")) == "Some 東京 text" and new.eos_token == "<|im_end|>"


def test_no_upload_without_being_asked(tok: Any, tmp_path: Path) -> None:
    tok.save_pretrained(tmp_path, push_to_hub=False)
    with pytest.warns(UserWarning, match="repo_id"):
        tok.save_pretrained(tmp_path, repo_id="me/it")


def test_push_to_hub(tok: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    calls: list[Any] = []
    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **k: calls.append((repo_id, k)))
    monkeypatch.setattr(
        hub, "upload_folder", lambda **k: calls.append(sorted(k["allow_patterns"])) or f"of {k['repo_id']}"
    )
    assert tok.push_to_hub("me/it", private=True, token="t") == "of me/it"
    assert calls[0] == ("me/it", {"token": "t", "private": True, "exist_ok": True})
    assert "tokenizer_config.json" in calls[1] and "tokenizer.model" in calls[1]
    tok.save_pretrained(tmp_path / "name", push_to_hub=True, commit_message="m")
    assert calls[2][0] == "name"


def test_pickling_keeps_everything(tok: Any) -> None:
    tok.add_tokens(["<new>"])
    again = pickle.loads(pickle.dumps(tok))
    assert again.encode("a<new> b") == tok.encode("a<new> b") and again.encode_bytes(b"\xff") == tok.encode_bytes(
        b"\xff"
    )


def test_ids_beyond_the_vocabulary_leave_streams_alone(tok: Any) -> None:
    stream = tok.stream_decoder(skip_special_tokens=True)
    assert "".join([*map(stream.put, [15043, 32010, 3186, 40000]), stream.finish()]) == "Hello world"
    assert tok.batch_decode([[15043, 32010]]) == ["Hello"]


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"legacy": False}, {"add_prefix_space": False}, {"prefix": "metaspace"}])
@pytest.mark.parametrize("cls", [LlamaTokenizer, LlamaTokenizerFast])
def test_to_transformers_is_equal(cls: Any, options: Any, spm: Any, random_texts: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    tok = cls(spm, pad_token="<unk>", chat_template=LLAMA2_CHAT_TEMPLATE, padding_side="left", **options)
    tok.add_tokens(["<new>", AddedToken("<r>", rstrip=True)])
    tok.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    theirs = tok.to_transformers()
    assert isinstance(theirs, transformers.PreTrainedTokenizerBase)
    texts = [*random_texts[:300], "bye<|im_end|> <new> <r>  x", " a", "<s> b"]
    assert theirs(texts)["input_ids"] == tok(texts)["input_ids"]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.padding_side) == (0, 2, "left")
    assert len(theirs) == len(tok) and theirs.model_max_length == tok.model_max_length
    chat = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(chat, return_dict=False) == tok.apply_chat_template(chat)
    assert theirs.decode([1, 15043, 32002], skip_special_tokens=True) == tok.decode([1, 15043, 32002], True)


@pytest.mark.parity
def test_a_byte_level_tokenizer_to_transformers(smollm2: Path, random_texts: list[str]) -> None:
    pytest.importorskip("transformers")
    tok = AutoTokenizer.from_pretrained(smollm2)
    assert tok.to_transformers()(random_texts[:300])["input_ids"] == tok(random_texts[:300])["input_ids"]
