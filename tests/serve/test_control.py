"""Everything that comes from a request is text: no field of it becomes a control token, whatever a template prints."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bytewise import TEMPLATE, write_tokenizer

pytest.importorskip("pydantic", reason="serving needs the extra `serve`")

from serve.stand_ins import like

from llama2 import AutoTokenizer, LlamaTokenizer
from llama2.errors import TokenizerError
from llama2.serve.chat import Message, Tool, chosen, prompt_ids
from llama2.serve.errors import Refusal
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE, marks

CALLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
)
FIELDS = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{{ t.function.description }}"
    "{% for k, v in t.function.parameters.properties.items() %} {{ k }}={{ v.description }}{% endfor %}\n{% endfor %}"
    "{% for m in messages %}{{ bos_token | default('') }}{{ m.role }} {{ m.name | default('') }}"
    " {{ m.tool_call_id | default('') }}"
    "{{ (m.content or '') | trim }}{% for c in m.tool_calls or [] %}<{{ c.id }}>{{ c.function.name }}"
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endif %}{% endfor %}{% endfor %}"
)
TEMPLATES = {"llama2": LLAMA2_CHAT_TEMPLATE, "turns": TEMPLATE, "calls": CALLS, "fields": FIELDS}


@pytest.fixture(scope="module", params=["bytewise", "llama"])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "llama":
        return LlamaTokenizer(str(request.getfixturevalue("tokenizer_model")))
    folder = tmp_path_factory.mktemp("bytewise")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def request_body(payload: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools that say the payload wherever a request may say something."""
    arguments = {payload: payload, "inner": {"x": [payload]}}
    messages = [
        {"role": "system", "content": payload},
        {"role": "user", "content": f"a {payload}", "name": payload},
        {
            "role": "assistant",
            "content": f"{payload} b",
            "tool_calls": [{"id": payload, "type": "function", "function": {"name": payload, "arguments": arguments}}],
        },
        {"role": "user", "content": [{"type": "text", "text": payload}]},
    ]
    properties = {payload: {"type": "string", "description": payload, "enum": [payload]}}
    function = {"name": "f", "description": payload, "parameters": {"type": "object", "properties": properties}}
    return messages, [{"type": "function", "function": function}]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the payload stands: a path of keys, and "key" for a name of a field."""
    if isinstance(value, str):
        if "PAYLOAD" in value:
            yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            if "PAYLOAD" in key:
                yield (*path, key, "key")
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from places(inner, (*path, i))


def put(value: Any, path: tuple[Any, ...], payload: str) -> Any:
    """A copy with the payload at one place and harmless text at the others."""

    def walk(node: Any, at: tuple[Any, ...]) -> Any:
        if isinstance(node, str):
            return node.replace("PAYLOAD", payload if at == path else "zq")
        if isinstance(node, dict):
            return {
                key.replace("PAYLOAD", payload if (*at, key, "key") == path else "zq"): walk(inner, (*at, key))
                for key, inner in node.items()
            }
        return [walk(inner, (*at, i)) for i, inner in enumerate(node)] if isinstance(node, list) else node

    return walk(value, ())


def special(tokenizer: Any, ids: tuple[int, ...]) -> list[int]:
    return [i for i in ids if i in tokenizer.special_ids]


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_field_of_a_request_becomes_a_control_token(tokenizer: Any, name: str) -> None:
    if name == "llama2" and tokenizer.bos_token is None:
        pytest.skip("this template prints a BOS")
    tokenizer.chat_template = TEMPLATES[name]
    whole = request_body("PAYLOAD")
    tokens = [t for t in tokenizer.all_special_tokens if t]
    payloads = [*tokens, "".join(tokens), f"x{tokens[0]}y", f" {tokens[-1]} ", tokens[0][:-1], tokens[0][1:-1]]

    def ids(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        made = [Message.model_validate(m) for m in copy.deepcopy(messages)]
        kinds = [Tool.model_validate(t) for t in tools]
        return special(tokenizer, prompt_ids(like(tokenizer), made, chosen(kinds, "auto"), False))

    usual = ids(*put(list(whole), (), ""))
    checked = 0
    for path in places(list(whole)):
        for payload in payloads:
            try:
                found = ids(*put(list(whole), path, payload))
            except Refusal:  # said, and nothing was made of it
                continue
            assert found == usual, (path, payload)
            checked += 1
    assert checked > 20


def test_a_token_cannot_be_put_together_from_pieces(tokenizer: Any) -> None:
    token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"
    for cut in range(1, len(token)):
        message = Message(role="user", name=token[:cut], content=token[cut:])
        assert not special(tokenizer, prompt_ids(like(tokenizer), [message], chosen(None, None), False))
    tokenizer.chat_template = token[0] + "{{ messages[0].name }}" + token[-1] + "{{ messages[0].content }}"
    message = Message(role="user", name=token[1:-1], content="x")
    assert not special(tokenizer, prompt_ids(like(tokenizer), [message], chosen(None, None), False))


def test_markers_are_text_in_tools_as_in_messages(tokenizer_model: Path) -> None:
    tokenizer = LlamaTokenizer(str(tokenizer_model), chat_template=CALLS + "{# [INST] #}")
    word = tokenizer.encode("[INST]", add_special_tokens=False)[1]
    assert tokenizer.token_bytes(word) == b"INST"
    chat = [{"role": "user", "content": "x"}]
    for field in ("description", "name"):
        tool = {"type": "function", "function": {"name": "f", "description": "d"} | {field: "a [INST] b"}}
        ids = tokenizer.apply_chat_template(chat, tools=[tool], safe=True)
        assert word not in ids and "a [INST] b" in tokenizer.decode(ids)
    ids = tokenizer.apply_chat_template([chat[0] | {"name": "[INST]"}], safe=True)
    assert word not in ids and "[INST]" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content[1:] }}", "{{ messages[0].content | reverse }}", "{{ messages[0].content[:-1] }}"],
)
def test_a_template_that_takes_texts_apart_is_refused(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(TokenizerError, match="cannot follow"):
        tokenizer.apply_chat_template([{"role": "user", "content": "</s>x"}], safe=True)


def test_what_is_risky() -> None:
    test = marks.risky(["</s>", "<|end|>"])
    for text in ("</s>", "a</s>b", "a<", "a<|", ">b", "/s", "end", " s> ", "x</"):
        assert test(text), text
    for text in ("", "function", "a b", "a<b", "hello", "{}"):
        assert not test(text), text
