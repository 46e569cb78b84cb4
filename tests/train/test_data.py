"""Rows to ids and targets on a real tokenizer; what is wrong with a row is told by its number."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama2 import AutoTokenizer, InputError
from llama2.errors import MissingDependencyError
from llama2.train.data import IGNORED, Example, encode, encode_pair, prepare, prepare_pairs, read


@pytest.fixture(scope="module")
def tok(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def target_text(example: Example, tok: Any) -> str:
    return str(tok.decode([label for label in example.labels if label != IGNORED]))


CHAT = [
    {"role": "user", "content": "Say hi"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Again"},
    {"role": "assistant", "content": "Hi again."},
]


def test_answers_are_the_targets_of_a_chat(tok: Any) -> None:
    example = encode({"messages": CHAT}, tok)
    assert example.input_ids == tok.apply_chat_template(CHAT)
    assert target_text(example, tok).replace("\n", "") == "Hi!<|im_end|>Hi again.<|im_end|>"
    turns = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in CHAT]
    assert encode({"conversations": turns}, tok) == example


def test_the_completion_is_the_target(tok: Any) -> None:
    example = encode({"prompt": "The sky is", "completion": " blue."}, tok)
    assert tok.decode(example.input_ids) == "The sky is blue." + tok.eos_token
    assert target_text(example, tok) == " blue." + tok.eos_token
    alone = encode({"prompt": "", "completion": "Blue."}, tok)
    assert alone.labels == alone.input_ids


def test_a_token_across_the_border_is_a_target(tok: Any) -> None:
    example = encode({"prompt": "The wor", "completion": "ld"}, tok)
    assert target_text(example, tok) == " world" + tok.eos_token


def test_instructions(tok: Any) -> None:
    example = encode({"instruction": "Add.", "input": "1 and 2", "output": "3"}, tok)
    text = tok.decode(example.input_ids)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3" in text and "paired with" in text
    assert target_text(example, tok) == "3" + tok.eos_token
    assert "Input" not in tok.decode(encode({"instruction": "Add.", "input": "", "output": "3"}, tok).input_ids)


def test_text_is_all_target(tok: Any) -> None:
    example = encode({"text": "Once upon a time"}, tok)
    assert example.labels == example.input_ids and example.input_ids[-1] == tok.eos_token_id


@pytest.mark.parametrize("prompt", ["Say hi", [{"role": "user", "content": "Say hi"}]], ids=["text", "messages"])
def test_preferences(tok: Any, prompt: Any) -> None:
    answers = (" Hi!", " No.") if isinstance(prompt, str) else ([CHAT[1]], [{"role": "assistant", "content": "No."}])
    pair = encode_pair({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}, tok)
    assert [target_text(e, tok).strip().split("<|")[0].strip() for e in pair] == ["Hi!", "No."]


def test_only_the_answer_that_differs_counts(tok: Any) -> None:
    pair = encode_pair(
        {"prompt": CHAT[:3], "chosen": CHAT[3:], "rejected": [{"role": "assistant", "content": "x"}]}, tok
    )
    assert target_text(pair.chosen, tok).strip() == "Hi again.<|im_end|>"


# -- reports -----------------------------------------------------------------------------------------------------


def test_the_report_names_the_rows(tok: Any) -> None:
    long = {"prompt": "a", "completion": " b" * 50}
    rows: list[dict[str, Any]] = [
        {"text": "fine"},
        {"prompt": "a " * 50, "completion": "never reached"},
        long,
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"question": "?"},
        {"prompt": 5, "completion": "x"},
        {"messages": "text"},
        {"text": tok.bos_token + tok.bos_token + "twice"},
    ]
    examples, report = prepare(rows, tok, 20)
    assert [len(e.input_ids) for e in examples] == [len(encode(rows[0], tok).input_ids), 20]
    assert report.truncated == [1, 2] and report.rows == 8
    assert set(report.problems) == {1, 3, 4, 5, 6, 7}
    wanted = {1: "no target is left", 3: "no target", 4: "keys ['question']", 5: "prompt is a int", 6: "not a list"}
    for row, words in {**wanted, 7: "two BOS"}.items():
        assert words in report.problems[row]
    assert report.targets == sum(label != IGNORED for e in examples for label in e.labels)
    assert "rows 1, 2" in report.text() and "two BOS" in report.text()


def test_pairs_that_are_the_same_are_left_out(tok: Any) -> None:
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "a", "chosen": " b", "rejected": " b"}]
    pairs, report = prepare_pairs(rows, tok, None)
    assert len(pairs) == 1 and report.problems == {1: "both answers are the same"}


# -- files -------------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two, and\nthree"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "c.csv").write_text('text\none\n"two, and\nthree"\n')
    (tmp_path / "d.txt").write_text("one\n\n\ntwo, and\nthree\n")
    assert all(read(tmp_path / name) == rows for name in ("a.jsonl", "b.json", "c.csv", "d.txt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is a JSON list"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.json", '{"a": 1}', "no list of objects"),
        ("a.json", '{"text": 1}\n{"text": 2}', "JSON lines"),
        ("a.xml", "", r"no \.jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_a_missing_file_is_no_hub_id() -> None:
    with pytest.raises(InputError, match="does not exist"):
        read("rows.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        read("a/b/c")


def test_hub_ids_need_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"llama2\[train\]"):
        read("owner/name")
