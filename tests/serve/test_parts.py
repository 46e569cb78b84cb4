"""The parts that need no socket: depth of JSON, constraints, calls in pieces, penalties, limits, logs, drains."""

import asyncio
import io
import json
import logging
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
pytest.importorskip("pydantic", reason="serving needs the extra `serve`")

from serve.stand_ins import like

from llama2.engine.engine import Engine
from llama2.errors import InputError
from llama2.serve import limits, logs
from llama2.serve.app import DIALECTS, dialect_at
from llama2.serve.chat import Message, Tool, chosen, prompt_ids
from llama2.serve.constraint import Compiler, Constraint, json_schema
from llama2.serve.dialect import Dialect
from llama2.serve.errors import KINDS, Refusal
from llama2.serve.lifecycle import Life
from llama2.serve.logits_processors import Bias, CountPenalty
from llama2.serve.metrics import Counter, Histogram
from llama2.serve.openai_completions import encode
from llama2.serve.validation import MAX_DEPTH, check_depth

# -- bodies ------------------------------------------------------------------------------------------------------


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (isinstance(value, dict | list)) + max(map(depth, inner), default=0)


JSON = st.recursive(
    st.text() | st.none(), lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(), s, max_size=2)
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(JSON, st.integers(0, 80))
def test_the_depth_of_json_counts_brackets_outside_strings(value: Any, more: int) -> None:
    for _ in range(more):
        value = ['"[{\\', value, "\\\\"]
    data = json.dumps(value, ensure_ascii=False).encode()
    if depth(value) > MAX_DEPTH:
        with pytest.raises(Refusal, match="nested"):
            check_depth(data)
    else:
        check_depth(data)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_reason_is_told_in_every_dialect(dialect: Dialect) -> None:
    for kind in KINDS:
        refusal = Refusal(kind, "why", "field")
        assert "why" in json.dumps(dialect.error(refusal, "id")) and 400 <= dialect.status(refusal) < 600
        assert dialect.refuse(refusal, "id").status_code == dialect.status(refusal)


def test_the_paths_of_dialects() -> None:
    paths = [(route.method, route.path) for dialect in DIALECTS for route in dialect.routes]
    assert len(paths) == len(set(paths)), "two dialects have the same route; one handler must decide by the body"
    for path, name in (("/generate", "tgi"), ("/v1/chat/completions", "openai chat"), ("/v1/no", "openai models")):
        assert dialect_at(path).name == name
    assert dialect_at("/no").name == "tgi"


# -- constraints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler(tiny_parts: tuple[Any, Any]) -> Compiler:
    return Compiler(tiny_parts[1], 260, [0])


def follow(compiler: Compiler, constraint: Constraint, seed: int, bytes_only: int = 400) -> bytes:
    """A random text that the constraint lets through."""
    processor, ids, rng = compiler(constraint, 2), [5, 6], torch.Generator().manual_seed(seed)
    while len(ids) < bytes_only:
        scores = processor(torch.tensor([ids]), torch.zeros(1, 260))
        allowed = (scores[0] > -torch.inf).nonzero()[:, 0]
        ids.append(int(allowed[torch.randint(len(allowed), (1,), generator=rng)]))
        if ids[-1] == 0:
            break
    return bytes(b for i in ids[2:] for b in compiler._tokenizer.decode_bytes([i])) if ids[-1] else b"".join(
        compiler._tokenizer.decode_bytes([i]) for i in ids[2:-1]
    )  # fmt: skip


def test_what_is_let_through_fits(compiler: Compiler) -> None:
    schema = {"type": "array", "items": {"enum": [1, "two", None]}, "minItems": 2, "maxItems": 3}
    for seed in range(20):
        found = json.loads(follow(compiler, json_schema(schema), seed))
        assert 2 <= len(found) <= 3 and all(item in (1, "two", None) for item in found)


