"""Whether a constraint can be compiled without harm: asked of `prover.py`, a process of its own.

Bounds that need no library come first: characters, brackets, rules. Then a fork of the prover compiles it with less
stack, memory and time than the server has, and tells what it took. Only what it survives is compiled here.
"""

import re
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.errors import InputError
from llama2.processes import end_process
from llama2.serve import prover

MAX_SOURCE = 65_536  # characters of a schema, regular expression or grammar
MAX_NESTING = 128  # brackets inside brackets
MAX_RULES = 1_000  # rules and terminals of a grammar, or references of a schema
MAX_BYTES = 32 * 2**20  # of a compiled constraint
MAX_SECONDS = 1.0  # of processor time for compiling it
STACK = 2 * 2**20  # bytes of the prover's thread; threads of the server have four times as much
PATIENCE = 30.0  # seconds of the clock, behind which the prover is started anew
_RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_]\w*(?:\[[^\]\n]*\])?(?:\.-?\d+)?[ \t]*:", re.MULTILINE)
_NAMES = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar"}


@dataclass(frozen=True)
class Proof:
    """Cost of compiling a constraint: bytes retained, and seconds."""

    bytes: int
    seconds: float


def check_source(kind: str, source: str) -> None:
    """Raises InputError for a constraint that is too long, nested too deeply, or of too many rules."""
    name = _NAMES[kind]
    if len(source) > MAX_SOURCE:
        raise InputError(f"the {name} has {len(source)} characters; {MAX_SOURCE} are the most")
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{)\]}]", source):
        depth = depth + 1 if bracket in "([{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise InputError(f"the {name} nests {deepest} brackets; {MAX_NESTING} are the most, so flatten it")
    rules = len(_RULE.findall(source)) if kind == "lark" else 0
    references = source.count('"$ref"')
    for count, what in ((rules, "rules"), (references, "references")):
        if count > MAX_RULES:
            raise InputError(f"the {name} has {count} {what}; {MAX_RULES} are the most")


class Prover:
    """The process, started when it is first needed. Calls may come from any thread; one is answered at a time."""

    def __init__(self, library_bounds: dict[str, Any], pieces: Any, eos: list[int]) -> None:
        """library_bounds: keywords of LLParserLimits. pieces: the tokenizer's bytes."""
        self._bounds, self._pieces, self._eos = library_bounds, pieces, eos
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[[subprocess.Popen[bytes]], Prover] | None = None

    def __call__(self, kind: str, source: str, style: dict[str, Any]) -> Proof:
        """style: how JSON is written. Raises InputError for a constraint that cannot be used, with the reason."""
        check_source(kind, source)
        with self._lock:
            found = self._ask({"kind": kind, "source": source, "style": style})
        name = _NAMES[kind]
        if "error" in found:
            raise InputError(f"the {name} cannot be used: {' '.join(str(found['error']).split())[:300]}")
        if "died" in found:
            raise InputError(f"the {name} cannot be used: {_cause(found['died'])}")
        proof = Proof(found["bytes"], found["seconds"])
        if proof.seconds > MAX_SECONDS:
            raise InputError(f"the {name} takes longer than {MAX_SECONDS:g} s to compile; simplify it")
        if proof.bytes > MAX_BYTES:
            raise InputError(
                f"the {name} takes {proof.bytes // 2**20} MiB once compiled; {MAX_BYTES // 2**20} are the most"
            )
        return proof

    def close(self) -> None:
        """Ends the process; the next call starts it anew."""
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            prover.write(process.stdin, request)
            found = _answer(process)
        except OSError:
            found = None
        if found is None:
            self.close()
            return {"died": signal.SIGXCPU}
        return found

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        command = [sys.executable, "-P", str(Path(prover.__file__))]
        process = subprocess.Popen(command, stdin=-1, stdout=-1, process_group=0)
        self._process, self._stop = process, weakref.finalize(self, end_process, process)
        assert process.stdin is not None
        hello = {
            "bounds": self._bounds,
            "tokens": [piece.hex() for piece in self._pieces.tokens],
            "special": self._pieces.special_token_ids,
            "eos": self._eos,
            "limits": {"seconds": MAX_SECONDS, "bytes": MAX_BYTES, "stack": STACK},
        }
        prover.write(process.stdin, hello)
        if _answer(process) is None:
            self.close()
            raise InputError("the process that checks constraints could not be started; the server's log tells more")
        return process


def _answer(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """The next frame; None where the process ended or took too long."""
    assert process.stdout is not None
    end = time.monotonic() + PATIENCE
    if not select.select([process.stdout], [], [], max(end - time.monotonic(), 0))[0]:
        return None
    return prover.read(process.stdout)


def _cause(number: int) -> str:
    if number in (signal.SIGXCPU, signal.SIGKILL):
        return f"it takes longer than {MAX_SECONDS:g} s to compile; simplify it"
    return "it nests too deeply, or takes too much memory, to be compiled; simplify it"
