"""Plain HTTP for tests of the server: what goes over the wire, with nothing in between."""

import http.client
import json
import socket
from typing import Any


class Reply:
    """Status, headers and body of a response."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers = response.status, response.headers
        self.content = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def events(self) -> list[Any]:
        """The data of its server-sent events; [DONE] as a string."""
        found = []
        for block in self.content.decode().split("\n\n"):
            if block.startswith("event: "):
                name, _, block = block.partition("\n")
                assert name.removeprefix("event: ") == json.loads(block.removeprefix("data: "))["type"]
            if block.startswith("data: "):
                text = block.removeprefix("data: ")
                found.append(text if text == "[DONE]" else json.loads(text))
            else:
                assert block == "" or block.startswith(":"), block
        return found


def call(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
    """One request; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
        return Reply(connection.getresponse())
    finally:
        connection.close()


def post(port: int, path: str, body: Any, **headers: str) -> Reply:
    return call(port, "POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})


def get(port: int, path: str, **headers: str) -> Reply:
    return call(port, "GET", path, None, {name.replace("_", "-"): value for name, value in headers.items()})


def rest(sock: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    try:
        while part := sock.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    sock.close()
    return found


def begin(port: int, path: str, body: Any, size: int = 65536, **headers: str) -> socket.socket:
    """Sends a request and gives the open socket, with a receive buffer of `size` bytes."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", port))
    data = json.dumps(body).encode()
    kind = "\r\n".join(("content-type: application/json", *(f"{name}: {value}" for name, value in headers.items())))
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{kind}\r\ncontent-length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock
