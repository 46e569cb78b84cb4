"""Calls of functions in every dialect: what a grammar lets through is read back, in any pieces."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="serving needs the extra `serve`")
pytest.importorskip("pydantic", reason="serving needs the extra `serve`")

from serve.walks import walk

from llama2.serve.chat import Message, Tool, Tools, chosen, prompt_ids
from llama2.serve.constraint import Compiler, Constraint, json_schema
from llama2.serve.errors import Refusal
from llama2.serve.policy import Policy
from llama2.serve.tool_calls import (
    FUNCTION_TAG,
    HERMES,
    JSON,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    PYTHONIC,
    XML,
    CallReader,
    ToolDialect,
    dialect_of,
    hidden_marks,
)
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE, LlamaTokenizerFast

ARGUMENTS = '{"a": "x}\\"{", "b": [1, {"c": 2}]}'
CALL = '{"name": "f", "%s": ' + ARGUMENTS + "}"
F, G = ("f", ARGUMENTS), ("g", "{}")
WRITTEN: list[tuple[ToolDialect, str, list[tuple[str, str]], str]] = [
    (JSON, CALL % "arguments", [F], ""),
    (JSON, CALL % "arguments" + '\n{"name": "g", "arguments": {}}', [F, G], ""),
    (JSON, " \nplain {x}", [], " \nplain {x}"),
    (JSON, '{"name": "g"}', [], '{"name": "g"}'),
    (JSON, '{"name": "h", "arguments": {}}', [], '{"name": "h", "arguments": {}}'),
    (LLAMA3, CALL % "parameters" + '; {"name": "g", "parameters": {}}', [F, G], ""),
    (LLAMA3, '<|python_tag|>{"type": "function", "name": "f", "parameters": ' + ARGUMENTS + "}", [F], ""),
    (LLAMA3, '{"hello": 1}', [], '{"hello": 1}'),
    (LLAMA3, 'Hi {"name": "f", "parameters": {}}', [], 'Hi {"name": "f", "parameters": {}}'),
    (
        HERMES,
        "Let me see.\n<tool_call>\n" + CALL % "arguments" + "\n</tool_call>\n<tool_call>\n"
        '{"arguments": {}, "name": "g"}\n</tool_call>',
        [F, G],
        "Let me see.\n",
    ),
    (HERMES, "\n<tool_call>" + CALL % "arguments", [F], ""),
    (HERMES, '<tool_call>{"name": "g"}</tool_call>', [G], ""),
    (HERMES, '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', [G], ""),
    (HERMES, "a <tool b", [], "a <tool b"),
    (MISTRAL, "[TOOL_CALLS] [" + CALL % "arguments" + ', {"name": "g", "arguments": {}}]', [F, G], ""),
    (FUNCTION_TAG, f"<function=f>{ARGUMENTS}</function>\n<function=g>{{}}</function>", [F, G], ""),
    (FUNCTION_TAG, f"Well.\n<function=f> {ARGUMENTS}", [F], "Well.\n"),
    (FUNCTION_TAG, "<function=g></function>", [G], ""),
    (FUNCTION_TAG, "a <function=h>{}</function> b", [], "a <function=h>{}</function> b"),
    (FUNCTION_TAG, "x <function=f", [], "x <function=f"),
    (PYTHONIC, """[f(a='x}"{', b=[1, {"c": 2}]), g()]""", [("f", '{"a": "x}\\"{", "b": [1, {"c": 2}]}'), G], ""),
    (PYTHONIC, "<|python_start|>[g( )]<|python_end|>", [G], ""),
    (PYTHONIC, ' [ f(a=True, b=None, c=[true, "),"], d=-1.5) ]', [
        ("f", '{"a": true, "b": null, "c": [true, "),"], "d": -1.5}')], ""),
    (PYTHONIC, "[1, 2] is a list of f(x)", [], "[1, 2] is a list of f(x)"),
    (PYTHONIC, "[f", [], "[f"),
    (PYTHONIC, "[h(a=1)]", [], "[h(a=1)]"),
    (PYTHONIC, "Say f(a=1)", [], "Say f(a=1)"),
    (PYTHONIC, "[f(a=some.thing, b='\\'')]", [("f", '{"a": "some.thing", "b": "\'"}')], ""),
    (XML, "Well.\n<tool_call>\n<function=f>\n<parameter=a>\nx}\n<b>\n</parameter>\n<parameter=n>\n[1]\n</parameter>\n"
     "</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
     [("f", '{"a": "x}\\n<b>", "n": [1]}'), G], "Well.\n"),
    (XML, "<tool_call><function=g></function></tool_call>", [G], ""),
    (XML, "a <tool b", [], "a <tool b"),
    (MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS]" + ARGUMENTS + "[TOOL_CALLS]g[ARGS]{}", [F, G], ""),
]  # fmt: skip


def read(tools: Tools, text: str, rng: random.Random, cuts: int = 8) -> tuple[list[tuple[str, str]], str]:
    """The calls and the words of a text that comes in random pieces."""
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(cuts)))
    reader, said = tools.reader(), []
    for a, b in zip([0, *places], [*places, len(text)], strict=True):
        said += reader.put(text[a:b])
    calls: list[list[str]] = []
    said += reader.finish()
    for piece in said:
        if piece.name is not None:
            calls.append([piece.name, ""])
        elif piece.arguments:
            calls[-1][1] += piece.arguments
    return [(name, arguments) for name, arguments in calls], "".join(piece.text for piece in said)


@pytest.mark.parametrize(("dialect", "text", "calls", "words"), WRITTEN)
def test_calls_are_read_in_any_pieces(
    dialect: ToolDialect, text: str, calls: list[tuple[str, str]], words: str
) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        places = list(range(len(text))) if not seed else sorted(rng.randrange(len(text) + 1) for _ in range(seed % 8))
        reader, said = CallReader(dialect, ("f", "g")), []
        for a, b in zip([0, *places], [*places, len(text)], strict=True):
            said += reader.put(text[a:b])
        said += reader.finish()
        found: list[list[str]] = []
        for piece in said:
            if piece.name is not None:
                found.append([piece.name, ""])
            elif piece.arguments:
                found[-1][1] += piece.arguments
        assert [tuple(call) for call in found] == calls
        assert "".join(piece.text for piece in said) == words


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader(LLAMA3, ("f",))
    assert reader.put('{"name": "f", "parameters": {"x": ')[0].name == "f"
    assert [piece.arguments for piece in reader.put('"a')] == ['"a']
    assert "".join(piece.arguments for piece in reader.put('b"}}')) == 'b"}'


def test_control_tokens_are_hidden() -> None:
    reader = CallReader(HERMES, ("f",), ("<|im_end|>", "<tool_call>"))
    said = reader.put('<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>') + reader.finish()
    assert [(piece.name, piece.arguments, piece.text) for piece in said] == [("f", "", ""), (None, "{}", "")]


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        (LLAMA2_CHAT_TEMPLATE, JSON),
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]", MISTRAL),
        ("{{ tools }}[TOOL_CALLS]x[ARGS]", MISTRAL_ARGS),
        ("{{ tools }}<|python_tag|>", LLAMA3),
        ("{{ tools }}<function=example>{...}</function>", FUNCTION_TAG),
        ("{{ tools }}<tool_call><function=f><parameter=x>", XML),
        ("{{ tools }} in the format of [func_name1(params_name1=params_value1)]", PYTHONIC),
        ("{{ tools }}<|python_start|>", PYTHONIC),
        ("{{ tools }}", JSON),
        (None, JSON),
    ],
)
def test_the_template_chooses_the_dialect(template: str | None, dialect: ToolDialect) -> None:
    assert dialect_of(template) is dialect
    assert pickle.loads(pickle.dumps(dialect)) is dialect  # it is compared by identity, also behind a reader process


def test_arguments_of_python_and_xml_come_one_by_one_and_have_their_types() -> None:
    reader = CallReader(PYTHONIC, ("f",), takes={"f": {"properties": {"x": {}, "y": {}}}})
    assert reader.put("[f(1, y=")[1].arguments == '{"x": 1'
    assert [piece.arguments for piece in reader.put("'é')]")] == [', "y": "é"', "}"]
    reader = CallReader(XML, ("f",), takes={"f": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}}}})
    said = reader.put("<tool_call><function=f><parameter=s>12</parameter><parameter=n>12</parameter></function>")
    assert "".join(piece.arguments for piece in said) == '{"s": "12", "n": 12}'


# -- grammars ----------------------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "properties": {"city": {"enum": ["Zürich", "東京"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city"],
    "description": "x" * 20_000,
}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": name, "parameters": SCHEMA}}) for name in ("f", "g-1")
]


@pytest.mark.parametrize(
    "dialect", [JSON, LLAMA3, HERMES, MISTRAL, MISTRAL_ARGS, FUNCTION_TAG, PYTHONIC, XML], ids=lambda d: d.name
)
def test_what_a_grammar_lets_through_is_read(parts: tuple[Any, Compiler], dialect: ToolDialect) -> None:
    tokenizer, numbers = parts[0], set()
    functions = tuple(tool.function for tool in TOOLS)
    marks = hidden_marks(tokenizer, dialect)
    tools = Tools(functions, "required", dialect, True, marks, tuple(tokenizer.special_contents) if marks else ())
    for seed in range(12):
        calls, words = read(tools, walk(*parts, tools.constraint(), seed, 200), random.Random(seed))
        assert calls and not words.strip()
        numbers.add(len(calls))
        for name, arguments in calls:
            assert name in ("f", "g-1") and json.loads(arguments)["city"] in ("Zürich", "東京")
            assert set(json.loads(arguments)) <= {"city", "n"}
    assert len(numbers) > 1  # several calls in some answers


def test_auto_lets_words_through_too(parts: tuple[Any, Compiler]) -> None:
    for dialect in (JSON, LLAMA3, HERMES, MISTRAL, PYTHONIC, XML):
        tools = Tools(tuple(tool.function for tool in TOOLS), "auto", dialect, True)
        said = [bool(read(tools, walk(*parts, tools.constraint(), seed), random.Random(seed))[1]) for seed in range(6)]
        assert any(said)


def test_tools_beside_a_form(parts: tuple[Any, Compiler]) -> None:
    tokenizer, compiler = parts
    functions = tuple(tool.function for tool in TOOLS)
    forms = (json_schema({"properties": {"a": {"type": "boolean"}}, "required": ["a"]}), Constraint("regex", "a/b+c"),
             Constraint("lark", 'start: "x" | "y"'))  # fmt: skip
    for form, sample in zip(forms, (b'{"a": true}', b"a/bbc", b"y"), strict=True):
        tools = Tools(functions, "auto")
        constraint = tools.constraint(form)
        for seed in range(12):
            text = walk(*parts, constraint, seed)
            calls, words = read(tools, text, random.Random(seed))
            assert calls or text in ("x", "y") or text.startswith("a/b") or set(json.loads(words)) == {"a"}
        ids = tokenizer.encode_bytes(sample)
        assert compiler.compiled(constraint).matcher.deep_copy().try_consume_tokens(ids) == len(ids)
    with pytest.raises(Refusal, match="several rules"):
        Tools(functions, "auto").constraint(Constraint("lark", "start: a\na: x"))


# -- choices and histories ---------------------------------------------------------------------------------------


def test_choices() -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"function": {"name": "f"}}]}}
    tools = chosen(TOOLS, allowed)
    assert [f.name for f in tools.functions] == ["f"] and tools.choice == "required"
    flat = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g-1"}]}
    assert [f.name for f in chosen(TOOLS, flat).functions] == ["g-1"]
    assert chosen(TOOLS, "any").choice == "required" and not chosen(TOOLS, "auto").several
    assert chosen(TOOLS, "auto", True).several and not chosen(TOOLS, "f", True).several
    for wrong in ({"type": "allowed_tools"}, {"type": "allowed_tools", "tools": [{"name": "h"}]}):
        with pytest.raises(Refusal):
            chosen(TOOLS, wrong)


def test_many_tools_with_long_descriptions() -> None:
    many = [
        Tool.model_validate(
            {"type": "function", "function": {"name": f"f{i}", "description": "d" * 9000, "parameters": {
                "type": "object", "properties": {"x": {"type": "integer", "description": "y" * 2000}}}}}
        )
        for i in range(200)
    ]  # fmt: skip
    assert "y" * 9 not in chosen(many, "required").constraint().source


def test_a_history_of_calls_is_rendered(tokenizer_model: Path) -> None:
    from types import SimpleNamespace

    template = (
        "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call') }}"
        "{% endif %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}"
        "{% endfor %};{% endfor %}{# tools <|python_tag|> #}"
    )
    tokenizer = LlamaTokenizerFast(tokenizer_model, chat_template=template)
    model: Any = SimpleNamespace(
        tokenizer=tokenizer, policy=Policy(), alternates=False, tool_dialect=dialect_of(template)
    )
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": f'{{"x": "{i}!"}}'}} for i in "12"]
    messages = [
        Message(role="user", content="q"),
        Message(role="assistant", tool_calls=calls),
        *(Message(role="tool", content=f"r{i}", tool_call_id=i) for i in "12"),
    ]
    text = tokenizer.decode(list(prompt_ids(model, messages, chosen(TOOLS, "auto"), False)))
    assert "user:q;assistant:1!;tool:r1;assistant:2!;tool:r2;" in text
