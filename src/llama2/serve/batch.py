"""A file of requests answered line by line, through the same routes as over HTTP, without a socket.

A line is OpenAI's batch shape, {"custom_id", "url", "body"}, or a body alone (`messages`, `prompt` or `inputs`), whose
id is then "line-N". Answers are appended as they come, each line whole and synced before it counts; what is in the
output already is not asked again.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from starlette.types import ASGIApp, Message

from llama2.errors import CheckpointError, InputError
from llama2.files import sync

ROUTES = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "inputs": "/generate"}
_BEGIN = b'{"custom_id": "'  # of every line of the output
URLS = (*ROUTES.values(), "/v1/embeddings")


@dataclass(frozen=True)
class Line:
    """One request of the file."""

    id: str
    url: str
    body: dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The requests of a file. Raises InputError for a line that is none and for ids that are there twice."""
    found, seen = [], set[str]()
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            line = _line(text, number, path)
            if line.id in seen:
                raise InputError(f"{path}:{number}: custom_id {line.id!r} is there twice; give each line its own")
            seen.add(line.id)
            found.append(line)
    return found


def _line(text: str, number: int, path: Path) -> Line:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}:{number}: the line is not a JSON object")
    body = content.get("body", content)
    if not isinstance(body, dict):
        raise InputError(f"{path}:{number}: body is not a JSON object")
    name = next((name for name in ROUTES if name in body), None)
    url = content.get("url") if "body" in content else None
    url = url or (ROUTES[name] if name else None)
    if url not in URLS:
        raise InputError(
            f"{path}:{number}: the line is for {url!r}; it needs messages, prompt or inputs, or a url among "
            f"{', '.join(URLS)}"
        )
    if body.get("stream"):
        raise InputError(f"{path}:{number}: stream is true; a file has whole answers only")
    own = {k: v for k, v in body.items() if not (body is content and k in ("custom_id", "method", "url"))}
    return Line(str(content.get("custom_id", f"line-{number}")), url, own)


def answered(path: Path) -> tuple[set[str], int]:
    """Ids whose answers a file holds, and the bytes of its whole lines: the last may have been cut off in writing.

    Nothing is changed. Raises CheckpointError for anything that `llama2 batch` has not written.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    found = set()
    for number, text in enumerate(content[:whole].splitlines(), 1):
        try:
            line = json.loads(text)
            found.add(str(line["custom_id"]))
            ours = "response" in line and "error" in line
        except (ValueError, KeyError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise _foreign(f"{path}:{number}")
    cut = content[whole:]
    if cut[: len(_BEGIN)] != _BEGIN[: len(cut)]:
        raise _foreign(f"{path}: its end, without a line feed,")
    return found, whole


def _foreign(place: str) -> CheckpointError:
    return CheckpointError(
        f"{place} is no answer of `llama2 batch`; give another output file, or --overwrite to lose what is there"
    )


async def answer(app: ASGIApp, line: Line) -> dict[str, Any]:
    """One answer, in the shape of OpenAI's batch output."""
    data = json.dumps(line.body).encode()
    sent, parts, status = False, [], 0
    forever = asyncio.Event()

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await forever.wait()
        sent = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": line.url, "raw_path": line.url.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("batch", 0), "server": ("batch", 0), "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    body = json.loads(b"".join(parts))
    error = None if status < 400 else body.get("error", body)
    return {"custom_id": line.id, "response": {"status_code": status, "body": body}, "error": error}


def written(result: dict[str, Any]) -> str:
    """One line of the output; half a surrogate pair, which no encoding takes, stays the escape that it was."""
    text = json.dumps(result, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(result)
    return text


async def run(
    app: ASGIApp, lines: list[Line], out: IO[bytes], at_once: int, progress: Callable[[int, int], None]
) -> tuple[int, int]:
    """Answers all lines, `at_once` at a time, and appends them to `out`; (answered, of these refused)."""
    pending: set[asyncio.Task[dict[str, Any]]] = set()
    rest: Iterator[Line] = iter(lines)
    done = refused = 0
    try:
        while True:
            while len(pending) < at_once and (line := next(rest, None)) is not None:
                pending.add(asyncio.create_task(answer(app, line)))
            if not pending:
                return done, refused
            finished, pending = await asyncio.wait(pending, return_when="FIRST_COMPLETED")
            for task in finished:
                result = task.result()
                out.write((written(result) + "\n").encode())
                done, refused = done + 1, refused + (result["error"] is not None)
            sync(out)
            progress(done, len(lines))
    finally:
        for task in pending:
            task.cancel()
