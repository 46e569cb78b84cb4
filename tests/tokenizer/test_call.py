"""The call API, special tokens and added tokens: worked examples, the same on both classes."""

import logging
from pathlib import Path
from typing import Any

import pytest

from llama2 import AutoTokenizer
from llama2.errors import InputError, TokenizerError
from llama2.tokenizer import AddedToken, LlamaTokenizer, LlamaTokenizerFast

# text -> ids with Meta's behaviour, ids with legacy=False
GOLDEN = [
    ("Hello world", [1, 15043, 3186], [1, 15043, 3186]),
    (" Hello", [1, 29871, 15043], [1, 29871, 15043]),
    ("  Hello", [1, 259, 15043], [1, 259, 15043]),
    (" ", [1, 259], [1, 259]),
    ("", [1], [1]),
    ("▁Hello", [1, 29871, 15043], [1, 29871, 15043]),
    ("<s> Hello", [1, 1, 29871, 15043], [1, 1, 15043]),
    ("Hello <s>.", [1, 15043, 29871, 1, 869], [1, 15043, 29871, 1, 29889]),
    ("Hello<s>how", [1, 15043, 1, 920], [1, 15043, 1, 3525]),
    ("Hello</s> world", [1, 15043, 2, 29871, 3186], [1, 15043, 2, 3186]),
    ("abs</s>USER", [1, 6425, 2, 3148, 1001], [1, 6425, 2, 11889]),
    ("\n", [1, 29871, 13], [1, 29871, 13]),
    ("a    b", [1, 263, 1678, 289], [1, 263, 1678, 289]),
    ("A sample test", [1, 319, 4559, 1243], [1, 319, 4559, 1243]),
]


@pytest.fixture(params=[LlamaTokenizer, LlamaTokenizerFast])
def make(request: Any, spm: Any) -> Any:
    """A constructor: `make(**options)` is a new tokenizer of each class in turn."""
    return lambda **options: request.param(spm, **options)


@pytest.fixture
def tok(make: Any) -> Any:
    return make()


@pytest.mark.parametrize(("text", "meta", "other"), GOLDEN)
def test_goldens(slow: Any, fast: Any, slow_c: Any, fast_c: Any, text: str, meta: list[int], other: list[int]) -> None:
    assert slow.encode(text) == fast.encode(text) == meta
    assert slow_c.encode(text) == fast_c.encode(text) == other


def test_decode_goldens(tok: Any) -> None:
    assert tok.decode([1, 15043]) == "<s> Hello"
    assert tok.decode([1, 15043], skip_special_tokens=True) == "Hello"
    assert tok.decode([29871, 15043]) == " Hello"
    assert tok.decode([1, 12199]) == "<s>hello"
    assert tok.decode(15043) == "Hello"
    assert tok.decode([243, 162, 169, 156, 243]) == "🦙\ufffd"
    assert tok.batch_decode([[15043], [3186]]) == ["Hello", "world"] == tok.decode([[15043], [3186]])
    assert tok.decode(tok.encode("Hello , world !"), True, clean_up_tokenization_spaces=True) == "Hello, world!"
    assert tok.decode([]) == ""
    assert tok.decode([15043, 32010, 3186, 99999]) == "Hello world"
    with pytest.raises(TokenizerError, match="-100"):
        tok.decode([15043, -100])


def test_streams_hold_unfinished_characters_and_clean_up(make: Any) -> None:
    tok = make()
    stream = tok.stream_decoder()
    assert [stream.put(i) for i in (15043, 243, 162, 169, 156, 3186)] == ["Hello", "", "", "", "🦙", " world"]
    assert stream.put([29871, 243]) == " "
    assert stream.finish() == "\ufffd"
    with pytest.raises(TokenizerError, match="finished"):
        stream.put(1)
    cleaner = make(clean_up_tokenization_spaces=True)
    for text in ("Hello , world ! I 'm  . here n't ' x ' .", "a ' b", " ' ' '", "don 't ."):
        ids = cleaner.encode(text, add_special_tokens=False)
        stream = cleaner.stream_decoder()
        assert "".join([*map(stream.put, ids), stream.finish()]) == cleaner.decode(ids)
    for ids in ([1, 15043, 2, 3186], [29871, 15043]):
        stream = tok.stream_decoder(skip_special_tokens=True)
        assert "".join([*map(stream.put, ids), stream.finish()]) == tok.decode(ids, skip_special_tokens=True)


