"""One well-behaved client of the server among eight polite ones, and among eight attackers: time between its tokens.

    python bench/attack.py                 SmolLM2-135M, three rounds of 20 seconds in turns: alone, fair, attacked
    python bench/attack.py --rounds 1 --seconds 5

Fair: eight other keys stream one answer after another. Attacked: eight other keys send what the server bounds, each
key another kind and then the next: many sequences at once, grammars and patterns that explode, bodies of a million
faults, texts of megabytes to tokenise, bodies that stop half-way, answers that nobody reads, connections that say
nothing. Every attacker is a process of its own that runs only when nobody else wants the processor, as if it were
another machine's. Prints p50, p95 and p99 between tokens of the one client, and attacked over fair. The last line is
JSON.
"""

import argparse
import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from demo import default_model
from serve import ours, quantiles

OTHERS, GOOD = 8, "key-of-the-good-one"
CHAIN = "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1} "b"' for i in range(900)) + '\nr900: "x"\n'
REFERENCES = {
    "$ref": "#/$defs/d0",
    "$defs": {**{f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(900)}, "d900": {}},
}
FORMATS: tuple[tuple[str, Any], ...] = (
    ("grammar", CHAIN),
    ("regex", "(a{1000}){1000}"),
    ("regex", "a?" * 20_000),
    ("regex", "(" * 20_000 + "x" + ")" * 20_000),
    ("json", REFERENCES),
    ("grammar", "start: " + "(" * 500 + '"x"' + ")" * 500),
)
FAULTS = (
    ("/v1/completions", '{"prompt": "x", "stop": [' + "1," * 600_000 + "1]}"),
    ("/v1/chat/completions", '{"messages": [' + '{"role": 1},' * 120_000 + "1]}"),
    ("/v1/completions", '{"prompt": "x", ' + ", ".join(f'"f{i}": 1' for i in range(120_000)) + "}"),
    ("/tokenize", json.dumps({"inputs": "\N{GRINNING FACE}" * 450_000})),
    ("/tokenize", json.dumps({"inputs": "word " * 50_000})),
    ("/v1/completions", json.dumps({"prompt": "word " * 300_000})),
)


def post(port: int, path: str, body: str | bytes | dict[str, Any], key: str) -> int:
    """Sends a request, reads its answer, returns the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    data = json.dumps(body).encode() if isinstance(body, dict) else body.encode() if isinstance(body, str) else body
    connection.request("POST", path, data, {"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def half_sent(port: int, key: str, body: bytes, length: int, seconds: float) -> None:
    """Requests of which no more comes, or whose answers are not read."""
    head = (
        f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
    socks = []
    for _ in range(16):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        socks.append(sock)
        with suppress(OSError):
            sock.sendall(head.encode() + body)
    time.sleep(seconds)
    for sock in socks:
        sock.close()


def kinds(port: int, key: str) -> list[Callable[[int], Any]]:
    """One round of each attack, by the number of the round."""
    greedy = {"prompt": ["x"] * 32, "n": 8, "best_of": 8, "temperature": 1.0, "max_tokens": 200, "ignore_eos": True}
    text = json.dumps({"inputs": "x" * 200_000}).encode()

    def format_of(turn: int) -> int:
        kind, value = FORMATS[turn % len(FORMATS)]
        value = value if kind == "json" else value + " " * turn  # another one each time
        return post(port, "/v1/completions", {"prompt": "x", "response_format": {"type": kind, "value": value}}, key)

    def silent(_: int) -> None:
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        time.sleep(0.5)
        for sock in socks:
            sock.close()

    return [
        lambda turn: post(port, "/v1/completions", greedy, key),
        format_of,
        lambda turn: post(port, *FAULTS[turn % len(FAULTS)], key),
        lambda turn: half_sent(port, key, b" " * 100_000, 200_000, 0.5),
        lambda turn: half_sent(port, key, text, len(text), 0.5),
        silent,
    ]


def attack(port: int, key: str, first: int) -> None:
    """Attacks until it is ended, from kind `first` on, ten rounds of each."""
    rounds = kinds(port, key)
    for turn in itertools.count():
        try:
            rounds[(first + turn // 10) % len(rounds)](turn)
        except OSError:  # refused, or dropped
            time.sleep(0.05)


def polite(port: int, key: str) -> None:
    """Streams one answer after another until it is ended."""
    while True:
        stream(port, key, 60)


def stream(port: int, key: str, new: int) -> list[float]:
    """Seconds between the tokens of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {"prompt": "The sea is", "max_tokens": new, "ignore_eos": True, "stream": True}
    head = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), head)
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"the well-behaved client was answered {answer.status}: {answer.read()[:300]!r}")
    times = [time.perf_counter() for line in answer if line.startswith(b"data: {")]
    connection.close()
    return [b - a for a, b in itertools.pairwise(times)]


@contextmanager
def others(kind: str, port: int, keys: list[str]) -> Iterator[None]:
    """The other keys' processes."""
    with ExitStack() as stack:
        for i, key in enumerate(keys if kind != "alone" else []):
            command = [sys.executable, __file__, "--as", kind, str(port), key, str(i)]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
        time.sleep(2.0 if kind != "alone" else 0.0)  # until they are at work
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--as", dest="role", nargs=4, default=None, help=argparse.SUPPRESS)
    args, extra = parser.parse_known_args()
    if args.role:
        kind, port, key, number = args.role
        with suppress(OSError, AttributeError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        polite(int(port), key) if kind == "fair" else attack(int(port), key, int(number))
    names = [f"key-{i}-of-others" for i in range(OTHERS)]
    found: dict[str, list[float]] = {"alone": [], "fair": [], "attacked": []}
    with tempfile.NamedTemporaryFile("w") as keys:
        keys.write("".join(f"{key}\n" for key in (GOOD, *names)))
        keys.flush()
        with ours(args.model or default_model(), ["--api-key-file", keys.name, *extra]) as (port, _):
            stream(port, GOOD, 20)
            for _ in range(args.rounds):
                for kind, gaps in found.items():
                    with others(kind, port, names):
                        end = time.monotonic() + args.seconds
                        while time.monotonic() < end:
                            gaps += stream(port, GOOD, 60)
    print("| the others | tokens | between tokens ms p50 | p95 | p99 |\n|---|---|---|---|---|")
    told = {kind: quantiles(gaps) for kind, gaps in found.items()}
    for kind, cuts in told.items():
        print(f"| {kind} | {len(found[kind])} | {' | '.join(f'{cut * 1000:.1f}' for cut in cuts)} |")
    ratio = told["attacked"][2] / told["fair"][2]
    print(f"p99 attacked over fair: {ratio:.2f}")
    print(json.dumps({"p50_p95_p99_s": told, "attacked_over_fair": ratio}))


if __name__ == "__main__":
    main()
