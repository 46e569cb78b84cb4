"""The form that an answer must have, in every way that clients ask for one: OpenAI's, TGI's, vLLM's and llama.cpp's."""

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from llama2.errors import InputError
from llama2.serve.constraint import Constraint, any_json, json_schema
from llama2.serve.errors import Refusal
from llama2.serve.proof import MAX_SOURCE
from llama2.serve.validation import Body, Text, Texts

_ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")


class SchemaFormat(Body):
    """json_schema of a response_format."""

    name: str | None = Field(None, max_length=256)
    description: str | None = Field(None, max_length=8192)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """response_format, in OpenAI's form, in TGI's (`value`) and in llama.cpp's (`schema`)."""

    type: Literal["text", "json_object", "json_schema", "json", "regex", "grammar"]
    json_schema: SchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    value: dict[str, Any] | Text | None = None

    def constraint(self) -> Constraint | None:
        """Returns the constraint on the answer. Raises Refusal where a schema or expression is missing."""
        if self.type == "text":
            return None
        if self.type in ("regex", "grammar"):
            if not isinstance(self.value, str) or not self.value:
                raise Refusal("validation", f"response_format of type {self.type} needs its text in `value`")
            return Constraint("regex", self.value) if self.type == "regex" else grammar(self.value)
        strict = bool(self.strict or (self.json_schema and self.json_schema.strict))
        if self.json_schema is not None:
            schema = self.json_schema.schema_
        elif self.schema_ is not None:
            schema = self.schema_
        else:  # TGI's way; its value may hold the schema with a name beside it
            schema = as_object(self.value) if isinstance(self.value, str) else self.value
            if schema is not None and "properties" not in schema and isinstance(schema.get("schema"), dict):
                schema = schema["schema"]
        if schema is None and self.type == "json_schema":
            raise Refusal(
                "validation", "response_format of type json_schema needs json_schema.schema", "response_format"
            )
        return any_json() if schema is None else json_schema(schema, strict)


class StructuredOutputs(Body):
    """vLLM's structured_outputs: one of these."""

    open_ended: ClassVar[bool] = True  # the rest says how whitespace is written, which is fixed here
    json_: dict[str, Any] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Texts | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    structural_tag: Any = None

    def constraints(self) -> dict[str, Constraint]:
        """Returns the requested constraints, by name. Raises Refusal."""
        if self.structural_tag is not None:
            raise Refusal(
                "validation", "structured_outputs.structural_tag is not supported; use tools", "structured_outputs"
            )
        found = vllm_forms("structured_outputs.", self.json_, self.regex, self.choice, self.grammar, self.json_object)
        if not found:
            raise Refusal("validation", "structured_outputs is empty; give one form", "structured_outputs")
        return found


def vllm_forms(
    prefix: str,
    schema: dict[str, Any] | str | None,
    regex: str | None,
    choices: list[str] | None,
    source: str | None,
    json_object: bool | None,
) -> dict[str, Constraint]:
    """vLLM's five kinds of forms, those that are given, by their names. Raises Refusal."""
    found = {}
    if schema is not None:
        found[f"{prefix}json"] = json_schema(as_object(schema) if isinstance(schema, str) else schema)
    if regex is not None:
        found[f"{prefix}regex"] = Constraint("regex", regex)
    if choices is not None:
        found[f"{prefix}choice"] = one_of(choices)
    if source is not None:
        found[f"{prefix}grammar"] = grammar(source)
    if json_object:
        found[f"{prefix}json_object"] = any_json()
    return found


def only(forms: Mapping[str, Constraint | None]) -> Constraint | None:
    """The one form among those that may have been given. Raises Refusal where there are several."""
    found = {name: constraint for name, constraint in forms.items() if constraint is not None}
    if len(found) > 1:
        raise Refusal("validation", f"{' and '.join(found)} exclude each other; an answer has one form")
    return next(iter(found.values()), None)


def one_of(choices: list[str]) -> Constraint:
    """One of several texts. Raises Refusal."""
    if not choices or "" in choices:
        raise Refusal("validation", "a choice needs at least one text, and none that is empty")
    return Constraint("lark", f"start: {' | '.join(map(json.dumps, choices))}")


def grammar(source: str) -> Constraint:
    """A grammar in llama.cpp's GBNF, or in llguidance's Lark, which has no `::=`. Raises Refusal."""
    if not source.strip():
        raise Refusal("validation", "the grammar is empty; give its rules", "grammar")
    if "::=" not in source:
        return Constraint("lark", source)
    if len(source) > MAX_SOURCE:
        raise InputError(f"the grammar has {len(source)} characters; {MAX_SOURCE} are the most")
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return Constraint("lark", gbnf_to_lark(_as_converted(source)))
    except Exception as error:  # of a converter that names no errors of its own
        reason = " ".join(str(error).split())[:300]
        raise Refusal("validation", f"the grammar cannot be used: {reason}", "grammar") from None


def _as_converted(source: str) -> str:
    """GBNF as the converter reads it: alternatives do not begin a line, escapes of characters are characters."""
    source = re.sub(r"\n[ \t]*\|", " |", source).replace("{,", "{0,")

    def written(match: re.Match[str]) -> str:
        number = int(match[1] or match[2], 16)
        character = chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else ""
        return f"\\{character}" if character in ('"', "\\", "]", "[", "-", "^") else character

    return _ESCAPED.sub(written, source)


def as_object(text: str) -> dict[str, Any]:
    """A JSON object written as a string. Raises Refusal."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refusal("validation", "the schema is a text that is not a JSON object")
    return found