def test_add_prefix_space(make: Any) -> None:
    tok = make(add_prefix_space=False)
    assert tok.encode("Hey how are you doing") == [1, 29950, 1032, 920, 526, 366, 2599]
    assert tok.decode([15043]) == " Hello"


def test_special_token_methods(make: Any) -> None:
    tok = make()
    assert tok.build_inputs_with_special_tokens([5, 6], [7]) == [1, 5, 6, 1, 7]
    assert tok.get_special_tokens_mask([5, 6], [7]) == [1, 0, 0, 1, 0]
    assert tok.get_special_tokens_mask([1, 5, 0, 2], already_has_special_tokens=True) == [1, 0, 1, 1]
    assert tok.create_token_type_ids_from_sequences([5, 6], [7]) == [0, 0, 0, 1, 1]
    assert (tok.num_special_tokens_to_add(), tok.num_special_tokens_to_add(pair=True)) == (1, 2)
    assert (tok.all_special_tokens, tok.all_special_ids) == (["<s>", "</s>", "<unk>"], [1, 2, 0])
    assert (len(tok), tok.vocab_size, tok.pad_token_id, tok.model_max_length) == (32000, 32000, None, int(1e30))
    tok.add_eos_token = True
    assert tok.encode("A sample test") == [1, 319, 4559, 1243, 2]
    assert tok("a", "b")["input_ids"] == [1, 263, 2, 1, 289, 2]
    tok.add_bos_token = False
    assert tok.encode("A sample test") == [319, 4559, 1243, 2]
    assert make(add_bos_token=False, add_eos_token=True).encode("A sample test") == [319, 4559, 1243, 2]
    with pytest.raises(ValueError, match="add_bos_token = True but bos_token = None"):
        make(bos_token=None)
    tok.eos_token = "<s>"
    tok.update_post_processor()
    assert tok.encode("a") == [263, 1]


def test_added_tokens(tok: Any) -> None:
    assert tok.add_special_tokens({"pad_token": "<pad>"}) == 1
    assert (tok.pad_token_id, len(tok), tok.vocab_size) == (32000, 32001, 32000)
    assert tok.add_tokens("<pad>") == 0
    assert tok.add_tokens([AddedToken("zap", normalized=False), "newtok"]) == 2
    assert tok.encode("Hellozapworld", add_special_tokens=False) == [15043, 32001, 3186]
    assert tok.encode("Hellonewtokworld", add_special_tokens=False) == [15043, 32002, 3186]
    ids = tok.encode("Hello newtok world", add_special_tokens=False)
    assert ids[2] == 32002
    assert tok.decode(ids) == "Hello newtok  world"
    assert tok.convert_tokens_to_ids(["newtok", "▁Hello", "nowhere to be found"]) == [32002, 15043, 0]
    assert tok.convert_ids_to_tokens([15043, 13, 32000]) == ["▁Hello", "<0x0A>", "<pad>"]
    assert tok.get_vocab()["<pad>"] == 32000
    tok.pad_token_id = 2
    assert tok.pad_token == "</s>"
    with pytest.raises(TokenizerError, match="add_special_tokens"):
        tok.pad_token = "[PAD]"
    with pytest.raises(TokenizerError, match="not a special token"):
        tok.add_special_tokens({"padding": "x"})


def test_split_special_tokens(make: Any, slow: LlamaTokenizer) -> None:
    plain = [1, *slow.sp_model.encode("x</s>")]
    assert make().encode("x</s>", split_special_tokens=True) == plain == make(split_special_tokens=True).encode("x</s>")


