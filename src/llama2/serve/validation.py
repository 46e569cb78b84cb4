"""From the bytes of a body to a checked model, or a refusal that names the field, the value and the bound."""

import difflib
import re
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from llama2.serve.errors import Refusal

MAX_DEPTH = 64  # of JSON: no schema or message needs more, and nothing behind this bound recurses further
Text = Annotated[str, Field(max_length=4_000_000)]
_STRUCTURE = re.compile(rb'["\[\]{}]')
Texts = Annotated[list[Text], Field(fail_fast=True)]
M = TypeVar("M", bound="Body")


def _closed(schema: dict[str, Any], model: type["Body"]) -> None:
    if not model.open_ended:
        schema["additionalProperties"] = False


class Body(BaseModel):
    """Base of every request body: JSON types as they are, finite numbers, no unknown fields but where open_ended.

    Unknown fields are taken in and then refused, the first of them only: a million would make a million errors.
    """

    open_ended: ClassVar[bool] = False
    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=(), json_schema_extra=_closed
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.model_extra and not self.open_ended:
            names = [field.alias or name for name, field in type(self).model_fields.items()]
            raise PydanticCustomError("unknown", "unknown", {"field": next(iter(self.model_extra)), "names": names})
        return self


def read(model: type[M], data: bytes, unknown: str = "refuse") -> M:
    """The body as a model. unknown: whether unknown fields are to "refuse" or to "ignore".

    Raises Refusal: "malformed" for what is not JSON, "validation" for a field that is wrong.
    """
    check_depth(data)
    try:
        return model.model_validate_json(data, extra="ignore" if unknown == "ignore" else None)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def check_depth(data: bytes) -> None:
    """Raises Refusal for brackets nested deeper than MAX_DEPTH; text in strings counts for nothing."""
    depth = at = 0
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    while (found := _STRUCTURE.search(data, at)) is not None:
        at = found.start()
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


def _refusal(problem: Any) -> Refusal:
    if problem["type"] == "json_invalid":
        return Refusal("malformed", f"the body is not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}")
    where = ".".join(str(part) for part in problem["loc"])[:200]
    if problem["type"] == "unknown":
        name = str(problem["ctx"]["field"])[:80]
        where = f"{where}.{name}" if where else name
        near = difflib.get_close_matches(name, problem["ctx"]["names"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return Refusal("validation", f"the field {where!r} is not known here{hint}", where)
    if problem["type"] == "missing":
        return Refusal("validation", f"the field {where!r} is missing", where)
    value = repr(problem["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    message = problem["msg"].removeprefix("Value error, ")
    return Refusal("validation", f"{where or 'the body'} is {value}: {message}", where or None)
