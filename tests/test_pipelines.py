"""pipeline(): inputs of every shape, results as transformers shapes them, equal to the calls underneath."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config

from llama2 import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification, pipeline
from llama2.errors import InputError
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE, LlamaTokenizerFast

SPECIAL = ("<pad>", "<end>", "<user>", "<assistant>")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of printable ASCII, one token a character, behind four special ones."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(i) for i in range(0x21, 0x7F)] + ["Ġ"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    added = [{"id": i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, t in enumerate(SPECIAL)]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocabulary, "merges": []}  # fmt: skip
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
               "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"eos_token": "<end>", "pad_token": "<pad>", "bos_token": None, "unk_token": None,
                "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = tiny_config(vocab_size=99, max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    network = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generator(folder: Path) -> Any:
    return pipeline("text-generation", model=folder)


def continued(generator: Any, text: str, **settings: Any) -> list[str]:
    """Texts that generate() itself gives behind a prompt."""
    ids = torch.tensor([generator.tokenizer.encode(text)])
    rows = generator.model.generate(ids, max_new_tokens=6, **settings)
    return [generator.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in rows]


# -- text-generation ---------------------------------------------------------------------------------------------


def test_text(generator: Any) -> None:
    (new,) = continued(generator, "one")
    assert new
    assert generator("one", max_new_tokens=6) == [{"generated_text": "one" + new}]
    assert generator("one", max_new_tokens=6, return_full_text=False) == [{"generated_text": new}]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_equal_single_rows(generator: Any, batch_size: int) -> None:
    texts = ["one", "a longer text", "x"]
    results = generator(texts, max_new_tokens=6, batch_size=batch_size)
    assert results == [generator(text, max_new_tokens=6) for text in texts]


def test_several_sequences(generator: Any) -> None:
    settings = {"do_sample": True, "num_return_sequences": 3, "seed": 7}
    news = continued(generator, "one", **settings)
    assert len(set(news)) > 1
    assert generator("one", max_new_tokens=6, **settings) == [{"generated_text": "one" + new} for new in news]
    assert [len(each) for each in generator(["one", "two"], max_new_tokens=6, batch_size=2, **settings)] == [3, 3]


def test_token_ids(generator: Any) -> None:
    (record,) = generator("one", max_new_tokens=6, return_tensors=True)
    ids = torch.tensor([generator.tokenizer.encode("one")])
    assert record == {"generated_token_ids": generator.model.generate(ids, max_new_tokens=6)[0].tolist()}


def test_rows_end_at_their_own_end(generator: Any) -> None:
    texts = ["one", "a longer text", "x"]
    whole = [generator(text, max_new_tokens=6, return_tensors=True)[0]["generated_token_ids"] for text in texts]
    end = whole[0][4]  # the second new token of the first row ends it, and pads follow until the others are done
    results = generator(texts, max_new_tokens=6, return_tensors=True, eos_token_id=end, batch_size=3)
    cut = [row[: len(text) + 1 + row[len(text) :].index(end)] if end in row[len(text) :] else row
           for row, text in zip(whole, texts, strict=True)]  # fmt: skip
    assert len(cut[0]) < 3 + 6 and [r[0]["generated_token_ids"] for r in results] == cut


def test_first_space_of_the_new_text_stays(tokenizer_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_model)
    model = LlamaForCausalLM(tiny_config(vocab_size=32000)).eval()
    paris = tokenizer.encode("Paris", add_special_tokens=False)[0]
    only = [i for i in range(32000) if i != paris]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=1, suppress_tokens=only)
    assert pipe("It is") == [{"generated_text": "It is Paris"}]


def test_chat(generator: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    (new,) = continued(generator, "<user>hi<assistant>")
    assert generator(chat, max_new_tokens=6) == [{"generated_text": [*chat, {"role": "assistant", "content": new}]}]
    assert generator(chat, max_new_tokens=6, return_full_text=False) == [{"generated_text": new}]
    assert generator([chat, chat], max_new_tokens=6, batch_size=2) == [generator(chat, max_new_tokens=6)] * 2


def test_chat_that_ends_with_the_assistant_is_continued(generator: Any) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}]
    (new,) = continued(generator, "<user>hi<assistant>well")
    (record,) = generator(chat, max_new_tokens=6)
    assert record["generated_text"] == [chat[0], {"role": "assistant", "content": "well" + new}]
    (record,) = generator(chat, max_new_tokens=6, continue_final_message=False)
    assert [m["role"] for m in record["generated_text"]] == ["user", "assistant", "assistant"]


def test_lengths(generator: Any, folder: Path) -> None:
    def new_tokens(pipe: Any, **settings: Any) -> int:
        return len(pipe("one", return_tensors=True, eos_token_id=[], **settings)[0]["generated_token_ids"]) - 3

    assert new_tokens(generator) == 256
    assert new_tokens(generator, max_length=10) == 7
    assert new_tokens(pipeline("text-generation", model=folder, max_new_tokens=4)) == 4


def test_stop_sequence(generator: Any) -> None:
    (new,) = continued(generator, "one")
    assert new[2] not in new[:2]
    (record,) = generator("one", max_new_tokens=6, stop_sequence=new[2], return_full_text=False)
    assert record == {"generated_text": new[:3]}


def test_truncation_keeps_the_end(generator: Any) -> None:
    text = "".join(str(i) for i in range(240))
    assert len(text) > 512
    with pytest.raises(InputError, match="context is 512"):
        generator(text, max_new_tokens=6)
    (record,) = generator(text, max_new_tokens=6, truncation=True, return_full_text=False)
    assert [record["generated_text"]] == continued(generator, text[-506:])


def test_iterators_are_lazy(generator: Any) -> None:
    def texts() -> Iterator[str]:
        yield "one"
        raise LookupError

    results = generator(texts(), max_new_tokens=6, return_full_text=False)
    assert next(results) == generator("one", max_new_tokens=6, return_full_text=False)
    with pytest.raises(LookupError):
        next(results)


@pytest.mark.parametrize(
    ("inputs", "settings", "said"),
    [
        ("", {}, "empty"),
        (3, {}, "is a int"),
        (["one", 3], {}, "is a int"),
        ("one", {"temprature": 2}, "temprature"),
        ("one", {"batch_size": 0}, "batch_size is 0"),
        ("one", {"return_text": True, "return_tensors": True}, "return_text excludes"),
        ("one", {"return_full_text": True, "return_tensors": True}, "exclude each other"),
    ],
)
def test_mistakes(generator: Any, inputs: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        generator(inputs, **settings)


def test_batch_without_a_pad_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    pipe = pipeline("text-generation", model=folder, tokenizer=tokenizer, batch_size=2, max_new_tokens=2)
    assert len(pipe(["one"])) == 1
    with pytest.raises(InputError, match="no pad token"):
        pipe(["one", "two"])


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"return_full_text": False}, {}),
        ({"return_tensors": True}, {}),
        ({"return_text": True}, {}),
        ({"return_type": 1}, {}),
        ({"skip_special_tokens": False, "clean_up_tokenization_spaces": True}, {}),
        ({"prefix": "x", "add_special_tokens": False}, {}),
        ({"truncation": True, "handle_long_generation": "hole"}, {}),
        ({"stop_sequence": "e"}, {}),
        ({"do_sample": True, "seed": 3, "num_return_sequences": 2, "temperature": 0.7}, {}),
        ({"tokenizer_encode_kwargs": {"add_special_tokens": False}, "num_workers": 0}, {}),
        ({"return_full_text": False}, {"return_tensors": True}),  # what the call asks for wins over its like
        ({"return_full_text": False}, {"return_full_text": True}),
    ],
)
def test_options_of_calls_are_options_of_the_construction(
    folder: Path, generator: Any, options: dict[str, Any], call: dict[str, Any]
) -> None:
    pipe = pipeline("text-generation", model=folder, max_new_tokens=5, **options)
    whole = {**options, **call} if not set(call) - set(options) else call
    assert pipe("one", **call) == generator("one", max_new_tokens=5, **whole)


def test_options_for_chats(folder: Path, generator: Any) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    template = "{{ tools|tojson }}{{ documents }}{% for m in messages %}{{ m.content }}{% endfor %}"
    pipe = pipeline("text-generation", model=folder, tools=tools, documents=["d"], max_new_tokens=2)
    pipe.tokenizer.chat_template = template
    (found,) = pipe([{"role": "user", "content": "Hi"}], return_tensors=True)
    text = pipe.tokenizer.decode(found["generated_token_ids"][:-2])
    assert "look" in text and "['d']" in text and text.endswith("Hi")


def test_a_rendered_chat_gets_no_second_bos(folder: Path, tokenizer_model: Path) -> None:
    tokenizer = LlamaTokenizerFast(tokenizer_model, chat_template=LLAMA2_CHAT_TEMPLATE)
    torch.manual_seed(0)
    network = LlamaForCausalLM(tiny_config(vocab_size=32000)).eval()
    pipe = pipeline("text-generation", model=network, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    for given in (rendered, [rendered]):
        found = pipe(given, return_tensors=True, max_new_tokens=1)
        ids = (found[0][0] if isinstance(given, list) else found[0])["generated_token_ids"]
        assert ids[:-1] == tokenizer.apply_chat_template(chat)


@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_an_unknown_option_is_refused_at_once(folder: Path, task: str) -> None:
    with pytest.raises(InputError, match="retrun_full_text"):
        pipeline(task, model="nowhere", retrun_full_text=False)  # said before anything is loaded


# -- text-classification -----------------------------------------------------------------------------------------


def classifier(folder: Path, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = tiny_config(vocab_size=99, pad_token_id=0, **changes)
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return pipeline("text-classification", model=model, tokenizer=folder)


def logits(pipe: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        row: torch.Tensor = pipe.model(torch.tensor([pipe.tokenizer.encode(text)])).logits[0]
    return row


def test_labels(folder: Path) -> None:
    pipe = classifier(folder, id2label={0: "bad", 1: "fair", 2: "good"})
    scores = logits(pipe, "one").softmax(-1)
    best = {"label": pipe.model.config.id2label[int(scores.argmax())], "score": pytest.approx(float(scores.max()))}
    assert pipe("one") == [best] and pipe(["one"]) == [best]
    ordered = pipe("one", top_k=None)
    assert {r["label"] for r in ordered} == {"bad", "fair", "good"} and ordered[0] == best
    assert [r["score"] for r in ordered] == pytest.approx(sorted(scores.tolist(), reverse=True))
    assert pipe("one", top_k=2) == ordered[:2] and pipe(["one"], top_k=2) == [ordered[:2]]


def test_padded_batch_equals_single_texts(folder: Path) -> None:
    pipe = classifier(folder)
    texts = ["one", "a longer text", "x"]
    single = [pipe(text)[0] for text in texts]
    batched = pipe(texts, batch_size=3)
    assert [r["label"] for r in batched] == [r["label"] for r in single]
    assert [r["score"] for r in batched] == pytest.approx([r["score"] for r in single], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "function"),
    [
        ({}, "softmax"),
        ({"num_labels": 1}, "sigmoid"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "regression", "num_labels": 1}, "none"),
    ],
)
def test_function_that_fits_the_labels(folder: Path, changes: dict[str, Any], function: str) -> None:
    pipe = classifier(folder, **changes)
    row = logits(pipe, "one")
    wanted = {"softmax": row.softmax(-1), "sigmoid": row.sigmoid(), "none": row}
    for name in (None, "softmax", "sigmoid", "none"):
        scores = [r["score"] for r in pipe("one", top_k=None, **({} if name is None else {"function_to_apply": name}))]
        assert scores == pytest.approx(sorted(wanted[name or function].tolist(), reverse=True))


def test_pairs(folder: Path) -> None:
    pipe = classifier(folder)
    assert pipe({"text": "one", "text_pair": "two"}) == pipe(["onetwo"])


@pytest.mark.parametrize(
    ("inputs", "settings", "said"),
    [
        ("one", {"top_k": 0}, "top_k is 0"),
        ("one", {"function_to_apply": "tanh"}, "softmax, sigmoid, none"),
        ("one", {"max_new_tokens": 3}, "max_new_tokens"),
        ("", {}, "empty"),
        ([["one", "two"]], {}, "text_pair"),
    ],
)
def test_classification_mistakes(folder: Path, inputs: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        classifier(folder)(inputs, **settings)


# -- the door ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "settings", "said"),
    [
        (("translation",), {"model": "x"}, "there are 'text-generation' and 'text-classification'"),
        (("text-generation",), {}, "needs model="),
        (("text-generation",), {"model": "x", "framework": "tf"}, "framework is 'tf'"),
        (("text-generation",), {"model": "x", "device": 0, "device_map": "auto"}, "give one of them"),
        (("text-generation",), {"model": object()}, "pass tokenizer="),
    ],
)
def test_door(args: tuple[str, ...], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        pipeline(*args, **settings)


def test_dtype_and_device(folder: Path) -> None:
    pipe = pipeline("text-generation", model=str(folder), torch_dtype="bfloat16", device=-1)
    assert pipe.dtype == pipe.torch_dtype == torch.bfloat16 and pipe.device.type == "cpu" and pipe.framework == "pt"
    assert pipeline(model=pipe.model, tokenizer=pipe.tokenizer).task == "text-generation"
    assert pipeline("sentiment-analysis", model=pipe.model, tokenizer=pipe.tokenizer).task == "text-classification"
