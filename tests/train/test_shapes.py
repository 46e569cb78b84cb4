"""What the columns of a row mean, on three tokenizers: every shape, every column that any row may have, refusals."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bytewise import write_tokenizer

from llama2 import AutoTokenizer, InputError
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE
from llama2.train.data import IGNORED, Example, encode, encode_pair, prepare, prepare_pairs
from llama2.train.shapes import SHAPES, alpaca, messages_of, shape_of

# A template for tests that writes everything: tools, calls, any role, and a variable of the row's own.
TEMPLATE = (
    "{% if tools %}T:{{ tools | tojson }}{% endif %}{% if mode is defined %}M:{{ mode }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def byte_level(tmp_path: Path) -> Any:
    write_tokenizer(tmp_path, TEMPLATE)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.fixture(scope="module", params=["llama2", "bytes", "smollm2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "bytes":
        folder = tmp_path_factory.mktemp("bytes")
        write_tokenizer(folder)
        return AutoTokenizer.from_pretrained(folder)
    if request.param == "smollm2":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    made = AutoTokenizer.from_pretrained(request.getfixturevalue("tokenizer_model"))
    made.chat_template = LLAMA2_CHAT_TEMPLATE
    return made


@pytest.fixture
def tok(loaded: Any) -> Iterator[Any]:
    """A tokenizer whose template a test may change."""
    template = loaded.chat_template
    yield loaded
    loaded.chat_template = template


def learnt(example: Example, tok: Any) -> str:
    """The targets as text, without special tokens."""
    return str(tok.decode([t for t in example.labels if t != IGNORED], skip_special_tokens=True)).strip()


def seen(example: Example, tok: Any) -> str:
    return str(tok.decode(example.input_ids, skip_special_tokens=True))


USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
FACTS = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "2 + 2?", "completion": " 4"}, "2 + 2?", "4"),
        ({"prompt": "2 + 2?", "response": " 4"}, "2 + 2?", "4"),
        ({"instruction": "Add.", "input": "2 + 2", "output": "4"}, alpaca("Add.", "2 + 2"), "4"),
        (
            {"instruction": "Add.", "context": "2 + 2", "response": "4", "category": "sums"},
            alpaca("Add.", "2 + 2"),
            "4",
        ),
        ({"instruction": "Add.", "context": "", "response": "4"}, alpaca("Add."), "4"),
        ({"question": "2 + 2?", "answer": "4"}, alpaca("2 + 2?"), "4"),
        ({"question": "2 + 2?", "response": "4"}, alpaca("2 + 2?"), "4"),
        ({"query": "2 + 2?", "response": "4"}, alpaca("2 + 2?"), "4"),
        ({"input": "2 + 2?", "output": "4"}, alpaca("2 + 2?"), "4"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_texts_with_an_answer(tok: Any, row: dict[str, str], prompt: str, answer: str) -> None:
    example = encode(row, tok)
    assert seen(example, tok) == prompt + (" 4" if row.get("prompt") else "4") and learnt(example, tok) == answer
    assert example.labels[-1] == tok.eos_token_id


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"conversations": [USER, ANSWER]},
        {"conversation": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [{"from": "user", "value": "2 + 2?"}, {"from": "chatgpt", "value": "4"}]},
        {"messages": json.dumps([USER, ANSWER])},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "2 + 2?", "completion": [ANSWER]},
        {"prompt": [USER], "completion": "4"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]},
    ],
)  # fmt: skip
def test_chats(tok: Any, row: dict[str, Any]) -> None:
    example = encode(row, tok)
    assert example.input_ids == tok.apply_chat_template([USER, ANSWER])
    assert learnt(example, tok) == "4" and example.labels[0] == IGNORED


def test_a_completion_of_messages_alone_is_learnt(tok: Any) -> None:
    row = {"prompt": [USER, ANSWER, {"role": "user", "content": "Sure?"}], "completion": [{**ANSWER, "content": "Yes"}]}
    assert learnt(encode(row, tok), tok) == "Yes"


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "instruction": "2 + 2?", "output": "4"},
        {"system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"},
        {"system": "Be brief.", "prompt": "2 + 2?", "completion": "4"},
        {"system": "Be brief.", "messages": [USER, ANSWER]},
        {"system": "Be brief.", "messages": [FACTS, USER, ANSWER]},
        {"messages": [FACTS, USER, ANSWER], "system": None, "tools": None},
    ],
)
def test_a_system_column_makes_a_chat(tok: Any, row: dict[str, Any]) -> None:
    assert encode(row, tok).input_ids == tok.apply_chat_template([FACTS, USER, ANSWER])


def test_an_empty_system_column_makes_a_chat_without_one(tok: Any) -> None:
    """All rows of a data set are written alike, also those without a system prompt."""
    row = {"system": "", "history": [], "instruction": "2 + 2?", "input": "", "output": "4"}
    assert encode(row, tok).input_ids == tok.apply_chat_template([USER, ANSWER])
    tok.chat_template = None
    assert encode(row, tok) == encode({"instruction": "2 + 2?", "output": "4"}, tok)
    with pytest.raises(Exception, match="no chat template"):
        encode({**row, "system": "Be brief."}, tok)


def test_history_goes_before(tok: Any) -> None:
    """LLaMA-Factory's column: pairs of a question and its answer, which are learnt as well."""
    row = {"instruction": "Sure?", "output": "Yes", "history": [["2 + 2?", "4"]]}
    chat = [USER, ANSWER, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
    for history in ([["2 + 2?", "4"]], [USER, ANSWER], json.dumps([["2 + 2?", "4"]])):
        example = encode({**row, "history": history}, tok)
        assert example.input_ids == tok.apply_chat_template(chat)
        assert learnt(example, tok).replace(" ", "") == "4Yes"


# -- tools -------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def test_tools_and_calls_are_written(byte_level: Any) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    chat = [USER, called, {"role": "tool", "content": "4"}, ANSWER]
    for tools in ([TOOL], json.dumps([TOOL])):
        example = encode({"messages": chat, "tools": tools}, byte_level)
        text = byte_level.decode(example.input_ids)
        assert text.startswith("T:[{") and '"arguments": {"a": 2}' in text and "None" not in text
        assert text.endswith("<|tool|>4<|end|><|assistant|>4<|end|>")
        assert learnt(example, byte_level).startswith('[{"type"') and learnt(example, byte_level).endswith("}]4")


def test_speakers_of_sharegpt(byte_level: Any) -> None:
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "function_call", "value": '{"name": "add"}'},
             {"from": "observation", "value": "4"}, {"from": "gpt", "value": "It is 4"}]  # fmt: skip
    assert [(m["role"], m["content"]) for m in messages_of(turns)] == [
        ("user", "2 + 2?"), ("assistant", ""), ("tool", "4"), ("assistant", "It is 4")
    ]  # fmt: skip
    assert '"name": "add"' in byte_level.decode(encode({"conversations": turns}, byte_level).input_ids)


