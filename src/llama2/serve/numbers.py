"""Every number that a request may hold, with its bounds: the one table of them. docs/security.md has the reasons.

What is outside is refused with the field, the value and the bound before anything is computed with it. Lists end their
check at the first entry that is wrong: a body of a million wrong entries makes one error and not a million.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema

MAX_COUNT = 10_000_000
FIRST_FAULT = Field(fail_fast=True)  # of a list: the rest is not looked at

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]  # tokens
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]  # the vocabulary bounds it further
Answers = Annotated[int, Field(ge=1, le=1024)]  # max_best_of bounds it further
Tops = Annotated[int, Field(ge=0, le=20)]  # likeliest tokens that are told
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
UnsignedSeed = Annotated[int, Field(ge=0, lt=2**64)]
Temperature = Annotated[float, Field(ge=0, le=100)]
# Below 1e-5 the logits over the temperature leave float32, and every draw is the likeliest token long before.
PositiveTemperature = Annotated[float, Field(ge=1e-5, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]  # of probability
PositiveShare = Annotated[float, Field(gt=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]  # multiplies logits in one direction or the other
CountPenalty = Annotated[float, Field(ge=-2, le=2)]  # OpenAI's bounds
MAX_BIAS = 100.0  # OpenAI's
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Dimensions = Annotated[int, Field(ge=1, le=1_000_000)]

Ids = Annotated[list[TokenId], FIRST_FAULT, Field(max_length=1_000_000)]
StopIds = Annotated[list[TokenId], FIRST_FAULT, Field(max_length=1024)]


def _biases(given: dict[str, Any]) -> dict[str, float]:
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ValueError(f"it has the key {key[:40]!r}; keys are token ids")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"the bias of {key} is {str(value)[:40]!r}; give a number")
        if not -MAX_BIAS <= value <= MAX_BIAS:
            raise ValueError(f"the bias of {key} is outside of {-MAX_BIAS:g} to {MAX_BIAS:g}")
    return given


_BIASES_SCHEMA: dict[str, Any] = {
    "type": "object",
    "maxProperties": 200_000,
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
}
Biases = Annotated[dict[str, Any], Field(max_length=200_000), AfterValidator(_biases), WithJsonSchema(_BIASES_SCHEMA)]
