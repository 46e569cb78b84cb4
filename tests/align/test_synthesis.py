"""Ghost Attention and context distillation: rows that sft takes, what is learnt of them, resuming, what is refused."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from align.policies import write_policy

from llama2 import AutoTokenizer, InputError
from llama2.align.distil import Distillation, DistilPlan
from llama2.align.ghost import Ghost, GhostPlan, fitted, ids
from llama2.align.instructions import POOL, checker_of, drawn, pool_of
from llama2.align.synthesis import REPORT, ROWS, SAMPLES
from llama2.cli import main
from llama2.train.data import IGNORED, prepare

REWARDS = """
def safety(prompts, completions, **_):
    return [len(one[0]["content"]) / 10 for one in completions]

def none(completions, **_):
    return [0.0] * len(completions)

def broken(completions, **_):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model whose answers are short noise, dialogues and prompts."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    write_policy(folder / "policy", eos_token_id=[0, *range(100, 160)], max_position_embeddings=512)
    talks = [{"messages": [{"role": "user", "content": f"talk {i} turn {t}"} if t % 2 == 0 else
                           {"role": "assistant", "content": "old"} for t in range(5)]} for i in range(11)]  # fmt: skip
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    risky = [{"prompt": f"how to {i}", "category": "illegal" if i % 2 else None} for i in range(10)]
    (folder / "risky.jsonl").write_text("".join(json.dumps(row) + "\n" for row in risky))
    (folder / "rewards_of_synthesis.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def importable(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(made))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ghost_of(made: Path, out: Path, **changes: Any) -> GhostPlan:
    settings: dict[str, Any] = {"count": 2, "max_new_tokens": 8, "turns": 3, "dtype": "float32", "temperature": 1.0}
    settings["instructions"] = str(made / "told.jsonl")
    (made / "told.jsonl").write_text(json.dumps({"text": "Be yourself.", "short": "Self"}) + "\n")
    return GhostPlan(policy=str(made / "policy"), prompts=str(made / "talks.jsonl"), output_dir=str(out),
                     **{**settings, **changes})  # fmt: skip


# -- instructions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ("lower", "all small.", "All small."),
        ("upper", "HI 2!", "Hi"),
        ("sentence", "One of them.", "One. Two."),
        ("starts:Ahoy", "  ahoy there", "there, ahoy"),
        ("ends:over", 'That is it, over."', "over and out"),
        ("contains:sea", "By the SEA", "ashore"),
        ("language:fr", "Le chat est dans la maison.", "The cat is in the house."),
        ("language:de", "Die Katze ist nicht mit der Maus.", "Il gatto e la casa sono del re."),
    ],
)
def test_programs_that_check(check: str, right: str, wrong: str) -> None:
    assert checker_of(check)(right) and not checker_of(check)(wrong) and not checker_of(check)("")


