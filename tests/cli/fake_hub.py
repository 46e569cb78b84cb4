"""A Hugging Face hub on this machine: the routes that huggingface_hub asks for to list and fetch a repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """Serves `files` of one repository; `asked` are the paths of its requests, `wrong` files get other bytes."""

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo, self.files, self.asked = repo, files, list[str]()
        self.wrong: set[str] = set()
        self.cut: dict[str, int] = {}  # file -> bytes after which its first answer breaks off

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        hub = self.server
        path = self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if path.startswith(f"/api/models/{hub.repo}"):
            siblings = [
                {
                    "rfilename": name,
                    "size": len(data),
                    "blobId": "b" * 40,
                    "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130},
                }
                for name, data in hub.files.items()
            ]
            tree = [{"type": "file", "path": row["rfilename"], "size": row["size"], "oid": "b" * 40, "lfs": {
                "oid": row["lfs"]["sha256"], "size": row["size"], "pointerSize": 130}} for row in siblings]  # fmt: skip
            info = {"id": hub.repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._json(tree if "/tree/" in path else info, body)
            return
        for revision in ("main", COMMIT):
            start = f"/{hub.repo}/resolve/{revision}/"
            if path.startswith(start) and (name := path.removeprefix(start)) in hub.files:
                self._file(name, body)
                return
        self._json({"error": "Entry not found"}, body, 404)

    def _json(self, value: Any, body: bool, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _file(self, name: str, body: bool) -> None:
        hub = self.server
        data = hub.files[name]
        etag = hashlib.sha256(data).hexdigest()
        begin = 0
        if body and (wanted := self.headers.get("Range")):
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
        sent = (b"\0" * len(data) if name in hub.wrong else data)[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if body:
            self.wfile.write(sent[: hub.cut.pop(name, len(sent))])


@contextmanager
def fake_hub(repo: str, files: dict[str, bytes]) -> Iterator[FakeHub]:
    """A hub that answers while this lasts."""
    hub = FakeHub(repo, files)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
