"""Arguments of calls that are not written as JSON: keywords of Python, and elements of XML.

A grammar lets them through in one layout: in Python what a schema requires in its order and then any of the rest, in
XML the same. They are read as models write them, which is freer.
"""

import ast
import json
from collections.abc import Mapping
from typing import Any

_WORDS = {"true": True, "false": False, "null": None}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def python_end(text: str, index: int) -> int:
    """Where the value that begins at `index` ends, at the comma or bracket behind it; -1 where it does not yet."""
    depth, quote = 0, ""
    while index < len(text):
        character = text[index]
        if quote:
            if character == "\\":
                index += 1
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in _CLOSING:
            depth += 1
        elif character in _CLOSING.values():
            if not depth:
                return index
            depth -= 1
        elif character == "," and not depth:
            return index
        index += 1
    return -1


def python_value(text: str) -> str:
    """A literal of Python or JSON as JSON; other text as a JSON string."""
    text = text.strip()
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        pass
    try:
        tree = ast.parse(text, mode="eval")
        tree = ast.fix_missing_locations(_Words().visit(tree))
        return json.dumps(ast.literal_eval(tree), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return json.dumps(text, ensure_ascii=False)


class _Words(ast.NodeTransformer):
    """JSON's words inside of Python's brackets."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Replaces true, false and null."""
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node


def xml_value(text: str, schema: Mapping[str, Any] | None) -> str:
    """The text of an element as JSON: a string where its schema says so or it is no JSON, without the line breaks that
    stand around it."""
    text = text.removeprefix("\n").removesuffix("\n")
    kinds = (schema or {}).get("type")
    if kinds == "string" or (isinstance(schema, Mapping) and _strings(schema)):
        return json.dumps(text, ensure_ascii=False)
    return python_value(text)


def _strings(schema: Mapping[str, Any]) -> bool:
    values = schema.get("enum")
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def python_arguments(schema: Mapping[str, Any]) -> str:
    """An expression of a grammar for keyword arguments that fit a schema of an object."""
    written = {name: f"{json.dumps(f'{name}=')} %json {_inside(schema, name)}" for name in _properties(schema)}
    return _listed(schema, written, '", "')


def xml_arguments(schema: Mapping[str, Any]) -> str:
    """An expression of a grammar for elements <parameter=NAME>, a line each, that fit a schema of an object."""
    written = {}
    for name, value in _properties(schema).items():
        opening, closing = json.dumps(f"<parameter={name}>\n"), json.dumps("\n</parameter>\n")
        written[name] = f"{opening} {_element(schema, name, value)} {closing}"
    return _listed(schema, written, "")


def _element(schema: Mapping[str, Any], name: str, value: Any) -> str:
    if isinstance(value, Mapping) and _strings(value):
        return f"({' | '.join(json.dumps(text) for text in value['enum'])})"
    if isinstance(value, Mapping) and value.get("type") == "string":
        return "XML_TEXT"
    return f"%json {_inside(schema, name)}"


XML_TEXT = r"XML_TEXT: /[^<]+/"  # a rule that `xml_arguments` may name; text with a < would need an end of its own


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _inside(schema: Mapping[str, Any], name: str) -> str:
    """The schema of a property, with the definitions that it may refer to."""
    value = _properties(schema)[name]
    shared = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
    return json.dumps({**value, **shared} if isinstance(value, Mapping) else value)


def _listed(schema: Mapping[str, Any], written: Mapping[str, str], between: str) -> str:
    """Joins what is required, in its order, and then as many of the rest as there are, in any."""
    needed = [name for name in schema.get("required") or () if name in written]
    rest = [text for name, text in written.items() if name not in needed]
    first = f" {between} ".join(written[name] for name in needed)
    if not rest:
        return first
    one = f"({' | '.join(rest)})"
    if needed:
        return f"{first} ({between} {one}){{0,{len(rest)}}}"
    return f"({one} ({between} {one}){{0,{len(rest) - 1}}})?"
