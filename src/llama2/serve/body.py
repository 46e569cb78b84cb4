"""From the bytes of a body to a checked model, or a refusal that names the field, the value and the bound."""

import difflib
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from llama2.serve.refusal import Refusal
from llama2.text_file import MAX_DEPTH, nested_deeper

Text = Annotated[str, Field(max_length=4_000_000)]
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
    if nested_deeper(data, MAX_DEPTH):
        raise Refusal("malformed", f"the JSON is nested deeper than {MAX_DEPTH} levels; flatten it")


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
