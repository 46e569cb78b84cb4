"""Python functions as tools: the JSON schema of signature and Google-style docstring, as `transformers` makes it."""

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llama2.errors import TokenizerError

_PLAIN: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SCALARS = (int, float, str, bool, type(None))
_SECTION = re.compile(r"\s*(Args|Returns|Raises):\s*$")
_ARGUMENT = re.compile(r"(\s*)(\w+)(?:\s*\([^()]*\))?:\s*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def as_schema(tool: Any) -> Mapping[str, Any]:
    """A tool as a template takes it: a JSON schema as it is, a function by its signature and docstring."""
    if isinstance(tool, Mapping):
        return tool
    if callable(tool):
        return function_schema(tool)
    raise TokenizerError(
        f"tool {tool!r} is neither a JSON schema (a dict with 'type' and 'function') nor a Python function"
    )


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "description", "parameters", "return"}} of a Python function.

    Every argument needs a type hint and a line in the docstring's "Args:"; a line may end in `(choices: ["a", "b"])`.
    TokenizerError names what is missing.
    """
    name = getattr(function, "__name__", "operation")
    documentation = (inspect.getdoc(function) or "").strip()
    if not documentation:
        raise TokenizerError(f"the tool {name} has no docstring; describe it and its arguments (under 'Args:')")
    about, arguments, returned = _sections(documentation)
    described = _arguments(arguments)
    hints, required = _hints(function, name)
    answer = hints.pop("return", None)
    for argument, schema in hints.items():
        if argument not in described:
            raise TokenizerError(
                f"the docstring of the tool {name} does not describe its argument {argument!r}; add it under 'Args:'"
            )
        schema.update(_described(described[argument], name, argument))
    parameters: dict[str, Any] = {"type": "object", "properties": hints}
    if required:
        parameters["required"] = required
    found: dict[str, Any] = {"name": name, "description": about, "parameters": parameters}
    if answer is not None:
        found["return"] = answer if returned is None else {**answer, "description": returned}
    return {"type": "function", "function": found}


def _sections(documentation: str) -> tuple[str, list[str], str | None]:
    """(the text in front, the lines under Args, the text under Returns or None)."""
    parts: dict[str, list[str]] = {"": []}
    current = ""
    for line in documentation.split("\n"):
        if (head := _SECTION.match(line)) is not None:
            current = head[1]
            parts.setdefault(current, [])
        else:
            parts[current].append(line)
    returned = "\n".join(parts["Returns"]).strip() if "Returns" in parts else None
    return "\n".join(parts[""]).strip(), parts.get("Args", []), returned


def _arguments(lines: list[str]) -> dict[str, str]:
    """Argument -> description; lines further in go on with the one above."""
    found: dict[str, str] = {}
    current, depth = "", 0
    for line in lines:
        head = _ARGUMENT.match(line)
        if head is not None and (not found or len(head[1]) <= depth):
            current, depth = head[2], len(head[1])
            found[current] = head[3].strip()
        elif found and line.strip():
            found[current] = f"{found[current]} {line.strip()}".strip()
    return found


def _described(text: str, function: str, argument: str) -> dict[str, Any]:
    choices = _CHOICES.search(text)
    if choices is None:
        return {"description": text}
    try:
        values = json.loads(choices[1])
    except ValueError as error:
        raise TokenizerError(
            f"the tool {function} lists the choices of {argument!r} as {choices[1]!r}, which is not a JSON list"
        ) from error
    enum = [value.strip() if isinstance(value, str) else value for value in values]
    return {"enum": enum, "description": text[: choices.start()].strip()}


def _hints(function: Callable[..., Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """(argument -> schema of its type, and "return" where it has one; the arguments without a default)."""
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError) as error:
        raise TokenizerError(f"the type hints of the tool {name} cannot be resolved: {error}") from error
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters), None)
    if first in ("self", "cls") and parameters[first].annotation is inspect.Parameter.empty:
        del parameters[first]
    for argument in parameters:
        if argument not in hints:
            raise TokenizerError(f"the argument {argument!r} of the tool {name} has no type hint; add one")
    schemas = {argument: _schema(hints[argument], name) for argument in parameters}
    if "return" in hints:
        with suppress(TokenizerError):  # a model never writes the answer: a type without a schema is left out
            schemas["return"] = _schema(hints["return"], name)
    required = [a for a, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    return schemas, required


def _schema(hint: Any, tool: str) -> dict[str, Any]:
    """The JSON schema of a type hint."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is None and isinstance(hint, type) and issubclass(hint, Enum):
        return _enum([member.value for member in hint], hint, tool)
    if origin is None:
        if hint in _PLAIN:
            return dict(_PLAIN[hint])
    elif origin is Union or origin is types.UnionType:
        return _union(args, tool)
    elif origin is Literal:
        return _enum(list(args), hint, tool)
    elif origin is list:
        return {"type": "array", "items": _schema(args[0], tool)}
    elif origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_schema(arg, tool) for arg in args]}
    elif origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], tool)}
    raise TokenizerError(
        f"the tool {tool} has the type hint {hint!r}, which has no JSON schema; use int, float, str, bool, Any, Enum, "
        "Literal, and list, dict, unions and tuples of a fixed length of these, or pass the tool's schema as a dict"
    )


def _enum(values: list[Any], hint: Any, tool: str) -> dict[str, Any]:
    wrong = [value for value in values if type(value) not in _SCALARS]
    if wrong or not values:
        raise TokenizerError(
            f"the tool {tool} has the type hint {hint!r}; its values must be JSON scalars, at least one"
        )
    kinds = list(dict.fromkeys(_PLAIN[type(value)]["type"] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union(args: tuple[Any, ...], tool: str) -> dict[str, Any]:
    schemas = [_schema(arg, tool) for arg in args if arg is not type(None)]
    if len(schemas) == 1:
        found = schemas[0]
    elif all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        names = sorted({schema["type"] for schema in schemas})
        found = {"type": names[0] if len(names) == 1 else names}
    else:
        found = {"anyOf": schemas}
    return {**found, "nullable": True} if type(None) in args else found
