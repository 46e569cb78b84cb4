"""The server under load beside llama-cpp-python's server: the same GGUF file, the same requests, in turns in one run.

    python bench/serve.py --rival-python .venv-llamacpp/bin/python      1, 4, 16 and 64 clients, then an open loop
    python bench/serve.py --clients 1 4 --new 32 --seconds 0            a short try
    python bench/serve.py --only ours --max-batch-size 32               what is not known here goes to our server

Closed loop: so many clients, each with one request after another, `--requests` in all at least. Open loop: requests
arrive at random times (Poisson, `--rate` a second) whether or not earlier ones are answered. Prompts are 20 to 800
tokens of made-up English, all different, and `--new` tokens are streamed. Both servers are up all the time; a load goes
to one and then, the same, to the other, `--rounds` times. Prints p50, p95 and p99 of the time to the first token and
between tokens, tokens per second and the server's processor time per token, and at the end how much sooner the second
request over a shared 700-token prompt starts. The last line is JSON.

The rival: `python -m venv .venv-llamacpp`, then in it `pip install 'llama-cpp-python[server]==0.3.36'` (compiles for
minutes). Both servers get all cores; so does this script.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo import default_model

TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend "
)
WORDS = TEXT.split()
NAMES = {"ours": "llama2", "theirs": "llama-cpp-python"}


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


@dataclass(frozen=True)
class Load:
    """So many clients with `requests` each, or with a rate requests that arrive for some seconds."""

    name: str
    temperature: float
    new: int
    clients: int = 0
    requests: int = 1
    rate: float = 0.0
    seconds: float = 0.0

    async def run(self, port: int, seed: int) -> tuple[list[Seen], float]:
        """What the requests saw, and the seconds for all. The same seed gives the same requests."""
        rng, began = random.Random(seed), time.perf_counter()
        tasks = []
        if self.clients:
            texts = [[prompt(rng, rng.randint(20, 800)) for _ in range(self.requests)] for _ in range(self.clients)]
            tasks = [asyncio.create_task(self.client(port, mine)) for mine in texts]
        at = rng.expovariate(self.rate) if self.rate else self.seconds
        while at < self.seconds:
            await asyncio.sleep(max(began + at - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(self.client(port, [prompt(rng, rng.randint(20, 800))])))
            at += rng.expovariate(self.rate)
        found = await asyncio.gather(*tasks)
        return [seen for each in found for seen in each], time.perf_counter() - began

    async def client(self, port: int, texts: list[str]) -> list[Seen]:
        """One client: one request after another."""
        return [await ask(port, text, self.temperature, self.new) for text in texts]


async def ask(port: int, text: str, temperature: float, new: int) -> Seen:
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


def theirs(model: Path, python: str) -> Any:
    port = free_port()
    cores = str(len(os.sched_getaffinity(0)))
    argv = [python, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port), "--n_ctx", "2048"]
    argv += ["--n_threads", cores, "--n_threads_batch", cores, "--interrupt_requests", "false", "--verbose", "false"]
    return running(argv, port, "/v1/models")


def quantiles(values: list[float]) -> list[float]:
    """p50, p95 and p99."""
    if len(values) < 2:
        values = values * 2 or [0.0, 0.0]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [round(cuts[i - 1], 5) for i in (50, 95, 99)]


def told(cuts: list[float]) -> str:
    """In milliseconds."""
    return " / ".join(f"{cut * 1000:.0f}" for cut in cuts)


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, in all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Result:
    """One server under one load, all rounds."""

    load: str
    server: str
    seen: list[Seen] = field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(s.tokens for s in self.seen) / self.seconds

    def row(self) -> str:
        """A line of the table."""
        good, tokens = [s for s in self.seen if s.tokens], sum(s.tokens for s in self.seen)
        firsts, gaps = quantiles([s.first for s in good]), quantiles([gap for s in good for gap in s.gaps])
        cells = [self.load, NAMES[self.server], f"{len(good)}/{len(self.seen)}", told(firsts), told(gaps)]
        return "| " + " | ".join([*cells, f"{self.rate:.1f}", f"{self.cpu / max(tokens, 1) * 1000:.1f}"]) + " |"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        good = [s for s in self.seen if s.tokens]
        return {
            "load": self.load,
            "server": NAMES[self.server],
            "tokens": sum(s.tokens for s in self.seen),
            "tokens_per_s": round(self.rate, 2),
            "first_s": quantiles([s.first for s in good]),
            "between_s": quantiles([gap for s in good for gap in s.gaps]),
            "cpu_s": round(self.cpu, 2),
            "failed": len(self.seen) - len(good),
        }


def prefix(port: int, server: str, times: int) -> dict[str, float]:
    """Times to the first token of two requests that share 700 tokens, medians."""
    firsts, seconds = [], []
    for i in range(times):
        shared = prompt(random.Random(100 + i), 700)
        firsts.append(asyncio.run(ask(port, shared + " one", 0.0, 4)).first)
        seconds.append(asyncio.run(ask(port, shared + " other", 0.0, 4)).first)
    first, second = statistics.median(firsts), statistics.median(seconds)
    print(
        f"shared prompt of 700 tokens, {NAMES[server]}: first {first * 1000:.0f} ms, second {second * 1000:.1f} ms, "
        f"{first / second:.1f} x"
    )
    return {"first_s": first, "second_s": second, "ratio": first / second}


def measure(ports: dict[str, tuple[int, int]], loads: list[Load], rounds: int) -> list[Result]:
    """Every load in turns; its lines are printed when its last round is over."""
    results = []
    for i, load in enumerate(loads):
        mine = {name: Result(load.name, name) for name in ports}
        for j in range(rounds):
            for name, (port, pid) in ports.items():
                before = cpu_seconds(pid)
                seen, seconds = asyncio.run(load.run(port, 1000 * j + i))
                mine[name].cpu += cpu_seconds(pid) - before
                mine[name].seconds += seconds
                mine[name].seen += seen
        for result in mine.values():
            print(result.row(), flush=True)
        results += mine.values()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--rival-python", default=sys.executable, help="the interpreter that has llama_cpp.server")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=8, help="of a closed loop in all, at least")
    parser.add_argument("--new", type=int, default=128, help="new tokens of a request")
    parser.add_argument("--rate", type=float, default=0.5, help="requests per second, open loop")
    parser.add_argument("--seconds", type=float, default=30, help="of arrivals, open loop; 0 leaves it out")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; else top-p 0.95 and top-k 40 too")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=["ours", "theirs"], default=None)
    parser.add_argument("--prefixes", type=int, default=5, help="shared prompts of the prefix measurement")
    args, extra = parser.parse_known_args()
    model = args.model or default_model()
    shared = {"temperature": args.temperature, "new": args.new}
    loads = [Load(f"{n} clients", **shared, clients=n, requests=-(-args.requests // n)) for n in args.clients]
    if args.rate and args.seconds:
        loads.append(Load(f"{args.rate:g}/s", **shared, rate=args.rate, seconds=args.seconds))
    starts = {"ours": lambda: ours(model, extra), "theirs": lambda: theirs(model, args.rival_python)}
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        ports = {n: stack.enter_context(start()) for n, start in starts.items() if args.only in (None, n)}
        for port, _ in ports.values():
            asyncio.run(ask(port, "warm up", args.temperature, 8))
        print(
            "| load | server | answered | first token ms p50/p95/p99 | between tokens ms p50/p95/p99 | tokens/s "
            "| CPU ms/token |\n| --- | --- | --- | --- | --- | --- | --- |"
        )
        results = measure(ports, loads, args.rounds)
        for name, (port, _) in ports.items():
            if args.prefixes:
                found[f"prefix {NAMES[name]}"] = prefix(port, name, args.prefixes)
    for load in loads:
        pair = {r.server: r for r in results if r.load == load.name}
        if len(pair) == 2:
            ratio = pair["ours"].rate / pair["theirs"].rate
            print(f"{load.name}: {ratio:.2f} x the tokens per second")
            found[f"ratio {load.name}"] = round(ratio, 3)
    print(json.dumps({"results": [r.record() for r in results], **found}))


if __name__ == "__main__":
    main()
