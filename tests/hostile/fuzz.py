"""Files changed at random, read in forks that have little memory and ten seconds for each: what was no library's error.

    python tests/hostile/fuzz.py --count 20000 --seed 0 --workers 2

Input i of a seed is always the same; a fault is printed with the line that repeats it (--first i --count 1).
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS, ADDRESS_SPACE = 10, 3 << 30  # of one input; addresses beyond what the process had before
RESIDENT, A_BYTE = 96 << 20, 32  # memory of one input: so much, and so many times the bytes of its folder
BATCH = 50  # inputs of one fork

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def seeds(home: Path, chosen: list[str] | None) -> dict[str, Path]:
    """An unchanged folder of each kind, made in a fork: what trains starts threads that a fork must not inherit."""
    from hostile.folders import KINDS, make

    child = os.fork()
    names = chosen or list(KINDS)
    if child == 0:
        for kind in names:
            make(kind, home / kind / kind)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return {kind: home / kind for kind in names}


def one(number: int, seed: int, kinds: dict[str, Path], work: Path) -> tuple[str, list[str], int]:
    """Input `number`: what was changed, faults, and the memory it took beyond what it may take."""
    import peak
    from hostile.folders import visit
    from hostile.mutate import mutate

    rng = random.Random(f"{seed}/{number}")
    kind = list(kinds)[number % len(kinds)]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(kinds[kind], work)
    folder = work / kind
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in ("SHA256SUMS", "log.jsonl")
    )
    file = rng.choice(files)
    what = f"{kind}/{file.relative_to(folder)} {mutate(file, rng)}"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    before = peak.begin()
    faults = ["".join(traceback.format_exception(e, limit=-4)) for e in visit(kind, folder).faults]
    return what, faults, peak.peak() - before - RESIDENT - A_BYTE * size


def child(numbers: range, seed: int, kinds: dict[str, Path], work: Path, out: int) -> None:
    """Runs inputs and tells of each, before and after."""
    import torch

    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + ADDRESS_SPACE,) * 2)
    for number in numbers:
        began = time.monotonic()
        os.write(out, f"{json.dumps({'begins': number})}\n".encode())
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time, which a busy machine does not change
        signal.alarm(6 * SECONDS)  # for what waits
        what, faults, over = one(number, seed, kinds, work)
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if over > 0:
            faults.append(f"memory: {over >> 20} MB above what the input may cost")
        told = {"ended": number, "what": what, "faults": faults, "seconds": time.monotonic() - began, "over": over}
        os.write(out, f"{json.dumps(told)}\n".encode())


def batch(numbers: range, seed: int, kinds: dict[str, Path], work: Path) -> Iterator[dict[str, Any]]:
    """What became of each input; a fork that ends early is a fault of the input that it was at."""
    while numbers:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            try:
                child(numbers, seed, kinds, work, writing)
            except BaseException:
                told = {"broken": traceback.format_exc()}
                os.write(writing, f"{json.dumps(told)}\n".encode())
            os._exit(0)
        os.close(writing)
        at, broken = None, ""
        with os.fdopen(reading) as lines:
            for line in lines:
                told = json.loads(line)
                at, broken = told.get("begins", at), told.get("broken", broken)
                if "ended" in told:
                    yield told
        ended = os.waitpid(process, 0)[1]
        last = numbers[-1] if at is None else at
        if ended or broken or at is None or at != numbers[-1]:
            name = signal.Signals(ended & 127).name if ended & 127 else "an exit"
            yield {"ended": last, "what": "?", "faults": [f"{broken}ended by {name}"], "seconds": SECONDS}
        numbers = range(last + 1, numbers.stop)


def go(
    count: int, seed: int, first: int = 0, worker: tuple[int, int] = (0, 1), chosen: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """All inputs of one worker of several."""
    import hostile.folders  # noqa: F401 - before the first fork

    with suppress(ImportError):
        import pyarrow.parquet  # noqa: F401 - its memory is no input's

    with tempfile.TemporaryDirectory() as name:
        kinds = seeds(Path(name) / "seeds", chosen)
        starts = range(first, first + count, BATCH)
        for start in starts[worker[0] :: worker[1]]:
            yield from batch(range(start, min(start + BATCH, first + count)), seed, kinds, Path(name) / "work")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("count", 200), ("seed", 0), ("first", 0), ("part", 0), ("parts", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", nargs="*", help="of folders, all by default; inputs differ with them")
    options = parser.parse_args()
    kinds: Counter[str] = Counter()
    done, slowest, most = 0, 0.0, -(1 << 60)
    for told in go(options.count, options.seed, options.first, (options.part, options.parts), options.kinds):
        done, slowest, most = done + 1, max(slowest, told["seconds"]), max(most, told.get("over", most))
        if done % 500 == 0:
            print(f"{done} inputs so far, {sum(kinds.values())} faults", flush=True)
        for fault in told["faults"]:
            lines = [line for line in fault.splitlines() if line.strip()]
            kinds[lines[-1][:90]] += 1
            if kinds[lines[-1][:90]] <= 20:
                print(
                    f"--seed {options.seed} --first {told['ended']} --count 1: {told['what']}\n{fault[:2500]}\n",
                    flush=True,
                )
    print(
        f"{done} inputs, slowest {slowest:.1f} s, {sum(kinds.values())} faults, "
        f"memory at the least {-most >> 20} MB below its bound"
    )
    for said, times in kinds.most_common():
        print(f"{times:6} {said}")


if __name__ == "__main__":
    main()