def test_variables_of_the_template(byte_level: Any) -> None:
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": {"mode": "brief"}}
    assert byte_level.decode(encode(row, byte_level).input_ids).startswith("M:brief")


def test_what_a_template_would_leave_out_is_refused(tokenizer_model: Path) -> None:
    llama = AutoTokenizer.from_pretrained(tokenizer_model)
    llama.chat_template = LLAMA2_CHAT_TEMPLATE
    with pytest.raises(InputError, match="tools, and the chat template writes none"):
        encode({"messages": [USER, ANSWER], "tools": [TOOL]}, llama)
    with pytest.raises(InputError, match="tool_calls, and the chat template writes none"):
        encode({"messages": [USER, {**ANSWER, "tool_calls": [CALL]}]}, llama)


# -- what is learnt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"training": False}, {"weight": 0.0}])
def test_messages_that_are_not_learnt(tok: Any, switch: dict[str, Any]) -> None:
    chat = [USER, {**ANSWER, **switch}, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
    example = encode({"messages": chat}, tok)
    plain = [{k: v for k, v in message.items() if k not in switch} for message in chat]
    assert learnt(example, tok) == "Yes" and example.input_ids == tok.apply_chat_template(plain)
    assert (
        learnt(encode({"messages": [*chat[:1], {**ANSWER, "weight": 1}, *chat[2:]]}, tok), tok).replace(" ", "")
        == "4Yes"
    )


def test_columns_that_cannot_be_obeyed_are_refused_by_name(tok: Any) -> None:
    row = {"prompt": "a", "completion": " b"}
    rows: list[dict[str, Any]] = [
        {**row, "weight": 0.5}, {**row, "train": False}, {**row, "weight": "0"}, {**row, "label": False},
        {**row, "label": True}, {**row, "label": 0}, {**row, "label": "False"},
        {"messages": [USER, ANSWER], "label": True}, {**row, "images": ["a.png"]}, {"text": "a", "system": "b"},
        {"messages": [USER, {**ANSWER, "weight": 2}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
    ]  # fmt: skip
    examples, report = prepare([*rows, row], tok, None)
    assert len(examples) == 1 and sorted(report.problems) == list(range(len(rows)))
    wanted = ["weight is 0.5", "train is False", "weight is '0'", *["good (KTO)"] * 5, "it has images", "it has system",
              "weight of message 1 is 2", "type 'image'"]  # fmt: skip
    assert all(words in report.problems[i] for i, words in enumerate(wanted)), report.problems
    kept = prepare([{**row, "weight": 1, "train": True}, {**row, "label": "sums"}], tok, None)
    assert len(kept[0]) == 2 and kept[1].unused == {"label": 1}


def test_columns_without_a_meaning_are_named(byte_level: Any) -> None:
    rows = [
        {"messages": [USER, {**ANSWER, "name": "Bo"}], "id": 1, "score": None},
        {"messages": [USER, ANSWER], "id": 2},
    ]
    report = prepare(rows, byte_level, None)[1]
    assert report.unused == {"id": 2, "name of messages": 1}
    assert "columns that are not used: id (2 rows), name of messages (1 rows)" in report.text()
    pairs = [{"prompt": "a", "chosen": " b", "rejected": " c", "score_chosen": 1.0}]
    assert prepare_pairs(pairs, byte_level, None)[1].unused == {"score_chosen": 1}


# -- ends and beginnings -----------------------------------------------------------------------------------------


def test_one_end_and_one_beginning(tok: Any) -> None:
    end, bos = tok.eos_token_id, tok.bos_token_id
    for row in ({"text": "hi" + tok.eos_token}, {"prompt": "hi", "completion": " ho" + tok.eos_token}):
        assert encode(row, tok).input_ids.count(end) == 1 and encode(row, tok).input_ids[-1] == end
    if bos is None:
        return
    text = {"text": f"{tok.bos_token}{tok.bos_token}hi"}
    pair = {"prompt": f"{tok.bos_token}{tok.bos_token}a", "chosen": " b", "rejected": " c"}
    examples, report = prepare([text, {"text": "hi"}], tok, None)
    assert [e.input_ids.count(bos) for e in examples] == [1, int(tok("hi")["input_ids"][0] == bos)]
    assert all(len(e.input_ids) == len(e.labels) for e in examples) and not report.problems
    assert "begins with a BOS token of its own: one is kept: rows 0" in report.text()
    assert [e.input_ids.count(bos) for e in prepare_pairs([pair], tok, None)[0][0]] == [1, 1]


def test_a_text_in_llama_2s_format_has_one_beginning(tokenizer_model: Path) -> None:
    llama = AutoTokenizer.from_pretrained(tokenizer_model)
    (example,), report = prepare([{"text": "<s>[INST] Hi [/INST] Ho </s>"}], llama, None)
    assert example.input_ids[:2] != [1, 1] and example.input_ids[0] == 1 and example.input_ids.count(2) == 1
    assert report.notes


# -- preferences -------------------------------------------------------------------------------------------------

GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "prompt": [{"from": "human", "value": "2 + 2?"}],
            "chosen": [{"from": "gpt", "value": "4"}],
            "rejected": [BAD],
        },
        {"question": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"question": "2 + 2?", "chosen": "4", "rejected": "5", "system": ""},
    ],
)  # fmt: skip
def test_the_prompt_of_preferences_is_there_once(tok: Any, row: dict[str, Any]) -> None:
    """TRL takes what both conversations begin with for the prompt where the prompt is a text (maybe_extract_prompt)."""
    pairs, report = prepare_pairs([row], tok, None)
    assert not report.remarks() and len(pairs) == 1
    assert [e.input_ids for e in pairs[0]] == [tok.apply_chat_template([USER, answer]) for answer in (GOOD, BAD)]
    assert [learnt(e, tok) for e in pairs[0]] == ["4", "5"]