def test_a_grammar_that_recurs(compiler: Compiler) -> None:
    grammar = Constraint("lark", 'start: "(" start ")" | "x"')
    for seed in range(5):
        text = follow(compiler, grammar, seed).decode()
        assert text == "(" * (len(text) // 2) + "x" + ")" * (len(text) // 2)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("regex", "(("), "regular expression cannot be used"),
        (Constraint("json", '{"type": "nothing"}'), "JSON schema cannot be used"),
        (Constraint("json", '{"uniqueItems": true, "type": "array"}', strict=True), "JSON schema cannot be used"),
        (Constraint("lark", "start: nothing"), "grammar cannot be used"),
        (Constraint("regex", "x" * 70_000), "65536 are the most"),
    ],
)
def test_constraints_that_cannot_be_used(compiler: Compiler, constraint: Constraint, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compiler(constraint, 1)


def test_requests_do_not_share_a_matcher(compiler: Compiler) -> None:
    constraint = Constraint("regex", "ab")
    first, second = compiler(constraint, 1), compiler(constraint, 1)
    a = int((first(torch.tensor([[9]]), torch.zeros(1, 260))[0] > -torch.inf).nonzero())
    first(torch.tensor([[9, a]]), torch.zeros(1, 260))
    assert int((second(torch.tensor([[9]]), torch.zeros(1, 260))[0] > -torch.inf).nonzero()) == a


# -- chat --------------------------------------------------------------------------------------------------------


def test_the_template_places_the_only_bos(tokenizer_model: Any) -> None:
    from llama2 import LlamaTokenizer
    from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE

    tokenizer = LlamaTokenizer(str(tokenizer_model), chat_template=LLAMA2_CHAT_TEMPLATE)
    messages = [Message(role="system", content="S"), Message(role="user", content="</s> <s> hi")]
    ids = prompt_ids(like(tokenizer), messages, chosen(None, None), False)
    assert ids.count(1) == 1 and ids[0] == 1 and 2 not in ids
    for text in ("<s>[INST] hi [/INST]", "[INST] hi [/INST]"):
        raw = encode(tokenizer, text, True)
        assert raw.count(1) == 1 and raw[0] == 1
    assert encode(tokenizer, "a</s>", True)[-1] == 2 and 2 not in encode(tokenizer, "a</s>", False)
    plain, marked = (
        prompt_ids(like(tokenizer), [Message(role="user", content=f"x {text} y")], chosen(None, None), False)
        for text in ("", "[INST] [/INST] <<SYS>> <</SYS>>")
    )
    for piece in tokenizer("[INST] [/INST] <<SYS>> <</SYS>>", add_special_tokens=False)["input_ids"][:-1]:
        if len(tokenizer.token_bytes(piece)) > 2:  # of the words inside the brackets: only the template writes them
            assert marked.count(piece) == plain.count(piece)
    assert "x [INST] [/INST] <<SYS>> <</SYS>> y" in tokenizer.decode(list(marked))


def test_tools_are_told_and_held_to(compiler: Compiler, tiny_parts: tuple[Any, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tools = [Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": schema}})]
    needed = chosen(tools, "required")
    assert json.loads(follow(compiler, needed.constraint(), 1)) in [
        {"name": "f", "arguments": {"x": v}} for v in (True, False)
    ]
    ids = prompt_ids(like(tiny_parts[1]), [Message(role="user", content="Q")], needed, False)
    assert '"name": "f"' in tiny_parts[1].decode(list(ids))
    kinds = {follow(compiler, chosen(tools, "auto").constraint(), seed, 60)[:1] == b"{" for seed in range(30)}
    assert False in kinds


# -- logits ------------------------------------------------------------------------------------------------------


def test_penalties_count_the_answer_only() -> None:
    penalty, scores = CountPenalty(0.5, 1.0, 2), torch.zeros(1, 6)
    assert penalty(torch.tensor([[1, 1]]), scores).tolist() == [[0.0] * 6]
    assert penalty(torch.tensor([[1, 1, 3]]), scores)[0].tolist() == [0, 0, 0, -1.5, 0, 0]
    assert penalty(torch.tensor([[1, 1, 3, 3, 1]]), scores)[0].tolist() == [0, -1.5, 0, -2.0, 0, 0]
    assert Bias({2: 5.0})(torch.tensor([[0]]), scores)[0].tolist() == [0, 0, 5, 0, 0, 0] and not scores.any()


# -- limits, metrics, logs, life ---------------------------------------------------------------------------------


def test_limits_follow_from_model_and_memory(tiny_parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_parts
    each = limits.bytes_per_token(model, "torch", None)
    assert each == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    monkeypatch.setattr(limits, "available", lambda device: 4000 * each)
    assert limits.cache_tokens(model, limits.Wanted(), each)[0] == 1600
    assert limits.cache_tokens(model, limits.Wanted(max_batch_total_tokens=77), each)[0] == 77
    assert limits.cache_tokens(model, limits.Wanted(max_batch_size=1), each)[0] == 1024
    monkeypatch.setattr(limits, "available", lambda device: 100 * each)
    with pytest.raises(InputError, match="hold 40 tokens"):
        limits.cache_tokens(model, limits.Wanted(), each)
    with Engine(model, tokenizer, cache_tokens=512, runner="torch") as engine:
        found = limits.bounds(engine, limits.Wanted())
        assert (found.max_total_tokens, found.max_input_tokens) == (513, 512)
        assert "512 tokens: here" in limits.table(engine, found, "here")
        for wrong in ({"max_total_tokens": 2000}, {"max_total_tokens": 600}, {"max_input_tokens": 513}):
            with pytest.raises(InputError):
                limits.bounds(engine, limits.Wanted(**wrong))


def test_metrics_add_up() -> None:
    seen = Histogram("h", "help", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        seen.add(value)
    assert seen.lines()[2:] == [
        'h_bucket{le="1"} 2', 'h_bucket{le="2"} 3', 'h_bucket{le="+Inf"} 4', "h_sum 12.0", "h_count 4",
    ]  # fmt: skip
    counter = Counter("c", "help", "err", ("a", "b"))
    counter.add(value="b")
    assert counter.lines()[2:] == ['c{err="a"} 0.0', 'c{err="b"} 1.0']
    with pytest.raises(KeyError):
        counter.add(value="new")


def test_logs_are_json_lines_and_never_wait() -> None:
    out = io.StringIO()
    listener = logs.start("info", out)
    logs.logger.info("request", extra={"fields": {"status": 200}})
    listener.stop()
    line = json.loads(out.getvalue())
    assert (line["event"], line["status"], line["level"]) == ("request", 200, "info")
    handler = logs.logger.handlers[0]
    assert isinstance(handler, logs.Dropping)
    for _ in range(10_100):  # nobody writes any more
        logs.logger.info("more")
    assert handler.dropped == 100
    logging.getLogger("llama2.serve").handlers.clear()
    logging.getLogger("uvicorn.error").handlers.clear()


def test_a_drain_waits_then_cuts() -> None:
    async def main() -> None:
        life, cuts = Life(0.2, 0.1), []
        with pytest.raises(Refusal, match="being loaded"):
            life.enter()
        life.state = "ready"
        life.enter()
        drain = asyncio.create_task(life.drain(lambda: cuts.append(life.inside) or life.leave()))
        await asyncio.sleep(0)
        assert not life.ready
        life.enter()  # load balancers have not noticed yet
        life.leave()
        while life.state == "draining":
            await asyncio.sleep(0.005)
        with pytest.raises(Refusal, match="shutting down"):
            life.enter()
        await drain
        assert cuts == [1] and life.inside == 0

    asyncio.run(main())
