"""API keys: several, from options and from a file that may change while the server runs; compared in constant time."""

import hashlib
import hmac
import time
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG

from llama2.errors import InputError
from llama2.serve.logs import logger

_LOOK_AGAIN = 1.0  # seconds
_MAX_FILE = 4_000_000  # bytes


class Keys:
    """Which keys open the server.

    A file has one key a line, as `KEY` or as `NAME: KEY`: a colon and white space end a name, and every other colon
    belongs to the key, as every # does but one that begins a line, which is a comment. A file that cannot be read, or
    has a line that is no key, opens nothing until it is right again: a removed key is revoked.
    """

    def __init__(self, given: Sequence[str] = (), file: Path | None = None) -> None:
        """Raises InputError for keys that are empty or malformed, OSError for a file that cannot be read."""
        self._given = [_digest(key, f"key {i + 1}") for i, key in enumerate(given)]
        self._file, self._from_file = file, list[bytes]()
        self._stamp, self._looked, self._trouble = (0, 0, 0), time.monotonic(), ""
        if file is not None:
            self._read(file)

    @property
    def wanted(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._given) or self._file is not None

    def owner(self, header: str | None) -> str | None:
        """Returns the owner of the key in an Authorization header, or None where it opens nothing.

        The owner is a digest of the key itself: what is kept for it is found by this key and no other, wherever in
        the file it stands.
        """
        self._refresh()
        scheme, _, key = (header or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in (*self._given, *self._from_file):  # all of them: the time tells nothing
            found |= hmac.compare_digest(digest, known)
        return digest.hex() if found and scheme.lower() == "bearer" else None

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < _LOOK_AGAIN:
            return
        self._looked = now
        try:
            if _stamp(self._file) != self._stamp or self._trouble:
                self._read(self._file)
        except (OSError, InputError, UnicodeDecodeError) as error:
            self._from_file = []
            if str(error) != self._trouble:
                self._trouble = str(error)
                logger.error("no key of the file is valid", extra={"fields": {"reason": self._trouble[:500]}})

    def _read(self, file: Path) -> None:
        stamp = _stamp(file)
        if stamp[1] > _MAX_FILE:
            raise InputError(f"{file} has {stamp[1]} bytes; {_MAX_FILE} are the most for a file of keys")
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        found = []
        for i, line in enumerate(lines):
            text = line.strip()
            if text and not text.startswith("#"):
                name, colon, key = text.partition(":")
                named = colon and key[:1].isspace() and key.strip() and not name.rstrip().count(" ")
                found.append(_digest(key if named else text, f"{file}:{i + 1}"))
                if colon and not named:
                    logger.warning(
                        "%s:%d: the colon belongs to the key; a name is `NAME: KEY`, with a space", file, i + 1
                    )
        if not found:
            raise InputError(f"{file} holds no key; write one per line, or leave the option out")
        self._from_file, self._stamp, self._trouble = found, stamp, ""


def _stamp(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    if not S_ISREG(stat.st_mode):
        raise InputError(f"{file} is no regular file; reading it could wait for ever")
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _digest(key: str, where: str) -> bytes:
    key = key.strip()
    if not key:
        raise InputError(f"{where}: an API key is empty; give at least one character, better 32 random ones")
    if not all("!" <= c <= "~" for c in key):  # without the key: it is a secret
        raise InputError(f"{where}: an API key has white space or a character that is not ASCII; write `NAME: KEY`")
    return hashlib.sha256(key.encode()).digest()
