"""A server of canned answers for the chat page: its files with their real headers, a stream that the test controls."""

import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llama2.serve.static import asset

GATE = "\0gate\0"  # where in an answer the stream waits for `gate`
BREAK = "\0break\0"  # where the connection is cut
ERROR = "\0error\0"  # where an error event takes the place of the rest


class ChatServer:
    """`answers` maps the user's last text to the answer; others are echoed. `failures` come first, one per request."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.failures: list[tuple[int, dict[str, Any], dict[str, str]]] = []
        self.models = ["tiny/llama-2"]
        self.key: str | None = None
        self.pace = 0.0  # seconds between tokens
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.gate = threading.Event()
        self.gone = threading.Event()  # a client left while its answer waited at the gate

    def __enter__(self) -> "ChatServer":
        chat = self

        class Bound(Handler):
            server_state = chat

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/ui/"
        return self

    def __exit__(self, *exc: object) -> None:
        self.gate.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def answer(self, body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        return self.answers.get(text, f"You said: {text}")


class Handler(BaseHTTPRequestHandler):
    server_state: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.reply(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def allowed(self) -> bool:
        key = self.server_state.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        error = {"message": "Wrong API key", "type": "authentication_error", "code": "invalid_api_key"}
        self.json(401, {"error": error})
        return False

    def do_GET(self) -> None:
        self.server_state.paths.append(self.path)
        if self.path.startswith("/ui/"):
            found = asset(self.path.removeprefix("/ui/").split("?")[0])
            if found is None:
                self.reply(404, b"", {})
            elif found.fresh(self.headers.get("If-None-Match")):
                self.reply(304, b"", found.headers)
            else:
                self.reply(200, found.body, found.headers)
        elif self.path == "/v1/models":
            if self.allowed():
                rows = [
                    {"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in self.server_state.models
                ]
                self.json(200, {"object": "list", "data": rows})
        elif self.path == "/info":
            self.json(200, {"model_id": self.server_state.models[0], "max_total_tokens": 4096})
        else:
            self.json(404, {"error": {"message": "Not found"}})

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        state.requests.append(body)
        if state.failures:
            self.json(*state.failures.pop(0))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for data in self.chunks(body):
                self.wfile.write(data)
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            state.gone.set()

    def chunks(self, body: dict[str, Any]) -> Iterator[bytes]:
        state, tokens = self.server_state, 0
        yield event(choice({"role": "assistant", "content": ""}))
        for piece in re.findall(r"\0\w+\0|\s*[^\s\0]+|\s+", state.answer(body)):
            if piece == GATE:
                while not state.gate.wait(0.02):
                    yield b": ping\n\n"
            elif piece == BREAK:
                return
            elif piece == ERROR:
                yield event({"error": {"message": "The engine failed", "type": "server_error", "code": None}})
                return
            else:
                if state.pace:
                    threading.Event().wait(state.pace)
                tokens += 1
                yield event(
                    choice({"content": piece}, logprobs=logprobs(piece, tokens) if body.get("logprobs") else None)
                )
        yield event(choice({}, finish="stop"))
        usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
        yield event({"object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def choice(delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None) -> dict[str, Any]:
    row = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [row]}


def logprobs(token: str, index: int) -> dict[str, Any]:
    """Probabilities 0.9, 0.5, 0.2, 0.05 in turn, with two alternatives that share most of the rest."""
    share = (0.9, 0.5, 0.2, 0.05)[index % 4]
    rows = sorted(
        [(token, share), (" other", (1 - share) * 0.6), (" third", (1 - share) * 0.3)], key=lambda row: -row[1]
    )
    top = [{"token": text, "logprob": math.log(p), "bytes": list(text.encode())} for text, p in rows]
    return {
        "content": [{"token": token, "logprob": math.log(share), "bytes": list(token.encode()), "top_logprobs": top}]
    }
