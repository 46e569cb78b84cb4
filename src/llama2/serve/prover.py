"""Compiles constraints where a failure harms nobody: a process that forks a child for each, with bounds on it.

Run as a script of its own (proof.py starts it), it imports nothing of this package and no torch,
so that it is small and a fork of it is cheap. The child compiles with a stack, an address space and a time that are
smaller than what the server has: what passes here cannot end the server. Recursion inside the library on a hostile
grammar overflows the child's stack, and the answer is that the grammar cannot be used.

Frames in both directions are a length of four bytes and that many bytes of JSON.
"""

import json
import os
import resource
import struct
import sys
import threading
from typing import IO, Any

WALK = 24  # steps taken through the grammar after compiling: derivatives, too, recurse over what was compiled


class Tokens:
    """A vocabulary by the bytes of its tokens, as llguidance wants it; a text becomes the longest tokens that fit."""

    def __init__(self, tokens: list[bytes], special: list[int], eos: int, bos: int | None) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id, self.bos_token_id = tokens, special, eos, bos
        self._by_bytes = {token: i for i, token in enumerate(tokens) if token}
        self._longest = max(map(len, tokens), default=1)

    def __call__(self, text: bytes) -> list[int]:
        found, at = [], 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._by_bytes), 0)
            if not size:
                at += 1
                continue
            found.append(self._by_bytes[text[at : at + size]])
            at += size
        return found


def compile_source(library: Any, tokenizer: Any, bounds: dict[str, Any], kind: str, source: str, style: Any) -> Any:
    """A matcher of a constraint. Raises ValueError for what llguidance refuses.

    kind: "json", "regex" or "lark". bounds: keywords of LLParserLimits. style: how JSON is written.
    """
    matcher = library.LLMatcher
    if kind == "json":
        grammar = matcher.grammar_from_json_schema(source, overrides=style)
    elif kind == "regex":
        grammar = matcher.grammar_from_regex(source)
    else:
        grammar = matcher.grammar_from_lark(source)
    made = matcher(tokenizer, grammar, log_level=0, limits=library.LLParserLimits(**bounds))
    made.compute_bitmask()  # what is too much work for one step shows here, not in the middle of an answer
    if made.is_error():
        raise ValueError(made.get_error())
    return made


def write(file: IO[bytes], content: dict[str, Any]) -> None:
    """Writes one frame."""
    data = json.dumps(content).encode()
    file.write(struct.pack("<I", len(data)) + data)
    file.flush()


def read(file: IO[bytes]) -> dict[str, Any] | None:
    """Reads one frame; None at the end of the stream."""
    head = file.read(4)
    if len(head) < 4:
        return None
    size = struct.unpack("<I", head)[0]
    data = file.read(size)
    return None if len(data) < size else json.loads(data)


def _resident() -> int:
    """Bytes of this process's own memory that are in use; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/status", "rb") as file:
        rows = dict(line.split(b":") for line in file.read().splitlines() if line.count(b":") == 1)
    return int(rows[b"RssAnon"].split()[0]) * 1024


def _limit(limits: dict[str, Any]) -> None:
    """Bounds this process permanently: processor time, address space, no core file."""
    seconds = int(limits["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", "rb") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        most = mapped + 2 * limits["bytes"] + 3 * limits["stack"] + 2**26
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _try(library: Any, tokenizer: Any, hello: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    before, began = _resident(), resource.getrusage(resource.RUSAGE_SELF)
    arguments = hello["bounds"], request["kind"], request["source"], request["style"]
    try:
        made = compile_source(library, tokenizer, *arguments)
        copy = made.deep_copy()
        for step in range(WALK):
            mask = copy.compute_bitmask()
            at = [i for i, byte in enumerate(mask) if byte]
            if copy.is_error() or copy.is_stopped() or not at:
                break
            byte = mask[at[step * 7 % len(at)]]
            copy.consume_token(at[step * 7 % len(at)] * 8 + (byte & -byte).bit_length() - 1)
        held = _resident() - before
        del made, copy  # dropping what is nested recurses too
    except ValueError as error:
        return {"error": str(error)[:2000]}
    except MemoryError:
        return {"error": "it needs too much memory"}
    ended = resource.getrusage(resource.RUSAGE_SELF)
    seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    return {"bytes": max(held, 0), "seconds": seconds}


def _child(library: Any, tokenizer: Any, hello: dict[str, Any], request: dict[str, Any], pipe: int) -> None:
    """Compiles in a thread of a small stack and tells how that went; never returns."""
    try:
        _limit(hello["limits"])
        found: list[dict[str, Any]] = []
        threading.stack_size(hello["limits"]["stack"])
        thread = threading.Thread(target=lambda: found.append(_try(library, tokenizer, hello, request)))
        thread.start()
        thread.join()
        os.write(pipe, json.dumps(found[0] if found else {"error": "the library failed on it"}).encode())
    finally:
        os._exit(0)


def prove(library: Any, tokenizer: Any, hello: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Returns a child process's verdict on a constraint, or how it died."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        _child(library, tokenizer, hello, request, writing)
    os.close(writing)
    with open(reading, "rb") as file:
        data = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if data:
        found: dict[str, Any] = json.loads(data)
        return found
    return {"died": -status if status < 0 else 0}


def main() -> None:
    """Serves requests until the standard input ends."""
    import llguidance

    os.nice(10)  # the engine's threads come first: whoever waits for a constraint waits a little longer
    hello = read(sys.stdin.buffer)
    if hello is None:
        return
    tokens = Tokens([bytes.fromhex(token) for token in hello["tokens"]], hello["special"], hello["eos"][0], None)
    wrapper = llguidance.TokenizerWrapper(tokens)
    tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(tokens.tokens), eos_token=hello["eos"])
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what a dying child prints is no line of the server's log
    write(sys.stdout.buffer, {"ready": True})
    while (request := read(sys.stdin.buffer)) is not None:
        write(sys.stdout.buffer, prove(llguidance, tokenizer, hello, request))


if __name__ == "__main__":
    main()