def test_padding_and_tensors(make: Any) -> None:
    tok = make(pad_token="<unk>", padding_side="left")
    enc = tok(["Hello", "Hello world"], padding=True, return_tensors="np", return_special_tokens_mask=True)
    assert enc["input_ids"].tolist() == [[0, 1, 15043], [1, 15043, 3186]]
    assert enc.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert enc["special_tokens_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    right = tok(["Hello"], padding="max_length", max_length=4, padding_side="right", pad_to_multiple_of=3)
    assert right["input_ids"] == [[1, 15043, 0, 0, 0, 0]]
    assert tok("Hello", return_tensors="np")["input_ids"].shape == (1, 2)
    padded = tok.pad([{"input_ids": [1], "labels": [7]}, {"input_ids": [1, 2], "labels": [7, 8]}])
    assert padded["input_ids"] == [[0, 1], [1, 2]]
    assert padded["labels"] == [[7], [7, 8]]
    assert tok.pad({"input_ids": [1, 2]}, padding="max_length", max_length=3)["input_ids"] == [0, 1, 2]


def test_pairs_types_and_alignment(tok: Any) -> None:
    enc = tok("a", "b", return_token_type_ids=True)
    assert (enc["input_ids"], enc["token_type_ids"]) == ([1, 263, 1, 289], [0, 0, 1, 1])
    enc = tok("Hello  wörld 🦙\n", return_offsets_mapping=True)
    assert enc["offset_mapping"] == [
        *[(0, 0), (0, 5), (5, 6), (6, 8), (8, 10), (10, 12), (12, 13)],
        *[(13, 14)] * 4,
        (14, 15),
    ]
    assert enc.char_to_token(9) == 4
    assert enc.token_to_chars(1) == (0, 5)
    assert enc.tokens()[:3] == ["<s>", "▁Hello", "▁"]
    assert enc.word_to_tokens(1) == (2, 6)
    words = tok(["New", "York!"], is_split_into_words=True)
    assert words.word_ids() == [None, 0, 1, 1]
    assert tok(["q1", "q2"], ["c1", "c2"]).sequence_ids(1)[-1] == 1


def test_truncation_and_overflow(tok: Any) -> None:
    text = "one two three four five six"
    ids = tok.encode(text)
    assert tok(text, truncation=True, max_length=4)["input_ids"] == ids[:4]
    tok.truncation_side = "left"
    assert tok(text, truncation=True, max_length=4)["input_ids"] == [1, *ids[-3:]]
    tok.truncation_side = "right"
    enc = tok(text, truncation=True, max_length=4, stride=1, return_overflowing_tokens=True)
    assert enc["input_ids"] == [[1, *ids[1:4]], [1, *ids[3:6]], [1, *ids[5:7]]]
    assert enc["overflow_to_sample_mapping"] == [0, 0, 0]
    pair = tok("one two", text, truncation="only_second", max_length=6)["input_ids"]
    assert pair == [*tok.encode("one two"), *ids[:3]]
    assert len(tok(text, text, truncation="longest_first", max_length=9)["input_ids"]) == 9
    with pytest.raises(TokenizerError, match="only_first"):
        tok("one", text, truncation="only_first", max_length=6)
    with pytest.raises(TokenizerError, match="stride=3"):
        tok(text, truncation=True, max_length=4, stride=3, return_overflowing_tokens=True)


def test_targets_lengths_and_batches(tok: Any) -> None:
    enc = tok("Hello", text_target="world", return_length=True)
    assert (enc["labels"], enc["length"]) == ([1, 3186], 2)
    assert tok(text_target="world")["input_ids"] == [1, 3186]
    assert tok([])["input_ids"] == []
    assert tok.tokenize("Hello world") == ["▁Hello", "▁world"]
    assert tok.convert_tokens_to_string(["▁Hello", "▁world"]) == "Hello world"
    assert tok.prepare_for_model([5, 6], [7])["input_ids"] == [1, 5, 6, 1, 7]


@pytest.mark.parametrize("wrong", [None, 5, [5], [1, 2], {"a": 1}, [None], b"x", ["a", 3]])
def test_wrong_types(tok: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="text"):
        tok(wrong)


def test_wrong_arguments(tok: Any) -> None:
    with pytest.raises(ValueError, match=r"pad_token = tokenizer.eos_token.*add_special_tokens"):
        tok(["a", "b c"], padding=True)
    with pytest.raises(ValueError, match="padding=True"):
        tok(["a", "b c"], return_tensors="np")
    for options in ({"padding": "always"}, {"truncation": "some"}, {"return_tensors": "tf"}):
        with pytest.raises(InputError, match=str(next(iter(options.values())))):
            tok("a", **options)
    with pytest.raises(InputError, match="pad_to_multiple_of=16"):
        tok("a", padding=True, truncation=True, max_length=40, pad_to_multiple_of=16)
    with pytest.raises(InputError, match="surrogate"):
        tok("a\ud800")


def test_double_bos_is_reported_once(tok: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="llama2"):
        tok("<s> Hello")
        tok("<s> Hello")
    assert len([r for r in caplog.records if "second one" in r.message]) == 1


def test_ids_of_a_padded_vocabulary_have_no_piece(fast: Any, slow: Any, smollm2: Path) -> None:
    for tok in (fast, slow, AutoTokenizer.from_pretrained(smollm2)):
        beyond = len(tok) + 7
        assert tok.convert_ids_to_tokens(beyond) is None and tok.convert_ids_to_tokens(-1) is None
        assert tok.convert_ids_to_tokens([beyond, tok.eos_token_id]) == [None, tok.eos_token]
