"""Patterns of a tokenizer.json that nobody knows are tried on a text before it is encoded.

The `tokenizers` package cuts texts with Oniguruma, which tries every way in which a pattern can match, ten million at
each character: minutes and hours in Rust, where nothing stops it. So a pattern that is neither one of those in use nor
so plain that it cannot try twice first runs in a process of its own (`trier.py`) with a deadline: a text that passes
there is encoded here, in about the same time, and one that does not is an error. So does a file whose normaliser has
such a pattern, which meets the file's own tokens when it is read.
"""

import json
import os
import re
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from llama2.errors import TokenizerError
from llama2.processes import end_process
from llama2.text_file import shown
from llama2.tokenizer import trier

SECONDS, CHARACTERS = 1.0, 100_000  # of processor time: for a call, and for so many characters as much again
PATIENCE = 30  # as many times that by the clock
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = frozenset({
    r"\A[ ▁]",  # ours, of legacy=False
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,  # Llama 3
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,  # Qwen 2
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_SLASHES}",  # Llama 4
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}{_SLASHES}",  # Mistral
})  # fmt: skip
_ATOM = re.compile(
    r"(?:\\[pP]\{\^?\w{1,40}\}|\\[dDsSwWrntvf]|\\[^\w\s]|\[\^?(?:\\[pP]\{\^?\w{1,40}\}|\\.|[^\[\]\\&])+\]"
    r"|[^\\\[\](){}*+?|^$])(\?|\+|\{[1-8](?:,[1-8])?\})?"
)


def unknown(*states: Any) -> list[str]:
    """The patterns in these parts of a tokenizer.json that are neither known nor plain."""
    return [source for state in states for source in _patterns(state) if source not in KNOWN and not _plain(source)]


def checked(data: bytes) -> bytes:
    """The content of a tokenizer.json, as it is to be read. What is no JSON is the reader's affair.

    Raises TokenizerError where a pattern of the normaliser takes too long on the file's own tokens."""
    try:
        if b"\\u00" not in data and not any(map(_foreign, _SOURCE.findall(data))):
            return data  # "Regex" itself may be written with escapes
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(document, dict) or not (patterns := unknown(document.get("normalizer"))):
        return data
    tried = json.dumps(document)  # of keys that are there twice, one
    with closing(Trial(tried, patterns)) as trial:
        trial([])
    return tried.encode()


def _foreign(source: bytes) -> bool:
    return bool(unknown({"Regex": json.loads(source)}))


_SOURCE = re.compile(rb'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")')


def _patterns(state: Any) -> Iterator[str]:
    if isinstance(state, dict):
        for key, value in state.items():
            if key == "Regex" and isinstance(value, str):
                yield value
            else:
                yield from _patterns(value)
    elif isinstance(state, list):
        for value in state:
            yield from _patterns(value)


def _plain(source: str) -> bool:
    """Whether a pattern reads no character more than a few times: branches of single characters, of which one may be
    missing and the last may be repeated, so that what was read is always taken."""
    at = 0
    while True:
        marks: list[str] = []
        while found := _ATOM.match(source, at):
            marks.append(found[1] or "")
            at = found.end()
        if not marks or sum(mark == "?" for mark in marks) > 1 or any(mark not in ("", "?") for mark in marks[:-1]):
            return False
        if at == len(source):
            return True
        if source[at] != "|":
            return False
        at += 1


class Trial:
    """The process for one backend, started anew where this is another process than the one that started it."""

    def __init__(self, document: str, patterns: Sequence[str], special: bool = False) -> None:
        """document: a tokenizer.json in one line. special: whether special tokens are text."""
        self._document, self._special = document, special
        self._patterns = shown(patterns[0])
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stop: weakref.finalize[[subprocess.Popen[str]], Trial] | None = None
        self._owner = 0

    def __call__(self, texts: Sequence[str]) -> None:
        """Raises TokenizerError for a text on which a pattern takes too long, or gives up."""
        seconds = SECONDS * (1 + sum(map(len, texts)) / CHARACTERS)
        with self._lock:
            said = self._ask({"seconds": seconds, "texts": list(texts)}, seconds)
        if said:
            raise TokenizerError(gave_up(said, self._patterns))
        if said is None:
            self.close()
            raise TokenizerError(
                f"a pattern of tokenizer.json, {self._patterns}, takes more than {seconds:.1f} s of processor time, or "
                f"more than {trier.MEMORY >> 20} MiB, on a text of {max(map(len, texts), default=0):,} characters; "
                "correct the file, or give shorter texts"
            )

    def _ask(self, request: dict[str, Any], seconds: float) -> str | None:
        """Asks the process; None if it ended, or took too long."""
        try:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(f"{json.dumps(request)}\n")
            process.stdin.flush()
            return self._answer(process, seconds)
        except BrokenPipeError:
            return None

    def _answer(self, process: subprocess.Popen[str], seconds: float) -> str | None:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], PATIENCE * seconds)[0]:
            return None
        line = process.stdout.readline()
        return line.strip() if line else None

    def _started(self) -> subprocess.Popen[str]:
        if self._stop is not None and self._owner != os.getpid():  # a fork of the one that started it
            self._stop.detach()
            self._process = self._stop = None
        if self._process is None:
            self._owner = os.getpid()
            command = [sys.executable, "-P", "-X", "utf8", str(Path(trier.__file__))]
            process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, encoding="utf-8")
            self._process, self._stop = process, weakref.finalize(self, end_process, process)
            assert process.stdin is not None
            seconds = SECONDS * (1 + len(self._document) / CHARACTERS / 10)
            process.stdin.write(f"{json.dumps({'seconds': seconds, 'special': self._special})}\n{self._document}\n")
            process.stdin.flush()
            if self._answer(process, seconds) is None:
                self.close()
                raise TokenizerError(
                    f"a pattern of tokenizer.json, {self._patterns}, takes more than {seconds:.1f} s of processor time "
                    "on the tokens of its file, or the process that tries it could not be started; correct the file"
                )
        return self._process

    def close(self) -> None:
        """Ends the process; the next call starts it anew."""
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def gave_up(said: str, patterns: str) -> str:
    """The sentence for what the Rust side panicked with."""
    return f"a pattern of tokenizer.json, {patterns}, cannot be used on this text: {shown(said)}; correct the file"


def is_panic(error: BaseException) -> bool:
    """Whether this came out of a panic of Rust, which is no Exception."""
    return not isinstance(error, Exception) and type(error).__name__ == "PanicException"
