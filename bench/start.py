"""Process start to first token on one big GGUF file: llama2 beside llama.cpp, with and without packed weights kept.

    python bench/start.py --model llama-2-7b.Q4_0.gguf [--runs 5] [--folder TMP] [--no-packed]

Every run is a fresh process of 2 threads; the clock runs from its start until it prints the first token of one prompt,
tokenised by the program itself. Runs are interleaved; files are cached, the first round is not counted. "packed file"
is a start that finds what `llama2 pack` wrote (as large as the weights, in --folder, deleted at the end); "first start"
has none and packs first, "as it goes" while it runs. On a virtual machine the host may hand out memory slowly, which
is then most of llama.cpp's time: look at the ranges. "command" is `llama2 generate`; llama.cpp's own is timed
where `llama-cli` is on the PATH. What the project aims at stands beside what was found. The last line is JSON.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from demo import default_model

from llama2.checkpoint.gguf import GgufFile
from llama2.cpu import write_packed

PROMPT = "The capital of France is"

REPORT = """
fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(token, *(int(fields[name].split()[0]) for name in ("VmHWM", "RssAnon", "RssFile")), flush=True)
"""
OURS = """
from llama2 import Llama
model = Llama({path!r}, threads={threads}, context=256)
token = model.generate({prompt!r}, max_new_tokens=1, temperature=0).tokens[0]
"""
THEIRS = """
from llama_cpp import Llama
model = Llama({path!r}, n_threads={threads}, n_threads_batch={threads}, verbose=False)
token = next(model.generate(model.tokenize({prompt!r}.encode()), temp=0.0))
"""


# Seconds or megabytes that are aimed at, of the small default model.
TARGETS = {"import llama2": 0.05, "llama2 --help": 0.06, "command": 0.35, "memory beyond weights and cache": 60.0,
           "installed": 100.0}  # fmt: skip
PARTS = {
    "import llama2": (sys.executable, "-c", "import llama2"),
    "llama2 --help": (sys.executable, "-m", "llama2", "--help"),
}


def command(words: Sequence[str]) -> float:
    """Seconds from starting a command to its first byte of output, or its end."""
    start = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        return time.perf_counter() - start


def installed_megabytes() -> float:
    """What the base install takes: this library and what its metadata asks for without an extra."""
    seen, waiting, total = set[str](), ["llama2"], 0
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        total += sum(size for file in found.files or () if (size := _size(file)) is not None)
        waiting += [re.split(r"[ ;<>=!~\\[]", line)[0] for line in found.requires or () if "extra ==" not in line]
    return total / 1e6


def _size(file: Any) -> int | None:
    place = Path(file.locate())
    return place.stat().st_size if place.is_file() else None


def first_token(code: str) -> tuple[float, list[int]]:
    """Seconds from starting Python to its first line; on that line the token, then peak, anonymous and file kB."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code + REPORT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - start
        if not line.strip():
            raise SystemExit(f"the process printed no token:\n{child.stderr.read()}")
    return seconds, [int(word) for word in line.split()]


def measure(model: Path, folder: Path, runs: int, threads: int, packed: bool) -> None:
    """All runs and the report. Links to `model` in `folder` stand for a file with and without packed weights."""
    links = {
        "first start": folder / "plain.gguf",
        "packed file": folder / "kept.gguf",
    }
    for link in set(links.values()):
        link.symlink_to(model.resolve())
    if packed:
        began = time.perf_counter()
        kept = write_packed(GgufFile(links["packed file"]), threads=threads)
        print(f"packed in {time.perf_counter() - began:.1f} s: {kept.stat().st_size / 1e9:.2f} GB")
    else:
        del links["packed file"]
    settings = {"threads": threads, "prompt": PROMPT}
    programs = {name: OURS.format(path=str(link), **settings) for name, link in links.items()}
    programs["llama.cpp"] = THEIRS.format(path=str(model), **settings)
    commands = dict(PARTS)
    ours = (sys.executable, "-m", "llama2", "generate", "-m", str(links["first start"]))
    commands["command"] = (*ours, "--max-new-tokens", "1", PROMPT)
    if (cli := shutil.which("llama-cli")) is not None:
        commands["llama-cli"] = (cli, "-m", str(model), "-p", PROMPT, "-n", "1", "-no-cnv", "-t", str(threads))
    seconds: dict[str, list[float]] = {name: [] for name in (*programs, *commands)}
    said: dict[str, list[int]] = {}
    for round_ in range(runs + 1):
        for name, code in programs.items():
            took, said[name] = first_token(code)
            if round_ > 0:
                seconds[name].append(took)
        for name, words in commands.items():
            took = command(words)
            if round_ > 0:
                seconds[name].append(took)
    targets(model, {name: seconds.pop(name) for name in commands}, said["first start"][1] / 1e3)
    report(model, seconds, said)


def targets(model: Path, seconds: dict[str, list[float]], peak: float) -> None:
    """What was found beside what is aimed at. peak: megabytes of the process that packs its weights as it starts."""
    for name, times in seconds.items():
        aim = f"; wanted {TARGETS[name]:.2f}" if name in TARGETS else ""
        print(f"  {name:15} {statistics.median(times):6.3f} s ({min(times):.3f} to {max(times):.3f}){aim}")
    file = GgufFile(model)
    held = file.nbytes / 1e6 + 256 * file.config.kv_bytes_per_token() / 1e6
    name = "memory beyond weights and cache"
    print(f"  {name} {peak - held:.0f} MB; wanted {TARGETS[name]:.0f}")
    print(
        f"  installed {installed_megabytes():.0f} MB with all that the base asks for; wanted {TARGETS['installed']:.0f}"
    )


def report(model: Path, seconds: dict[str, list[float]], said: dict[str, list[int]]) -> None:
    """Medians, ratios to llama.cpp and memory."""
    print(f"process start to first token, {model.name}, {model.stat().st_size / 1e9:.2f} GB")
    result: dict[str, float] = {}
    for name, times in seconds.items():
        token, peak, anonymous, mapped = said[name]
        ratio = statistics.median(a / b for a, b in zip(times, seconds["llama.cpp"], strict=True))
        print(
            f"  {name:12} {statistics.median(times):6.2f} s ({min(times):.2f} to {max(times):.2f}), ratio {ratio:.2f}; "
            f"peak {peak / 1e3:.0f} MB, of it now anonymous {anonymous / 1e3:.0f}, "
            f"files {mapped / 1e3:.0f}; token {token}"
        )
        key = name.replace(" ", "_").replace(".", "_")
        result |= {f"{key}_s": round(statistics.median(times), 3), f"{key}_ratio": round(ratio, 3)}
        result[f"{key}_peak_mb"] = round(peak / 1e3)
    print(json.dumps({"bench": "start", **result}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where the packed weights go, with room for them")
    parser.add_argument("--no-packed", action="store_true", help="first start and llama.cpp only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args.model or default_model(), Path(folder), args.runs, args.threads, not args.no_packed)


if __name__ == "__main__":
    main()
