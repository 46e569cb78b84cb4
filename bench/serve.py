"""The server under load beside llama-cpp-python's server: the same GGUF file, the same requests, in turns in one run.

    python bench/serve.py [--clients 1 4 16 64] [--requests 2] [--rate 2.0 --seconds 20] [--temperature 0] [--only ours]

Closed loop: so many clients, each with one request after another. Open loop (--rate): requests arrive at random times
(Poisson) whether or not earlier ones are answered. Prompts are 20 to 800 tokens of made-up English, all different,
and 128 new tokens are streamed. Prints time to the first token, time between tokens, tokens per second and the server's
processor time per token, and at the end how much sooner the second request over a shared 700-token prompt starts.
Needs llama-cpp-python with its server's packages: fastapi, uvicorn, sse-starlette, starlette-context,
pydantic-settings. Both servers get all cores; so does this script.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decode import default_model

TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend "
)
WORDS = TEXT.split()
NEW = 128


@dataclass
class Seen:
    """What one request saw: seconds to the first token, between tokens, and how many tokens."""

    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: str = ""


def prompt(rng: random.Random, tokens: int) -> str:
    """About so many tokens: nearly every one of these words is one."""
    return "The " + " ".join(rng.choice(WORDS) for _ in range(tokens - 1))


async def ask(port: int, text: str, temperature: float, new: int = NEW) -> Seen:
    """One streamed completion."""
    seen, began, last = Seen(), time.perf_counter(), 0.0
    body = {"prompt": text, "max_tokens": new, "temperature": temperature, "stream": True, "top_p": 1.0, "seed": 1}
    body |= {"top_p": 0.95, "top_k": 40} if temperature else {}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            seen.failed = status.decode().strip()
            return seen
        while line := await reader.readline():
            if not line.startswith(b"data: ") or b'"text"' not in line:
                continue
            if json.loads(line[6:])["choices"][0]["text"]:
                now = time.perf_counter()
                if last:
                    seen.gaps.append(now - last)
                else:
                    seen.first = now - began
                last, seen.tokens = now, seen.tokens + 1
    finally:
        writer.close()
    return seen


async def closed(port: int, clients: int, requests: int, temperature: float, seed: int) -> tuple[list[Seen], float]:
    """Every client's requests, and the seconds for all."""
    rng = random.Random(seed)
    texts = [[prompt(rng, rng.randint(20, 800)) for _ in range(requests)] for _ in range(clients)]

    async def client(mine: list[str]) -> list[Seen]:
        return [await ask(port, text, temperature) for text in mine]

    began = time.perf_counter()
    found = await asyncio.gather(*map(client, texts))
    return [seen for each in found for seen in each], time.perf_counter() - began


