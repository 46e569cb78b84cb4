"""Faulty and hostile templates, functions as tools, contents of parts: values are transformers' where it has them."""

import time
from enum import Enum
from typing import Any, Literal

import pytest

from llama2.errors import TokenizerError
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE, LlamaTokenizer, LlamaTokenizerFast, sandbox
from llama2.tokenizer.sandbox import reads_parts, render
from llama2.tokenizer.tools import function_schema

CHAT = [{"role": "user", "content": "Hi"}]
DOUBLING = "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = CODE %}{% endfor %}{{ ns.x }}"
HOSTILE = [
    "{{ 1 // 0 }}",
    "{{ 1 % 0 }}",
    "{{ messages|length / 0 }}",
    "{{ 1 + 'a' }}",
    "{{ messages[0]['content'] + 1 }}",
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "{% for i in range(90000) %}{% for j in range(90000) %}{{ j }}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**10 }}",
    "{{ 7 ** 10000000 }}",
    "{{ 'a'|center(10000000000) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ (['x' * 900000] * 900000)|join }}",
    "{{ range(1000000000)|list }}",
    DOUBLING.replace("CODE", "ns.x ~ ns.x"),
    DOUBLING.replace("CODE", "ns.x + ns.x"),
    DOUBLING.replace("CODE", "ns.x.replace('a', 'aa')"),
    DOUBLING.replace("CODE", "ns.x|replace('a', 'aa')"),
    DOUBLING.replace("{% set ns.x = CODE %}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "{% for i in range(90000) %}{% set x = range(90000)|list %}{% endfor %}",
    "{% set r = range(90000)|list %}{% for i in range(90000) %}{{ 'a' in r }}{% endfor %}",
    "{% for i in range(90000) %}{{ 'a' * 9000000 }}{% endfor %}",
    "{% for x in 5 %}{% endfor %}",
    "{{ messages[5].content.strip() }}",
    "{{ nothing() }}",
]


@pytest.fixture(params=[LlamaTokenizer, LlamaTokenizerFast])
def tok(request: Any, spm: Any) -> Any:
    return request.param(spm, chat_template=LLAMA2_CHAT_TEMPLATE)


@pytest.mark.parametrize("template", HOSTILE)
def test_a_faulty_template_is_one_error_soon(template: str) -> None:
    start = time.thread_time()
    with pytest.raises(TokenizerError, match="the chat template failed: "):
        render(template, {"messages": CHAT})
    assert time.thread_time() - start < 1.5  # of processor time; other processes do not count


def test_the_error_comes_from_the_tokenizer(tok: Any) -> None:
    with pytest.raises(TokenizerError, match="ZeroDivisionError"):
        tok.apply_chat_template(CHAT, chat_template="{{ 1 // 0 }}")


@pytest.mark.parametrize(
    ("bound", "value", "source", "said"),
    [
        ("MAX_STEPS", 1000, "{% for i in range(2000) %}{% endfor %}", "it takes more than 1,000 steps"),
        ("MAX_SECONDS", -1, "{% for i in range(2000) %}{% endfor %}", r"it takes more than -1\.0 seconds"),
        ("MAX_SIZE", 1000, "{% for i in range(2000) %}a{% endfor %}", "it writes more than 1,000 characters"),
    ],
)
def test_each_bound_holds_by_itself(
    bound: str, value: float, source: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(source, {}) is not None
    monkeypatch.setattr(sandbox, bound, value)
    with pytest.raises(TokenizerError, match=said):
        render(source, {})


def test_bounds_leave_long_conversations_alone() -> None:
    chat = [{"role": ("user", "assistant")[i % 2], "content": "some words " * 40} for i in range(2000)]
    text = render(LLAMA2_CHAT_TEMPLATE, {"messages": chat, "bos_token": "<s>", "eos_token": "</s>"})
    assert text.count("[INST]") == 1000 and len(text) > 800_000


def test_loops_are_as_jinja_has_them() -> None:
    source = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {{ loop.nextitem }};{% endfor %}"
    assert render(source, {"messages": ["a", "b"]}) == "1/2False b;2/2True ;"
    assert render("{% for k, v in d.items() if v %}{{ k }}{% else %}none{% endfor %}", {"d": {"a": 1, "b": 0}}) == "a"
    assert render("{{ 'a' ~ 1 ~ [2] }}{{ d|tojson(indent=1) }}", {"d": {"é": 1}}) == 'a1[2]{\n "é": 1\n}'


# -- tools -------------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"
    BLUE = 2


def weather(
    place: str,
    days: int = 3,
    unit: Literal["C", "F"] = "C",
    tags: list[str] | None = None,
    colour: Colour = Colour.RED,
    extra: dict[str, float] | None = None,
    pair: tuple[int, str] = (1, "a"),
    either: int | float = 1,
) -> str:
    """
    Tells the weather.

    Over several lines.

    Args:
        place: The place (choices: ["Bern", " Rom "])
        days (int, optional): How many days,
            counted from today
        unit: Of temperature
        tags: Labels
        colour: A colour
        extra: More
        pair: Two
        either: One or the other

    Returns:
        What the weather is.

    Raises:
        ValueError: never
    """
    return place


def test_a_function_becomes_a_schema(tok: Any) -> None:
    """The literal is what transformers 5's get_json_schema returns."""
    expected = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.\n\nOver several lines.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "enum": ["Bern", "Rom"], "description": "The place"},
                    "days": {"type": "integer", "description": "How many days, counted from today"},
                    "unit": {"type": "string", "enum": ["C", "F"], "description": "Of temperature"},
                    "tags": {"type": "array", "items": {"type": "string"}, "nullable": True, "description": "Labels"},
                    "colour": {"type": ["string", "integer"], "enum": ["red", 2], "description": "A colour"},
                    "extra": {
                        "type": "object",
                        "additionalProperties": {"type": "number"},
                        "nullable": True,
                        "description": "More",
                    },
                    "pair": {
                        "type": "array",
                        "prefixItems": [{"type": "integer"}, {"type": "string"}],
                        "description": "Two",
                    },
                    "either": {"type": ["integer", "number"], "description": "One or the other"},
                },
                "required": ["place"],
            },
            "return": {"type": "string", "description": "What the weather is."},
        },
    }
    assert function_schema(weather) == expected
    shown = tok.apply_chat_template(CHAT, tools=[weather], chat_template="{{ tools|tojson }}", tokenize=False)
    as_dict = tok.apply_chat_template(CHAT, tools=[expected], chat_template="{{ tools|tojson }}", tokenize=False)
    assert shown == as_dict and '"place"' in shown


