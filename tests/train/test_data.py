"""Rows to ids and targets on a real tokenizer; what is wrong with a row is told by its number."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama2 import AutoTokenizer, InputError
from llama2.errors import MissingDependencyError
from llama2.train.data import (
    IGNORED,
    Example,
    encode,
    encode_pair,
    held_out,
    pieces,
    prepare,
    prepare_pairs,
    read,
    renamed,
)
from llama2.train.labels import MULTI, REGRESSION, SINGLE, Labels, prepare_labelled
from llama2.train.readers import taken


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
    once = encode({"text": tok.bos_token + "twice"}, tok)
    assert [len(e.input_ids) for e in examples] == [len(encode(rows[0], tok).input_ids), 20, len(once.input_ids)]
    assert report.truncated == [1, 2] and report.rows == 8
    assert set(report.problems) == {1, 3, 4, 5, 6}
    wanted = {1: "no target is left", 3: "no target", 4: "keys ['question']", 5: "prompt is a int", 6: "not a list"}
    for row, words in wanted.items():
        assert words in report.problems[row]
    assert report.targets == sum(label != IGNORED for e in examples for label in e.labels)
    assert "rows 1, 2" in report.text() and "BOS token of its own: one is kept: rows 7" in report.text()


def test_messages_that_a_template_would_misread(tok: Any) -> None:
    answer = {"role": "assistant", "content": "x"}
    rows = [{"messages": [{"role": "user", "content": None}, answer]}, {"messages": [1, answer]},
            {"messages": [{"content": "a"}, answer]}]  # fmt: skip
    assert prepare(rows, tok, None)[1].problems == {
        0: "message 0 has no content", 1: "message 0 has no role", 2: "message 0 has no role"
    }  # fmt: skip


def test_preferences_that_cannot_be(tok: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "chosen": 1, "rejected": 2},
        {"prompt": "a", "chosen": "x", "rejected": [{"role": "assistant", "content": "y"}]},
        {"chosen": "", "rejected": "x"},
        {"prompt": 5, "chosen": "a", "rejected": "b"},
        {"chosen": [], "rejected": []},
        {"prompt": "q", "chosen": [{"role": "assistant"}], "rejected": [{"role": "assistant"}]},
        {"prompt": 5, "chosen": [{"role": "assistant", "content": "y"}], "rejected": []},
    ]
    pairs, report = prepare_pairs(rows, tok, None)
    found = [report.problems.get(i, "") for i in range(len(rows))]
    wanted = ["int and int", "str and list", "no target", "prompt is a int", "not a list", "no content", "not a list"]
    assert all(words in said for words, said in zip(wanted, found, strict=True)), found
    assert not pairs and set(report.problems) == set(range(len(rows)))


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


def test_lists_of_a_json_file(tmp_path: Path) -> None:
    rows, others = [{"text": "one"}], [{"text": "two"}]
    cases: list[tuple[dict[str, Any], str, Any]] = [
        ({"train": rows, "test": others}, "train", rows), ({"test": others, "train": rows}, "test", others),
        ({"version": 1, "tags": ["a"], "data": rows}, "train", rows), ({"data": rows}, "train", rows),
    ]  # fmt: skip
    for content, split, wanted in cases:
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert read(tmp_path / "a.json", split) == wanted
    for content, split in (({"a": rows, "b": others}, "train"), ({"a": rows}, "test")):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"holds the lists {', '.join(content)} and none called {split}"):
            read(tmp_path / "a.json", split)


def test_long_fields_and_tabs(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text,label\n" + "x" * 200_000 + ",1\n")
    (tmp_path / "a.tsv").write_text("text\tlabel\none, two\t1\n")
    assert len(read(tmp_path / "a.csv")[0]["text"]) == 200_000 and csv.field_size_limit() == before
    assert read(tmp_path / "a.tsv") == [{"text": "one, two", "label": "1"}]


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    assert read(tmp_path) == [{"text": "one"}]
    (tmp_path / "test-0.csv").write_text("text\ntwo\n")
    assert read(tmp_path) == [{"text": "one"}] and read(tmp_path, "test") == [{"text": "two"}]
    with pytest.raises(InputError, match=r"with 2 files of rows \(test-0.csv, train.jsonl\), and none is dev"):
        read(tmp_path, "dev")
    with pytest.raises(InputError, match="has no splits, and the split is 'dev'"):
        read(tmp_path / "train.jsonl", "dev")


def test_configurations_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Found(list[dict[str, Any]]):
        features = None

    def load(*names: str, **settings: Any) -> Found:
        asked.append((names, settings))
        return Found([{"text": "one"}])

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load))
    read("owner/name", "test", "main", "data/2024")
    read("owner/name")
    assert asked == [(("owner/name", "main"), {"split": "test", "data_dir": "data/2024"}),
                     (("owner/name",), {"split": "train"})]  # fmt: skip
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(InputError, match="are for data sets of the hub"):
        read(tmp_path / "a.txt", config="main")


def test_streams_are_read_as_far_as_they_are_needed() -> None:
    endless = ({"text": str(i)} for i in itertools.count())
    assert [row["text"] for row in taken(endless, 3, "it")] == ["0", "1", "2"]
    with pytest.raises(InputError, match="it streams rows and has no length; say how many steps"):
        taken(endless, None, "it")

    class Items:  # a map-style data set of torch, which never raises IndexError
        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> int:
            return i

    assert taken(Items(), None, "it") == [0, 1] and taken([1, 2], 1, "it") == [1, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is a JSON list"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.json", '{"a": 1}', "no list of objects"),
        ("a.json", '{"text": 1}\n{"text": 2}', "JSON lines"),
        ("a.xml", "", r"no \.jsonl"),
        ("a.csv", "text,label\none,1\ntwo, and three,2\n", "line 3 has more or fewer than the 2 fields"),
        ("a.csv", "text,label\none\n", "line 2 has more or fewer"),
        ("a.csv", "text\n", "holds no rows"),
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


def test_hub_data_sets_bring_names_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(list[dict[str, Any]]):
        features = {"text": object(), "label": SimpleNamespace(int2str=["no", "yes"].__getitem__)}  # noqa: RUF012

    def load(name: str, split: str) -> Found:
        if split != "test":
            raise ValueError(f"Unknown split {split!r}")
        return Found([{"text": name, "label": 1}, {"text": "b", "label": None}])

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load))
    assert read("owner/name", "test") == [{"text": "owner/name", "label": "yes"}, {"text": "b", "label": None}]
    with pytest.raises(InputError, match="owner/name cannot be read: Unknown split 'train'"):
        read("owner/name")


def test_hub_ids_need_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"llama2\[train\]"):
        read("owner/name")


def test_texts_keep_other_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert read(tmp_path / "a.jsonl") == [{"text": "one\u2028two\x85three"}]
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "behind a byte order mark"}\r\n')
    assert read(tmp_path / "b.jsonl") == [{"text": "behind a byte order mark"}]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow (extra 'train')")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "one", "label": [1, 2]}, {"text": "two", "label": []}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows
    (tmp_path / "b.parquet").write_text("text")
    with pytest.raises(InputError, match="no parquet file"):
        read(tmp_path / "b.parquet")


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(MissingDependencyError, match=r"need the package pyarrow: pip install 'llama2\[train\]'"):
        read(tmp_path / "a.parquet")


def test_columns_under_other_names() -> None:
    rows = [{"review": "fine", "stars": 5}, {"review": "bad"}]
    found = renamed(rows, {"text": "review", "label": "stars"})
    assert found == [{"text": "fine", "label": 5}, {"text": "bad"}]
    swapped = renamed([{"prompt": "a", "chosen": "b"}], {"prompt": "chosen", "chosen": "prompt"})
    assert swapped == [{"prompt": "b", "chosen": "a"}]
    with pytest.raises(InputError, match="no column 'reviews'; there are review, stars; did you mean review"):
        renamed(rows, {"text": "reviews"})


def test_rows_held_out() -> None:
    rows = [{"text": str(i)} for i in range(20)]
    kept, out = held_out(rows, 0.25, 1)
    assert len(out) == 5 and sorted(map(str, [*kept, *out])) == sorted(map(str, rows))
    assert held_out(rows, 0.25, 1) == (kept, out) and held_out(rows, 0.25, 2)[1] != out
    for share in (0, 1, -1, 0.99):
        with pytest.raises(InputError, match="h[eo]ld"):
            held_out(rows[:2] if share == 0.99 else rows, share, 1)


def test_pieces_lose_nothing_but_single_tokens() -> None:
    examples = [Example(list(range(7)), list(range(7))), Example([1, 2], [1, 2])]
    assert [piece.input_ids for piece in pieces(examples, 3)] == [[0, 1, 2], [3, 4, 5], [1, 2]]


def test_answers_without_a_prompt_share_one(tok: Any) -> None:
    row = {"chosen": "The sky is blue today", "rejected": "The sky is black today"}
    pair = encode_pair(row, tok)
    assert pair == encode_pair({"prompt": "The sky is bl", "chosen": "ue today", "rejected": "ack today"}, tok)
    spaced = encode_pair({"chosen": "Sky: blue", "rejected": "Sky: red"}, tok)
    assert target_text(spaced.chosen, tok) == " blue" + tok.eos_token


# -- labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "names", "targets"),
    [
        (["b", "a", "b"], SINGLE, ("a", "b"), [1, 0, 1]),
        ([0, 2, 1], SINGLE, ("LABEL_0", "LABEL_1", "LABEL_2"), [0, 2, 1]),
        (["10", "9", "10"], SINGLE, ("9", "10"), [1, 0, 1]),
        ([True, False], SINGLE, ("false", "true"), [1, 0]),
        ([["x"], ["y", "x"], []], MULTI, ("x", "y"), [[1, 0], [1, 1], [0, 0]]),
        ([[0], [2, 1]], MULTI, ("LABEL_0", "LABEL_1", "LABEL_2"), [[1, 0, 0], [0, 1, 1]]),
        ([[0, 1, 1], [0, 0, 0]], MULTI, ("LABEL_0", "LABEL_1", "LABEL_2"), [[0, 1, 1], [0, 0, 0]]),
        ([0.5, 2], REGRESSION, (), [0.5, 2.0]),
        (["0.5", "-2"], REGRESSION, (), [0.5, -2.0]),
    ],
    ids=str,
)
def test_labels_are_found(values: list[Any], kind: str, names: tuple[str, ...], targets: list[Any]) -> None:
    labels = Labels.of([{"text": "t", "label": value} for value in values])
    assert (labels.kind, labels.names) == (kind, names)
    assert [labels.target(value) for value in values] == targets


def test_csv_of_several_labels() -> None:
    labels = Labels.of([{"label": "x, y"}, {"label": "z"}], MULTI)
    assert labels.names == ("x", "y", "z") and labels.target("z,x") == [1, 0, 1]


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ([], {}, "no row has a label"),
        (["a", "a"], {}, "all rows have the label 'a'"),
        ([-1, 3], {}, "labels from -1 to 3"),
        ([1, 2000000], {}, "regression"),
        (["a", "b"], {"kind": "two"}, "problem_type is 'two'"),
        (["a", "b"], {"names": ("a", "a")}, "not all different"),
    ],
)
def test_labels_that_make_no_sense(values: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Labels.of([{"label": value} for value in values], **settings)


def test_rows_whose_labels_are_wrong_are_named(tok: Any) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 5}, {"text": "c", "label": None}, {"text": 3, "label": 1},
            {"text": "d"}, {"text": "e " * 50, "label": "yes"}]  # fmt: skip
    made, report = prepare_labelled(rows, tok, 20, Labels(SINGLE, ("no", "yes")))
    assert [target for _, target in made] == [0, 1] and len(made[1][0]) == 20 and report.truncated == [5]
    assert set(report.problems) == {1, 2, 3, 4} and "the label 5 is none of 0 .. 1 (no, yes)" in report.problems[1]
    assert prepare_labelled([{"text": "a", "label": "x"}], tok, None, Labels(REGRESSION))[1].problems
