"""`llama2 evaluate`: files as tasks, local data, going on, long contexts, the arena, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

TASK = [
    {"question": "Which one?", "choices": ["this", "that"], "answer": "that"},
    {"question": "And now?", "choices": ["this", "that", "none"], "answer": "A"},
    {"question": "Again?", "choices": ["yes", "no"], "answer": 1},
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "which.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TASK))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def harness() -> None:
    pytest.importorskip("lm_eval", reason="needs `pip install llama2[evaluate]`")


def test_a_file_of_questions(
    run: Run, checkpoint: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness()
    words = ("evaluate", checkpoint, "--tasks", task, "--output", tmp_path / "out", "--num-fewshot", "1", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    rows = {row["test"]: row for row in json.loads(out)["rows"]}
    assert (
        rows["which: acc @ 1 shots"]["value"] in (0, 1 / 3, 2 / 3, 1)
        and rows["which: acc @ 1 shots"]["better"] == "higher"
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text())["command"] == "evaluate"
    assert len(list((tmp_path / "out").glob("samples_*.jsonl"))) == 1
    monkeypatch.setattr("llama2.evaluate.score_blocks.BlockRunner._score_block", lambda *_: pytest.fail("ran again"))
    assert json.loads(run(*words)[1])["rows"] == json.loads(out)["rows"]


def test_generated_answers_and_a_big_bench_file(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    harness()
    (tmp_path / "say.jsonl").write_text('{"question": "Say x.", "answer": "x"}\n')
    (tmp_path / "knows").mkdir()
    examples = [
        {"input": "a or b?", "target_scores": {"a": 0, "b": 1}},
        {"input": "c?", "target_scores": {"c": 1, "d": 0}},
    ]
    (tmp_path / "knows" / "task.json").write_text(json.dumps({"name": "knows", "examples": examples}))
    words = ("--tasks", tmp_path / "say.jsonl", "--tasks", tmp_path / "knows" / "task.json", "--json")
    code, out, err = run("evaluate", checkpoint, *words)
    assert code == 0, err
    assert {row["test"].split(":")[0] for row in json.loads(out)["rows"]} == {"say", "knows"}


def test_data_of_the_hub_on_this_machine(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    harness()
    folder = tmp_path / "data" / "allenai" / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    row = {"id": "1", "question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    code, out, err = run("evaluate", checkpoint, "--tasks", "arc_easy", "--data-dir", tmp_path / "data", "--json")
    assert code == 0, err
    assert [row["test"] for row in json.loads(out)["rows"]] == ["arc_easy: acc", "arc_easy: acc_norm"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "arc_esy"), "did you mean arc_easy"),
        (("--tasks", "arc_easy", "--data-dir", "nowhere"), "nowhere is no folder"),
        (("--tasks", "humaneval"), "confirm-unsafe-code"),
        (("--tasks", "BAD"), "line 1"),
        (("--tasks", "TASK", "--apply-chat-template"), "no chat template"),
        ((), "no task was given"),
        (("--tasks", "TASK", "--limit", "0"), "--limit"),
        (("--tasks", "TASK", "--batch-size", "many"), "auto or a number"),
        (("--tasks", "TASK", "--num-fewshot", "-1"), "0 or more"),
        (("kv-cache=int9", "--tasks", "TASK"), "int8"),
        (("rope=linear:2", "--tasks", "TASK"), "needle and position"),
        (("--tasks", "needle"), "--text"),
        (("--tasks", "needle", "--text", "LONG", "--lengths", "5000"), "longer --text"),
        (("rope=spiral:2", "--tasks", "position", "--text", "LONG", "--lengths", "32"), "TYPE:FACTOR"),
        (("--judge", "x", "--tasks", "TASK"), "belongs to --arena"),
        (("--arena", "--judge", "x"), "A B prompts"),
    ],
)
def test_wrong_inputs(
    run: Run, checkpoint: Path, task: Path, tmp_path: Path, words: tuple[str, ...], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    harness()
    if "--apply-chat-template" in words:
        monkeypatch.setattr("llama2.evaluate.harness.HarnessModel._tokenizer", lambda *_: NoTemplate())
    monkeypatch.setattr("llama2.evaluate.harness.open_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "bad.jsonl").write_text('{"question": "x", "choices": ["a", "b"], "answer": "c d"}\n')
    (tmp_path / "long.txt").write_text("A long text. " * 60)
    known = {"TASK": task, "BAD": tmp_path / "bad.jsonl", "LONG": tmp_path / "long.txt"}
    code, out, err = run("evaluate", checkpoint, *(known.get(word, word) for word in words))
    assert code == 2 and said in err and not out, err


class NoTemplate:
    chat_template = None
    bos_token_id, eos_token_id = None, 0


def test_long_contexts_with_pictures(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("A long text that is read from one end to the other. " * 20)
    words = ("--text", tmp_path / "long.txt", "--lengths", "48,64", "--output", tmp_path / "out", "--json")
    code, out, err = run("evaluate", checkpoint, "rope=linear:2", "kv-cache=int8", "--tasks", "position", *words)
    assert code == 0, err
    assert len({row["model"] for row in json.loads(out)["rows"]}) == 3
    assert (tmp_path / "out" / "position.svg").read_text().count("<polyline") == 6
    longer = (
        "rope=linear:4",
        "--tasks",
        "needle",
        "--text",
        tmp_path / "long.txt",
        "--lengths",
        "300",
        "--trials",
        "1",
    )
    code, out, err = run("evaluate", f"{checkpoint},rope=linear:4", *longer[1:], "--output", tmp_path / "out", "--json")
    assert code == 0, err
    assert len(list((tmp_path / "out").glob("needle-*.svg"))) == 1 and "needle found" in out


def test_arena(run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "Hello?"}\n{"messages": [{"role": "user", "content": "And?"}]}\n'
    )
    (tmp_path / "my_judge.py").write_text("def same(prompt, a, b):\n    return 'tie' if a == b else 'A'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = (checkpoint, f"{checkpoint},precision=exact", tmp_path / "prompts.jsonl", "--max-new-tokens", "6")
    code, out, err = run("evaluate", "--arena", *words, "--judge", "python:my_judge:same", "--json")
    assert code == 0, err
    rows = {row["test"]: row["value"] for row in json.loads(out)["rows"]}
    assert rows["ties"] == 2  # equal answers, or a judge that prefers the first place
    assert next(value for test, value in rows.items() if test.startswith("win rate")) == 50
    (tmp_path / "ratings.jsonl").write_text('{"rating": 7}\n{"rating": 2}\n6\n')
    out = run("evaluate", "--arena", "A", "B", "--ratings", tmp_path / "ratings.jsonl", "--json")[1]
    assert [row["value"] for row in json.loads(out)["rows"][1:4]] == [2, 1, 0]