@pytest.mark.parity
def test_schemas_equal_transformers() -> None:
    utils = pytest.importorskip("transformers.utils")
    assert function_schema(weather) == utils.get_json_schema(weather)


class Methods:
    def look(self, where: str) -> None:
        """Looks.

        Args:
            where: The place
        """


def test_methods_are_tools_too() -> None:
    found = function_schema(Methods().look)["function"]
    assert found["parameters"]["required"] == ["where"] and found["return"] == {"type": "null"}
    assert function_schema(Methods.look) == function_schema(Methods().look)


def no_docs(a: int) -> None: ...


def no_hint(a) -> None:  # type: ignore[no-untyped-def]
    """Does.

    Args:
        a: It
    """


def no_line(a: int) -> None:
    """Does."""


def odd_type(a: Methods) -> None:
    """Does.

    Args:
        a: It
    """


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        (no_docs, "no docstring"),
        (no_hint, "'a' of the tool no_hint has no type hint"),
        (no_line, "does not describe its argument 'a'"),
        (odd_type, "no JSON schema"),
        (5, "neither a JSON schema"),
    ],
)
def test_what_is_missing_is_named(tool: Any, said: str, tok: Any) -> None:
    with pytest.raises(TokenizerError, match=said):
        tok.apply_chat_template(CHAT, tools=[tool])


# -- contents ----------------------------------------------------------------------------------------------------

PARTS = [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]}]


def test_text_parts(tok: Any) -> None:
    joined = [{"role": "user", "content": "What is\nthis?"}]
    assert tok.apply_chat_template(PARTS) == tok.apply_chat_template(joined)
    assert tok.apply_chat_template(PARTS, safe=True) == tok.apply_chat_template(joined)
    assert tok.apply_chat_template([{"role": "user", "content": ["What is", "this?"]}]) == tok.apply_chat_template(
        joined
    )
    image = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(TokenizerError, match="takes text only"):
        tok.apply_chat_template(image)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}|{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set c = m['content'] %}{% for part in c %}{{ part.text }}|{% endfor %}{% endfor %}",
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{{ m.content|map(attribute='text')|join('|') }}|{% endif %}{% endfor %}",
    ],
)
def test_templates_that_look_into_parts_get_them(tok: Any, template: str) -> None:
    assert tok.apply_chat_template(PARTS, chat_template=template, tokenize=False) == "What is|this?|"
    assert reads_parts(template) and not reads_parts(LLAMA2_CHAT_TEMPLATE)


def test_continue_a_message_of_parts(tok: Any) -> None:
    chat = [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]
    text = tok.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    assert text == "<s>[INST] Hi [/INST] Hello"
    plain = [*CHAT, {"role": "assistant", "content": "Hello"}]
    assert text == tok.apply_chat_template(plain, continue_final_message=True, tokenize=False)
    with pytest.raises(TokenizerError, match="last message with a text"):
        tok.apply_chat_template([*CHAT, {"role": "assistant", "content": None}], continue_final_message=True)


def test_rendered_chats_have_their_bos(tok: Any) -> None:
    ids = tok.apply_chat_template(CHAT)
    rendered = tok.apply_chat_template(CHAT, tokenize=False)
    both = [ids, [1, 15043]]
    assert tok([rendered, "Hello"])["input_ids"] == both
    assert tok.batch_encode_plus([rendered, "Hello"])["input_ids"] == both
    assert tok([rendered, "Hello"], truncation=True, max_length=99)["input_ids"] == both
    assert tok([rendered], return_offsets_mapping=True)["input_ids"] == [ids]
    assert tok([(rendered, "x")])["input_ids"] == [[*ids, 921]]
    assert tok(rendered + " Hello")["input_ids"] == [*ids, 15043]