async def opened(port: int, rate: float, seconds: float, temperature: float, seed: int) -> tuple[list[Seen], float]:
    """Requests that arrive by themselves."""
    rng, tasks, began = random.Random(seed), [], time.perf_counter()
    at = rng.expovariate(rate)
    while at < seconds:
        await asyncio.sleep(max(began + at - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(ask(port, prompt(rng, rng.randint(20, 800)), temperature)))
        at += rng.expovariate(rate)
    found = await asyncio.gather(*tasks)
    return list(found), time.perf_counter() - began


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(argv: list[str], port: int, path: str) -> Iterator[tuple[int, int]]:
    """A server in a process of its own, ready: its port and process."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"{argv} ended with {process.returncode}") from None
                time.sleep(0.1)
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def ours(model: Path, extra: list[str]) -> Any:
    port = free_port()
    code = "import sys; from llama2.cli import main; sys.exit(main(sys.argv[1:]))"
    return running([sys.executable, "-c", code, "serve", str(model), "--port", str(port), *extra], port, "/ready")


def theirs(model: Path) -> Any:
    port = free_port()
    cores = str(len(os.sched_getaffinity(0)))
    argv = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port), "--n_ctx", "2048"]
    argv += ["--n_threads", cores, "--n_threads_batch", cores, "--interrupt_requests", "false", "--verbose", "false"]
    return running(argv, port, "/v1/models")


def quantiles(values: list[float]) -> str:
    """p50, p95 and p99 in milliseconds."""
    if len(values) < 2:
        values = values * 2 or [0.0, 0.0]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return " / ".join(f"{cuts[i - 1] * 1000:.0f}" for i in (50, 95, 99))


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, in all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row(name: str, load: str, seen: list[Seen], seconds: float, cpu: float) -> dict[str, Any]:
    """Prints one line of the table."""
    good = [s for s in seen if s.tokens]
    rate = sum(s.tokens for s in good) / seconds
    gaps = [gap for s in good for gap in s.gaps]
    firsts = [s.first for s in good]
    tokens, times = sum(s.tokens for s in good), f"{quantiles(firsts)} | {quantiles(gaps)}"
    each = cpu / max(tokens, 1) * 1000
    print(f"| {load} | {name} | {len(good)}/{len(seen)} | {times} | {rate:.0f} | {each:.1f} |", flush=True)
    p95 = statistics.quantiles(firsts * 2, n=20, method="inclusive")[-1] if firsts else None
    return {
        "server": name,
        "load": load,
        "tokens_per_s": rate,
        "first_p95_s": p95,
        "cpu_ms_per_token": each,
        "failed": len(seen) - len(good),
    }


def prefix(port: int) -> dict[str, float]:
    """Times to the first token of two requests that share 700 tokens, medians of five."""
    firsts, seconds = [], []
    for i in range(5):
        shared = prompt(random.Random(100 + i), 700)
        firsts.append(asyncio.run(ask(port, shared + " one", 0.0, 4)).first)
        seconds.append(asyncio.run(ask(port, shared + " other", 0.0, 4)).first)
    first, second = statistics.median(firsts), statistics.median(seconds)
    print(
        f"\nshared prompt of 700 tokens: first {first * 1000:.0f} ms, second {second * 1000:.1f} ms, "
        f"{first / second:.1f} x"
    )
    return {"prefix_first_s": first, "prefix_second_s": second, "prefix_ratio": first / second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=2, help="of each client, one after another")
    parser.add_argument("--rate", type=float, default=None, help="requests a second, open loop")
    parser.add_argument("--seconds", type=float, default=20, help="of arrivals, open loop")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; else top-p 0.95 and top-k 40 too")
    parser.add_argument("--only", choices=["ours", "theirs"], default=None)
    parser.add_argument("--no-prefix", action="store_true", help="leave the prefix measurement out")
    args, extra = parser.parse_known_args()
    model = args.model or default_model()
    print(
        "| load | server | answered | first token ms p50/p95/p99 | between tokens ms p50/p95/p99 | tokens/s "
        "| CPU ms/token |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    results: list[dict[str, Any]] = []
    loads: list[tuple[str, Callable[[int, int], Awaitable[Any]]]] = [
        (f"{n} clients", lambda p, s, n=n: closed(p, n, args.requests, args.temperature, s)) for n in args.clients
    ]
    if args.rate:
        loads.append((f"{args.rate:g}/s", lambda p, s: opened(p, args.rate, args.seconds, args.temperature, s)))
    kinds = {"ours": lambda: ours(model, extra), "theirs": lambda: theirs(model)}
    found: dict[str, Any] = {}
    for name, start in kinds.items():
        if args.only in (None, name):
            with start() as (port, pid):
                asyncio.run(ask(port, "warm up", args.temperature, 8))
                for i, (load, run) in enumerate(loads):
                    before = cpu_seconds(pid)
                    seen, seconds = asyncio.run(run(port, i))
                    cpu = cpu_seconds(pid) - before
                    results.append(row("llama2" if name == "ours" else "llama-cpp-python", load, seen, seconds, cpu))
                if name == "ours" and not args.no_prefix:
                    found = prefix(port)
    for load, _ in loads:
        pair = {r["server"]: r for r in results if r["load"] == load}
        if len(pair) == 2:
            ratio = pair["llama2"]["tokens_per_s"] / pair["llama-cpp-python"]["tokens_per_s"]
            print(f"{load}: {ratio:.2f} x the tokens per second")
            found[f"ratio {load}"] = ratio
    print(json.dumps({"results": results, **found}))


if __name__ == "__main__":
    main()
