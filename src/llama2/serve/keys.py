"""API keys: several, from options and from a file that may change while the server runs; compared in constant time."""

import hashlib
import hmac
import time
from collections.abc import Sequence
from pathlib import Path

from llama2.errors import InputError

_LOOK_AGAIN = 1.0  # seconds


class Keys:
    """Which keys open the server. A file has one key a line, `name:key` or the key alone; # begins a comment."""

    def __init__(self, given: Sequence[str] = (), file: Path | None = None) -> None:
        """Raises InputError for keys that are empty, OSError for a file that cannot be read."""
        self._given, self._file = [_digest(f"key {i}", key) for i, key in enumerate(given)], file
        self._from_file: list[tuple[str, bytes]] = []
        self._stamp, self._looked = (0, 0), 0.0
        if file is not None:
            self._read(file)

    @property
    def wanted(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._given) or self._file is not None

    def owner(self, header: str | None) -> str | None:
        """The name of the key in an Authorization header, or None where it opens nothing."""
        self._refresh()
        scheme, _, key = (header or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, known in (*self._given, *self._from_file):  # all of them: the time tells nothing
            if hmac.compare_digest(digest, known) and scheme.lower() == "bearer":
                found = name
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < _LOOK_AGAIN:
            return
        self._looked = now
        try:
            stat = self._file.stat()
            if (stat.st_mtime_ns, stat.st_size) != self._stamp:
                self._read(self._file)
        except (OSError, InputError):
            return  # the file is just being replaced, or is wrong: the keys that were good stay good

    def _read(self, file: Path) -> None:
        stat = file.stat()
        lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
        found = []
        for i, line in enumerate(lines):
            if line:
                name, colon, key = line.partition(":")
                found.append(_digest(name.strip(), key) if colon else _digest(f"line {i + 1}", line))
        if not found:
            raise InputError(f"{file} holds no key; write one a line, or leave the option out")
        self._from_file, self._stamp = found, (stat.st_mtime_ns, stat.st_size)


def _digest(name: str, key: str) -> tuple[str, bytes]:
    if not key.strip():
        raise InputError("an API key is empty; give at least one character, better 32 random ones")
    return name, hashlib.sha256(key.strip().encode()).digest()
