"""Every number that a request may hold, with its bounds: the one table of them. docs/security.md has the reasons.

What is outside is refused with the field, the value and the bound before anything is computed with it. Lists end their
check at the first entry that is wrong: a body of a million wrong entries makes one error and not a million.
"""

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema

MAX_COUNT = 10_000_000
YEAR = 31_536_000  # seconds
FIRST_FAULT = Field(fail_fast=True)  # of a list: the rest is not looked at

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]  # tokens
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]  # the vocabulary bounds it further
Answers = Annotated[int, Field(ge=1, le=1024)]  # max_best_of bounds it further
Tops = Annotated[int, Field(ge=0, le=20)]  # likeliest tokens that are told
MaxTokens = Annotated[int, Field(ge=-2, le=2**53)]  # below 0: what the context holds
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
UnsignedSeed = Annotated[int, Field(ge=-1, lt=2**64)]  # -1: a new one
# Seconds, or a duration such as 5m.
_Seconds = Annotated[float, Field(ge=-1e12, le=1e12)]  # below 0: without end
KeepAlive = Annotated[
    _Seconds | str, Field(union_mode="left_to_right"), AfterValidator(lambda value: keep_alive(value))
]
MaxNew = Annotated[int, Field(ge=-2, le=MAX_COUNT)]  # llama.cpp's: below 0 for as many as there is room for
Temperature = Annotated[float, Field(ge=0, le=100)]
# Below 1e-5 the logits over the temperature leave float32, and every draw is the likeliest token long before.
PositiveTemperature = Annotated[float, Field(ge=1e-5, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]  # of probability
PositiveShare = Annotated[float, Field(gt=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]  # multiplies logits in one direction or the other
CountPenalty = Annotated[float, Field(ge=-2, le=2)]  # OpenAI's bounds
MAX_BIAS = 100.0  # OpenAI's
Bias = Annotated[float, AfterValidator(lambda value: clamped(value))]
Dimensions = Annotated[int, Field(ge=1, le=1_000_000)]

Ids = Annotated[list[TokenId], FIRST_FAULT, Field(max_length=1_000_000)]
LastN = Annotated[int, Field(ge=-1, le=MAX_COUNT)]  # tokens at the end of a text; -1 for all of it
Names = Annotated[list[Annotated[str, Field(max_length=64)]], FIRST_FAULT, Field(max_length=64)]
StopIds = Annotated[list[TokenId], FIRST_FAULT, Field(max_length=1024)]


_DURATION = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|ms|s|m|h)", re.ASCII)
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_alive(given: float | str) -> float | str:
    """Raises ValueError for what is no duration."""
    seconds(given)
    return given


def seconds(given: float | str) -> float:
    """A duration as Ollama takes it: a number of seconds, or Go's 5m, 1h30m, 300ms; below 0 for ever.

    Raises ValueError for anything else, and for what is neither at most a year nor for ever.
    """
    if isinstance(given, str):
        text = given.strip()
        sign, body = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
        parts = _DURATION.findall(body)
        if body and body.replace(".", "", 1).isdecimal():
            total = float(body)
        elif not parts or "".join(parts) != body:
            raise ValueError(f"it is {given[:40]!r}; give seconds, or a duration such as 5m or 1h30m, or -1 for ever")
        else:
            total = sum(float(part.rstrip("nuµmsh")) * _UNITS[part.lstrip("0123456789.")] for part in parts)
        value = sign * total
    else:
        value = float(given)
    if value < 0:
        return math.inf
    if not value <= YEAR:
        raise ValueError(f"it is {str(given)[:40]}; {YEAR} seconds are the most, or -1 for ever")
    return value


def clamped(bias: Any) -> float:
    """A bias within OpenAI's bounds, behind which it decides alone. Raises ValueError for what is no finite number."""
    if bias is False:  # llama.cpp's way to forbid
        return -MAX_BIAS
    if isinstance(bias, bool) or not isinstance(bias, int | float) or bias != bias or bias in (math.inf, -math.inf):
        raise ValueError(f"a bias is {str(bias)[:40]!r}; give a finite number")
    return float(min(max(bias, -MAX_BIAS), MAX_BIAS))


def _biases(given: dict[str, Any]) -> dict[str, float]:
    for key in given:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ValueError(f"it has the key {key[:40]!r}; keys are token ids")
    return {key: clamped(value) for key, value in given.items()}


def _pairs(given: list[Any]) -> list[tuple[int | str, float]]:
    found = []
    for pair in given:
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (int, str)):
            raise ValueError(f"it has the entry {str(pair)[:40]}; give [token id or text, bias]")
        found.append((pair[0], clamped(pair[1])))
    return found


_BIASES_SCHEMA: dict[str, Any] = {
    "type": "object",
    "maxProperties": 200_000,
    "additionalProperties": {"type": "number"},
}
Biases = Annotated[dict[str, Any], Field(max_length=200_000), AfterValidator(_biases), WithJsonSchema(_BIASES_SCHEMA)]
Pairs = Annotated[list[Any], Field(max_length=200_000), AfterValidator(_pairs)]
