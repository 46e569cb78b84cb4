"""JSON of large answers: the bytes of JSONResponse, made in pieces."""

from typing import Any

import pytest
from starlette.responses import JSONResponse

from llama2.serve.json_response import PIECE, answer, pieces

CONTENTS: list[Any] = [
    None,
    [],
    {},
    "é\u2028",
    [1.5, True, None],
    [[]],
    [{}],
    {"a": {"b": [[1, 2], [3]], "c": []}, "d": "x"},
    list(range(PIECE)),
    list(range(PIECE + 1)),
    [{"id": i, "text": "\N{GRINNING FACE}", "start": i, "stop": i + 1} for i in range(1000)],
    {"data": [{"embedding": [i / 7 for i in range(600)], "index": 0}], "object": "list"},
]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_bytes_are_those_of_starlette(content: Any) -> None:
    response = answer(lambda: content)
    assert response.body == JSONResponse(content).body
    assert response.headers["content-type"] == "application/json"


def test_no_piece_holds_more_than_its_items() -> None:
    found = list(pieces({"data": [{"embedding": [0.5] * 5000}]}))
    assert max(map(len, found)) <= PIECE * 4


def test_numbers_that_json_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        answer(lambda: [float("nan")])
