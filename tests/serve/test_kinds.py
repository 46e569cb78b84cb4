"""Refusals take their kind from the type of an error, whatever its words are."""

import pytest

from llama2.errors import ContextLengthError, DeviceError, InputError, TokenizerError
from llama2.serve.errors import kind_of


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ContextLengthError("too long", 5, 4), "context"),
        (TokenizerError("no such piece"), "template"),
        (InputError("seed is -1, whatever tokens are"), "validation"),
        (DeviceError("no tokens here"), "validation"),
    ],
)
def test_kind_is_that_of_the_type(error: InputError, kind: str) -> None:
    assert kind_of(error) == kind
