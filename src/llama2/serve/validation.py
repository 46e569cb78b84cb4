"""From the bytes of a body to a checked model, or a refusal that names the field, the value and the bound."""

import difflib
import json
import pickle
import re
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from llama2.serve.errors import Refusal
from llama2.serve.known_fields import trouble

MAX_WARNINGS = 16
LOOKED_AT = 64  # unknown fields; the others are counted in one warning, and dropped
MAX_DEPTH = 64  # of JSON: no schema or message needs more, and nothing behind this bound recurses further
Text = Annotated[str, Field(max_length=4_000_000)]
MAX_VALUES = 300_000  # of JSON: the ids of 32 prompts of 8,192 fit
MAX_CONTAINERS = 32_768  # lists and objects: each is made, and made again from what another process has read
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"')
_STRUCTURE = re.compile(rb'["\[\]{}]')
Texts = Annotated[list[Text], Field(fail_fast=True)]
PACKED = 4_096  # bytes of a pickled field, from which on it stays pickled
_PACKED = " packed"  # no name of a field
M = TypeVar("M", bound="Body")


def _closed(schema: dict[str, Any], model: type["Body"]) -> None:
    if not model.open_ended:
        schema["additionalProperties"] = False


class Body(BaseModel):
    """Base of every request body: JSON types as they are, finite numbers, and fields that are not known told of.

    Unknown fields are taken in and then looked at, a few of them only: a million would make a million words.
    """

    open_ended: ClassVar[bool] = False
    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=(), json_schema_extra=_closed
    )

    if not TYPE_CHECKING:  # it would give every misspelt field a type

        def __getattr__(self, name: str) -> Any:
            """A field that is still pickled, see `_lightened`; it stays unpickled from then on."""
            packed = vars(self).get(_PACKED, {})
            if name not in packed:
                return super().__getattr__(name)
            value = vars(self)[name] = pickle.loads(packed[name])
            return value

    @property
    def asked_model(self) -> str | None:
        """The name of the model that it asks for; None for whichever is served."""
        name = getattr(self, "model", None)
        return name if isinstance(name, str) else None

    @property
    def needs_model(self) -> bool:
        """Whether the model has to be there for it."""
        return True

    @model_validator(mode="after")
    def _known(self, info: ValidationInfo) -> Self:
        if not self.model_extra or self.open_ended:
            return self
        names = [field.alias or name for name, field in type(self).model_fields.items()]
        told: list[str] | None = (info.context or {}).get("warnings")
        if told is not None and (beyond := list(islice(self.model_extra, LOOKED_AT, None))):
            told.append(f"{len(beyond)} more fields that are not known here are ignored; {LOOKED_AT} are looked at")
            for name in beyond:  # they would travel between processes
                del self.model_extra[name]
        for name, value in self.model_extra.items():
            problem = trouble(name, value)
            if problem is None:
                continue
            if told is None:
                context = {"field": name, "names": names, "problem": problem}
                raise PydanticCustomError("unknown", "unknown", context)
            if problem == "unknown":
                problem = f"the field {name[:80]!r} is not known here{_near(name, names)}"
            if len(told) < MAX_WARNINGS and f"{problem}; it is ignored" not in told:
                told.append(f"{problem}; it is ignored")
        return self


def read(model: type[M], data: bytes, unknown: str = "refuse", warnings: list[str] | None = None) -> M:
    """The body as a model. unknown: whether unknown fields are to "refuse", to "ignore" or to "warn" of in `warnings`.

    Raises Refusal: "malformed" for what is not JSON, "validation" for a field that is wrong.
    """
    check_depth(data)
    check_values(data)
    told = None if unknown == "refuse" else warnings if unknown == "warn" and warnings is not None else []
    try:
        return model.model_validate_json(data, context={"warnings": told})
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def read_apart(model: type[M], data: bytes, unknown: str) -> tuple[M, list[str]]:
    """As `read`, and the warnings; for another process, whose lists nobody here sees."""
    warnings: list[str] = []
    return _lightened(read(model, data, unknown, warnings)), warnings


def _lightened(body: M) -> M:
    """The body with its large lists and objects pickled, until somebody asks for them (`Body.__getattr__`): made again,
    they would hold up the process that only sends them on."""
    fields = vars(body)
    for name, value in tuple(fields.items()):
        if isinstance(value, (list, dict)) and len(data := pickle.dumps(value, pickle.HIGHEST_PROTOCOL)) > PACKED:
            fields.setdefault(_PACKED, {})[name] = data
            del fields[name]
    return body


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name[:80], names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_values(data: bytes) -> None:
    """Raises Refusal for too many values, lists and objects; text in strings counts for nothing."""
    values, containers = data.count(b",") + 1, _opened(data)
    if values <= MAX_VALUES and containers <= MAX_CONTAINERS:
        return
    outside = _STRING.sub(b"", data)
    values, containers = outside.count(b",") + 1, _opened(outside)
    if values > MAX_VALUES:
        raise Refusal("malformed", f"the JSON holds {values} values; {MAX_VALUES} are the most, so send less at once")
    if containers > MAX_CONTAINERS:
        raise Refusal(
            "malformed",
            f"the JSON holds {containers} lists and objects; {MAX_CONTAINERS} are the most, so send less at once",
        )


def _opened(data: bytes) -> int:
    return data.count(b"[") + data.count(b"{")


def names(data: bytes) -> frozenset[str]:
    """The names of a body's fields. Raises Refusal for what is no JSON object."""
    check_depth(data)
    check_values(data)
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise Refusal("malformed", "the body is not JSON") from None
    if not isinstance(content, dict):
        raise Refusal("validation", "the body is no object; send {...}")
    return frozenset(content)


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
    parts = takewhile(
        lambda part: not re.search(r"[\[(]", str(part)), problem["loc"]
    )  # behind them: pydantic's own types
    where = ".".join(map(str, parts))[:200]
    if problem["type"] == "unknown":
        name = str(problem["ctx"]["field"])[:80]
        where = f"{where}.{name}" if where else name
        if problem["ctx"]["problem"] != "unknown":
            return Refusal("validation", f"{problem['ctx']['problem']}; leave it out", where)
        return Refusal(
            "validation", f"the field {where!r} is not known here{_near(name, problem['ctx']['names'])}", where
        )
    if problem["type"] == "missing":
        return Refusal("validation", f"the field {where!r} is missing", where)
    value = repr(problem["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    message = problem["msg"].removeprefix("Value error, ")
    return Refusal("validation", f"{where or 'the body'} is {value}: {message}", where or None)
