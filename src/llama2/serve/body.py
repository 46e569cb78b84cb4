"""From the bytes of a body to a checked model, or a refusal that names the field, the value and the bound."""

import difflib
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama2.serve.refusal import Refusal

MAX_DEPTH = 64  # of JSON: no schema or message needs more, and nothing behind this bound recurses further
Text = Annotated[str, Field(max_length=4_000_000)]
M = TypeVar("M", bound="Body")


class Body(BaseModel):
    """Base of every request body: JSON types as they are, finite numbers, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def read(model: type[M], data: bytes, unknown: str = "refuse") -> M:
    """The body as a model. unknown: whether unknown fields are to "refuse" or to "ignore".

    Raises Refusal: "malformed" for what is not JSON, "validation" for a field that is wrong.
    """
    check_depth(data)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        if unknown == "ignore" and all(p["type"] == "extra_forbidden" for p in problems):
            return model.model_validate_json(data, extra="ignore")
        raise _refusal(model, problems[0]) from None


def check_depth(data: bytes) -> None:
    """Raises Refusal for brackets nested deeper than MAX_DEPTH; text in strings counts for nothing."""
    depth, at, end = 0, 0, len(data)
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    while at < end:
        byte = data[at]
        if byte == 0x22:  # a string: to its closing quote
            at = _closing_quote(data, at + 1)
        elif byte in (0x5B, 0x7B):
            depth += 1
            if depth > MAX_DEPTH:
                raise Refusal("malformed", f"the JSON is nested deeper than {MAX_DEPTH} levels; flatten it")
        elif byte in (0x5D, 0x7D):
            depth -= 1
        at += 1


def _closing_quote(data: bytes, at: int) -> int:
    while True:
        at = data.find(b'"', at)
        if at < 0:
            return len(data)
        slashes = at - 1
        while data[slashes] == 0x5C:
            slashes -= 1
        if (at - 1 - slashes) % 2 == 0:
            return at
        at += 1


def _refusal(model: type[BaseModel], problem: Any) -> Refusal:
    if problem["type"] == "json_invalid":
        return Refusal("malformed", f"the body is not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}")
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), list(model.model_fields), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return Refusal("validation", f"the field {where!r} is not known here{hint}", where)
    if problem["type"] == "missing":
        return Refusal("validation", f"the field {where!r} is missing", where)
    value = repr(problem["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    message = problem["msg"].removeprefix("Value error, ")
    return Refusal("validation", f"{where or 'the body'} is {value}: {message}", where or None)