def test_what_is_drawn() -> None:
    orders = [drawn(POOL, 2, f"1/{i}") for i in range(400)]
    assert all(len({part.category for part in order.parts}) == len(order.parts) <= 2 for order in orders)
    assert 0.4 < sum(order.shortened for order in orders) / 400 < 0.6 and orders[0] == drawn(POOL, 2, "1/0")
    assert {part.category for order in orders for part in order.parts} == {"hobby", "figure", "language", "form"}
    short = next(order for order in orders if order.shortened)
    assert short.text == "\n".join(part.short for part in short.parts)
    known = next(order for order in orders if not order.checks)
    assert known.obeyed("anything") is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [([], "there are no instructions"), ([{"short": "a"}], "instruction 0 has no text"),
     ([{"text": "a", "check": "loud"}], "check is 'loud'; it must be lower, upper")],
)  # fmt: skip
def test_instructions_that_are_none(rows: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        pool_of(rows)


# -- Ghost Attention ---------------------------------------------------------------------------------------------


def test_the_instruction_is_learnt_from_the_first_turn_alone(made: Path, tmp_path: Path) -> None:
    outcome = Ghost(ghost_of(made, tmp_path)).run()
    rows, samples = lines(tmp_path / ROWS), lines(tmp_path / SAMPLES)[1:]
    assert outcome.rows == len(rows) and len(samples) == 11
    assert json.loads((tmp_path / REPORT).read_text())["dialogues"] == 11
    tokenizer = AutoTokenizer.from_pretrained(made / "policy")
    examples, report = prepare(rows, tokenizer, None)
    assert not report.problems and len(examples) == len(rows)
    for row, example in zip(rows, examples, strict=True):
        messages = row["messages"]
        assert [one["role"] for one in messages] == ["user", "assistant"] * 3
        assert messages[0]["content"].startswith(row["instruction"] + "\n\n")
        assert all(row["instruction"] not in one["content"] for one in messages[1:])
        learnt = [token for token in example.labels if token != IGNORED]
        assert tokenizer.decode(learnt) == messages[-1]["content"] + "<|end|>"


def test_answers_are_sampled_with_the_instruction_on_every_turn(made: Path, tmp_path: Path) -> None:
    job = Ghost(ghost_of(made, tmp_path, plain=1.0))
    talk = job.talk(0)
    talk.answers = ["a", "b"]
    said = talk.order.text + "\n\n"
    assert [one["content"].startswith(said) for one in talk.messages(True)] == [True, False, True, False, True]
    assert [one["content"].startswith(said) for one in talk.messages(False)] == [True, False, False, False, False]
    assert not any(one["content"].startswith(said) for one in talk.messages(True, silent=True))
    plain = Ghost(ghost_of(made, tmp_path / "a", plain=1.0)).run()
    obeys = Ghost(ghost_of(made, tmp_path / "b")).run()
    assert plain.rows and obeys.rows
    first = [lines(tmp_path / name / SAMPLES)[1]["answers"][0] for name in "ab"]
    assert first[0] != first[1] and lines(tmp_path / "a" / SAMPLES)[1]["plain"]


def test_answers_that_disobey_are_left_out(made: Path, tmp_path: Path) -> None:
    plan = ghost_of(made, tmp_path, count=1)
    (made / "told.jsonl").write_text(json.dumps({"text": "Be small.", "check": "starts:zebra"}) + "\n")
    with pytest.raises(InputError, match="no row is left to tune on. 0 rows of 11 dialogues"):
        Ghost(plan).run()


def test_answers_that_do_not_end_are_left_out(made: Path, tmp_path: Path) -> None:
    outcome = Ghost(ghost_of(made, tmp_path, max_new_tokens=3)).run()
    ended = [line["number"] for line in lines(tmp_path / SAMPLES)[1:] if line["ended"] and all(line["answers"])]
    assert [row["lineage"]["number"] for row in lines(tmp_path / ROWS)] == ended and 0 < outcome.values["endless"] < 11


def test_a_run_that_was_killed_ends_with_the_same_bytes(made: Path, tmp_path: Path) -> None:
    Ghost(ghost_of(made, tmp_path / "a")).run()
    whole = (tmp_path / "a" / SAMPLES).read_bytes()
    (tmp_path / "b").mkdir()
    cut = whole[: whole.index(b"\n", len(whole) // 2) - 7]  # within a line
    (tmp_path / "b" / SAMPLES).write_bytes(cut)
    with pytest.raises(InputError, match="holds samples.jsonl of an earlier run; go on with --resume"):
        Ghost(ghost_of(made, tmp_path / "b"))
    Ghost(ghost_of(made, tmp_path / "b"), resume=True).run()
    for name in (SAMPLES, ROWS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(InputError, match="is of another run: it differs in seed"):
        Ghost(ghost_of(made, tmp_path / "b", seed=7), resume=True).run()


def test_middle_turns_go_first(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "policy")
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i}" * 9} for i in range(8)]
    whole = len(ids(messages, tokenizer))
    assert fitted(messages, tokenizer, whole) == messages
    assert fitted(messages, tokenizer, whole - 1) == messages[:2] + messages[4:]
    last = messages[:2] + messages[6:]
    assert fitted(messages, tokenizer, len(ids(last, tokenizer))) == last
    with pytest.raises(InputError, match="the first and the last turn of a dialogue have"):
        fitted(messages, tokenizer, len(ids(last, tokenizer)) - 1)
    asked = messages[:7]
    assert fitted(asked, tokenizer, len(ids(messages[:2] + messages[6:7], tokenizer))) == messages[:2] + messages[6:7]


def test_to_measure_the_instruction_is_said_once(made: Path, tmp_path: Path) -> None:
    """The prompts hold it on their first turn alone, whatever was answered; all dialogues are told, by turn."""
    told = tmp_path / "told.jsonl"
    orders = ({"text": "Be yourself."}, {"text": "Say zz.", "check": "contains:zz"})
    told.write_text("".join(json.dumps(row) + "\n" for row in orders))
    plan = ghost_of(made, tmp_path / "out", measure=True, count=1, combine=1, instructions=str(told))
    seen: list[str] = []

    class Watched(Ghost):
        def made(self, sampler: Any, numbers: Any) -> Any:
            def heard(asked: Any, seeds: Any) -> Any:
                seen.extend(self.tokenizer.decode(ids) for _, ids in asked)
                return sampler(asked, seeds)

            return super().made(cast(Any, heard), numbers)

    outcome = Watched(plan).run()
    assert outcome.values["obeyed"] == {1: 0.0, 2: 0.0, 3: 0.0} and outcome.values["dialogues"] == outcome.rows == 11
    assert len(seen) == 33 and all(text.count("Say zz.") == 1 for text in seen)
    assert any("turn 4" in text for text in seen) and not any("Be yourself" in text for text in seen)
    with pytest.raises(InputError, match="k is 2, and to measure one answer"):
        ghost_of(made, tmp_path / "k", measure=True)
    with pytest.raises(InputError, match="no instruction has a check"):
        Ghost(ghost_of(made, tmp_path / "b", measure=True, count=1))


# -- distillation ------------------------------------------------------------------------------------------------


def distil_of(made: Path, out: Path, reward: str = "safety", **changes: Any) -> DistilPlan:
    settings: dict[str, Any] = {"max_new_tokens": 8, "dtype": "float32", "temperature": 1.0, "count": 3, **changes}
    return DistilPlan(policy=str(made / "policy"), prompts=str(made / "risky.jsonl"), output_dir=str(out),
                      safety=f"rewards_of_synthesis:{reward}", **settings)  # fmt: skip


def test_safer_answers_are_learnt_without_the_preprompt(made: Path, tmp_path: Path) -> None:
    outcome = Distillation(distil_of(made, tmp_path)).run()
    rows, samples = lines(tmp_path / ROWS), lines(tmp_path / SAMPLES)[1:]
    assert outcome.rows == len(rows) > 0 and len(samples) == 10
    better = [line for line in samples if line["after"]["safety"] > line["before"]["safety"] and line["ended"]]
    assert [row["lineage"]["number"] for row in rows] == [line["number"] for line in better if line["answer"]]
    for row in rows:
        number = row["lineage"]["number"]
        assert row["messages"][0] == {"role": "user", "content": f"how to {number}"} and len(row["messages"]) == 2
        told = row["lineage"]["preprompt"]
        assert ("against the law" in told) == bool(number % 2) and told.startswith("You are a ")
    assert set(outcome.values["kept"]) == {"none", "illegal"}
    examples, report = prepare(rows, AutoTokenizer.from_pretrained(made / "policy"), None)
    assert len(examples) == len(rows) and not report.problems


def test_a_margin_keeps_fewer(made: Path, tmp_path: Path) -> None:
    every = Distillation(distil_of(made, tmp_path / "a")).run().rows
    with pytest.raises(InputError, match="no row is left to tune on"):
        Distillation(distil_of(made, tmp_path / "b", margin=9.0)).run()
    assert every > 0
    with pytest.raises(InputError, match="hardly any is kept"):
        Distillation(distil_of(made, tmp_path / "c", reward="none")).run()


def test_what_distillation_refuses(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="broken returned nan"):
        Distillation(distil_of(made, tmp_path / "a", reward="broken")).run()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "category": "rude"}) + "\n")
    plan = distil_of(made, tmp_path / "b")
    other = DistilPlan(**{**vars(plan), "prompts": str(tmp_path / "rows.jsonl")})
    with pytest.raises(InputError, match="row 0 has the category 'rude', for which there is no template"):
        Distillation(other)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a" * 490}) + "\n")
    with pytest.raises(InputError, match="tokens with its pre-prompt, and the context leaves 504"):
        Distillation(DistilPlan(**{**vars(plan), "prompts": str(tmp_path / "long.jsonl")}))


# -- the commands ------------------------------------------------------------------------------------------------


def test_the_commands(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, flags = str(made / "policy"), ["--max-new-tokens", "8", "--temperature", "1", "--dtype", "float32"]
    words = [
        "align",
        "ghost",
        policy,
        str(made / "talks.jsonl"),
        str(tmp_path / "g"),
        *flags,
        "--combine",
        "1",
        "-k",
        "2",
    ]
    ghost_of(made, tmp_path)
    assert main([*words, "--instructions", str(made / "told.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "rows of 11 dialogues" in said and f"llama2 finetune sft {policy} {tmp_path / 'g'}/rows.jsonl" in said
    words = ["align", "distil", policy, str(made / "risky.jsonl"), str(tmp_path / "d"), *flags, "-k", "3"]
    assert main(words) == 2 and "needs --safety-reward" in capsys.readouterr().err
    assert main([*words, "--safety-reward", "rewards_of_synthesis:safety", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] > 0
    tuned = ["finetune", "sft", policy, str(tmp_path / "g" / "rows.jsonl"), str(tmp_path / "out"), "--max-steps", "1"]
    assert main([*tuned, "--quiet"]) == 0