def test_columns_of_preferences(tok: Any) -> None:
    pair = encode_pair({"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "5"}, tok)
    assert pair.chosen.input_ids == tok.apply_chat_template([FACTS, USER, GOOD]) and learnt(pair.rejected, tok) == "5"
    asked = encode_pair({"question": "2 + 2?", "chosen": "4", "rejected": "5"}, tok)
    assert seen(asked.chosen, tok) == alpaca("2 + 2?") + "4" and learnt(asked.chosen, tok) == "4"
    told = encode_pair({"prompt": "Sure?", "chosen": "Yes", "rejected": "No", "history": [["2 + 2?", "4"]]}, tok)
    assert "2 + 2?" in seen(told.chosen, tok) and learnt(told.chosen, tok) == "Yes"  # the history is no answer here


def test_several_turns_may_differ(tok: Any) -> None:
    """All messages behind the common ones are the answer; of them the assistant's are targets."""
    more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
    pair = encode_pair({"chosen": [USER, GOOD, *more], "rejected": [USER, BAD, *more]}, tok)
    assert [learnt(e, tok).replace(" ", "") for e in pair] == ["4Yes", "5Yes"]
    later = encode_pair({"chosen": [USER, GOOD, *more], "rejected": [USER, GOOD, more[0], BAD]}, tok)
    assert [learnt(e, tok) for e in later] == ["Yes", "5"]


def test_prompts_that_do_not_fit(tok: Any) -> None:
    other, text = {"role": "user", "content": "3 + 3?"}, "Human: 2 + 2 is?\nAI:"
    rows = [{"chosen": [USER, GOOD], "rejected": [other, BAD]},
            {"prompt": "9 + 9?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": text, "chosen": text + " 4", "rejected": text + " 5"}]  # fmt: skip
    pairs, report = prepare_pairs(rows, tok, None)
    assert len(pairs) == 2 and "no common prompt" in report.problems[0]
    assert [row for _, rows in sorted(report.notes.items()) for row in rows] == [2, 1]
    assert "prompt is not used" in report.text() and "begin with the prompt" in report.text()


# -- the table ---------------------------------------------------------------------------------------------------


def test_the_task_chooses_among_shapes() -> None:
    """ultrafeedback_binarized has messages beside its preferences."""
    row = {"prompt": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}
    assert shape_of(row).kind == "preference" and shape_of(row, {"messages", "text"}).kind == "messages"
    with pytest.raises(InputError, match="is a preference row, which is for another task"):
        shape_of({"chosen": "a", "rejected": "b"}, {"text"})
    assert shape_of({"messages": None, "text": "a"}).kind == "text"


def test_kinds_are_different_and_known() -> None:
    assert len({shape.kind for shape in SHAPES}) == len({shape.needs for shape in SHAPES}) == len(SHAPES)
