"""`llama2 evaluate --arena A B prompts.jsonl --judge WHO`: two models' answers, compared."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2.cli import variants
from llama2.cli.conversation import render
from llama2.cli.loading import RunOptions, load
from llama2.cli.progress import Waiting
from llama2.errors import InputError

if TYPE_CHECKING:
    from llama2.cli.evaluate import EvaluateOptions


def run(options: "EvaluateOptions") -> Any:
    """The report of a comparison."""
    from llama2.evaluate import arena
    from llama2.evaluate.report import EvaluationReport

    if options.ratings is not None:
        if options.judge is not None:
            raise InputError("--judge and --ratings each decide; give one of them")
        outcomes = arena.read_ratings(_lines(options.ratings))
        names = [Path(word.split(",")[0]).name for word in options.models[:2]] or ["first", "second"]
        names += ["second"][: 2 - len(names)]
        return EvaluationReport("arena", arena.rows(names[0], names[1], outcomes), {"ratings": options.ratings})
    if len(options.models) != 3:
        raise InputError(f"--arena takes A B prompts.jsonl, but {len(options.models)} words were given")
    if options.judge is None:
        raise InputError("--arena needs a judge; add --judge MODEL, --judge URL or --judge python:module:function")
    prompts = [_messages(line, i) for i, line in enumerate(_lines(options.models[2]))]
    if options.limit is not None:
        prompts = prompts[: max(int(options.limit), 1)]
    pair = [variants.read(word, None) for word in options.models[:2]]
    judge = _judge(options)
    names = [",".join(part for part in (Path(v.path).name, v.label) if part) for v in pair]
    if names[0] == names[1]:
        names = [f"{names[0]} (A)", f"{names[1]} (B)"]
    answers = [_answers(variants.applied(options, v), prompts, options.max_new_tokens) for v in pair]
    if isinstance(judge, str):
        judge = _model_judge(options, judge)
    outcomes = []
    with Waiting("judging") as waiting:
        for messages, first, second in zip(prompts, *answers, strict=True):
            outcomes.append(arena.judge_pair(judge, _question(messages), first, second))
            waiting.say(f"{len(outcomes)} of {len(prompts)}")
    if options.output is not None:
        _keep(Path(options.output), prompts, answers, outcomes)
    settings = {"judge": options.judge, "prompts": options.models[2], "max_new_tokens": options.max_new_tokens}
    return EvaluationReport("arena", arena.rows(names[0], names[1], outcomes), settings, {n: {} for n in names})


def _lines(path: str) -> list[Any]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path} is not JSON lines in UTF-8: {error}") from error
    if not found:
        raise InputError(f"{path} holds no lines")
    return found


def _messages(line: Any, number: int) -> list[dict[str, str]]:
    if isinstance(line, str):
        return [{"role": "user", "content": line}]
    if isinstance(line, dict) and isinstance(line.get("messages"), list) and line["messages"]:
        return list(line["messages"])
    prompt = line.get("prompt") if isinstance(line, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f'line {number + 1} of the prompts has neither "prompt" nor "messages"')
    return [{"role": "user", "content": prompt}]


def _question(messages: list[dict[str, str]]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _judge(options: "EvaluateOptions") -> Any:
    """The judge, or the path of a model that is loaded when the answers are there."""
    from llama2.cli.loading import local_model
    from llama2.evaluate import arena

    name = str(options.judge)
    if name.startswith("python:"):
        return arena.python_judge(name.removeprefix("python:"))
    if name.startswith(("http://", "https://")):
        return arena.url_judge(name, key=os.environ.get("OPENAI_API_KEY"))
    return local_model(name)


def _answers(options: RunOptions, prompts: list[list[dict[str, str]]], most: int) -> list[str]:
    """A model's answers, all at once."""
    from llama2.engine.engine import Engine

    model: Any
    model, tokenizer = load(options)
    asked = [render(tokenizer, messages) for messages in prompts]
    with Engine(
        model, tokenizer, runner=options.runner, kv_cache=options.cache_dtype, precision=options.precision,
        waiting=len(prompts) + 64,
    ) as engine:  # fmt: skip
        found = engine.generate(asked, max_new_tokens=most, do_sample=False)
    return [result.text.strip() for result in found]


def _model_judge(options: "EvaluateOptions", path: str) -> Any:
    """A judge that a model is, asked with greedy decoding."""
    from dataclasses import replace

    from llama2.engine.engine import Engine
    from llama2.evaluate import arena

    model: Any
    model, tokenizer = load(replace(options, model=path, adapter=None))
    engine = Engine(model, tokenizer, runner=options.runner, precision=options.precision)

    def judge(prompt: str, first: str, second: str) -> str:
        text = arena.INSTRUCTION.format(prompt=prompt, first=first, second=second)
        ids = render(tokenizer, [{"role": "user", "content": text}])
        (found,) = engine.generate([ids], max_new_tokens=256, do_sample=False)
        return found.text

    return judge


def _keep(folder: Path, prompts: Any, answers: Any, outcomes: Any) -> None:
    from llama2.files import write_bytes

    lines = [
        json.dumps({"messages": p, "first": a, "second": b, **o._asdict()}, ensure_ascii=False)
        for p, a, b, o in zip(prompts, *answers, outcomes, strict=True)
    ]
    write_bytes(folder / "arena.jsonl", ("\n".join(lines) + "\n").encode())
