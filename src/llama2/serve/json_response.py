"""Large answers: made into JSON beside the event loop, and piece by piece.

Python's encoder keeps the interpreter's lock until it is done: a list of a hundred thousand tokens would hold up every
stream for a tenth of a second. Between two pieces the lock is released.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from starlette.responses import Response

PIECE = 256  # items of a list that are encoded at once: about a millisecond


def pieces(content: Any) -> Iterator[str]:
    """The JSON of a content, as Starlette's JSONResponse has it."""
    if isinstance(content, dict):
        yield "{"
        for i, (key, value) in enumerate(content.items()):
            yield f"{',' if i else ''}{_encode(str(key))}:"
            yield from pieces(value)
        yield "}"
    elif isinstance(content, list) and len(content) > PIECE:
        for at in range(0, len(content), PIECE):
            yield f"{',' if at else '['}{_encode(content[at : at + PIECE])[1:-1]}"
        yield "]"
    elif isinstance(content, list) and any(isinstance(item, (dict, list)) for item in content):
        for i, item in enumerate(content):
            yield "," if i else "["
            yield from pieces(item)
        yield "]"
    else:
        yield _encode(content)


def answer(task: Callable[..., Any], *args: Any) -> Response:
    """Returns a task's result as a response; for the threads beside the event loop."""
    body = "".join(pieces(task(*args))).encode()
    return Response(body, media_type="application/json")


def _encode(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
