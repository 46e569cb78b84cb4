"""kill -9 at random moments: each long command, in half of the rounds two at once, then the same command again.

    python tests/kills.py --kills 200 --seed 0 [convert quantize ...]

One process imports everything and forks for each run, so that a run costs what it does and not its imports. A round is
right when the command that follows it ends well, what it leaves is bit for bit what an undisturbed run leaves, nothing
is there twice, and no temporary file or lock is left. Seeds give the order of moments; where in the work a moment
falls depends on the machine, which is what is wanted of it.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMPORTS = (
    *(f"llama2.cli.{name}" for name in ("batch", "convert", "finetune", "merge_adapter", "pack", "quantize", "serve")),
    *("llama2.engine", "llama2.quantize.job", "llama2.serve.app", "llama2.serve.batch", "llama2.train.finetune"),
)

Bits = dict[str, Any]


@dataclass
class Count:
    """What came of the rounds of one command."""

    rounds: int = 0
    kills: int = 0
    ended_before: int = 0  # the moment came after the end
    refused: int = 0  # of two at once, one by the other's lock
    length: float = 0.0  # seconds of an undisturbed run
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """words(home) is the command line, bits(home) what it made that must not differ."""

    words: Callable[[Path], list[str]]
    bits: Callable[[Path], Bits]
    again: tuple[str, ...] = ()  # what is added to go on
    prepare: Callable[[Path], None] = lambda home: None


def files(home: Path, *patterns: str) -> Bits:
    """Files by name; the manifest and the times in reports aside."""
    found = {p.relative_to(home).as_posix(): p for pattern in patterns for p in home.rglob(pattern) if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "report" not in name and "SHA256" not in name}


def answers(home: Path) -> Bits:
    """Of a batch: ids in the file, and each one's text."""
    lines = [json.loads(line) for line in (home / "out.jsonl").read_text().splitlines()]
    texts = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}
    return {"lines": sorted(line["custom_id"] for line in lines), **texts}


def trained(home: Path) -> Bits:
    """Of a run: the adapter, the last checkpoint's weights and moments, and the steps that the log tells."""
    steps = [json.loads(line) for line in (home / "out" / "log.jsonl").read_text().splitlines()]
    last = home / "out" / "checkpoint-8"
    return {
        "steps": [entry["step"] for entry in steps if "loss" in entry],
        "losses": [entry["loss"] for entry in steps if "loss" in entry],
        "adapter": (home / "out" / "adapter_model.safetensors").read_bytes(),
        "moments": (last / "optimizer.safetensors").read_bytes(),
        "checkpoints": sorted(p.name for p in (home / "out").glob("checkpoint-*")),
    }


def commands(place: Path) -> dict[str, Command]:
    """The commands, on a tiny model in `place`."""
    model, adapter, rows, text = (str(place / name) for name in ("model", "adapter", "rows.jsonl", "text.txt"))
    sft = ["--max-steps", "8", "--save-steps", "2", "--batch-size", "2", "--lora-r", "2", "--logging-steps", "1",
           "--max-length", "32", "--quiet", "--device", "cpu"]  # fmt: skip
    gptq = ["--data", text, "--samples", "4", "--length", "32", "--eval-tokens", "0", "--group-size", "32", "--quiet"]
    quiet = ["--max-batch-total-tokens", "512", "--quiet"]
    return {
        "convert": Command(lambda h: ["convert", model, str(h / "out"), "--shard-size", "40KB", "--quiet"],
                           lambda h: files(h, "*")),
        "merge-adapter": Command(lambda h: ["merge-adapter", model, adapter, str(h / "out.gguf"), "--quiet"],
                                 lambda h: files(h, "*")),
        "quantize": Command(lambda h: ["quantize", model, str(h / "out"), *gptq], lambda h: files(h, "*")),
        "pack": Command(lambda h: ["pack", str(h / "m.gguf"), "--quiet"], lambda h: files(h, "*"),
                        prepare=lambda h: (shutil.copy2(place / "m.gguf", h), None)[1]),
        "batch": Command(lambda h: ["batch", "-m", model, str(place / "in.jsonl"), str(h / "out.jsonl"), *quiet],
                         answers),
        "finetune": Command(lambda h: ["finetune", "sft", model, rows, str(h / "out"), *sft], trained, ("--resume",)),
    }  # fmt: skip


def prepare(place: Path) -> None:
    """The model, its adapter, a GGUF file, rows and requests."""
    import torch
    from bytewise import write_tokenizer
    from tiny import random_adapter, tiny_model

    from llama2 import LoraConfig
    from llama2.checkpoint import convert, writer
    from llama2.checkpoint.peft import save_adapter
    from llama2.cli import main

    for name in IMPORTS:
        importlib.import_module(name)
    torch.set_num_threads(1)  # a thread of torch's would be lost in a fork
    convert.SYNC_BYTES, writer.BLOCK_BYTES = 1 << 14, 1 << 12
    sizes: dict[str, Any] = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "bos_token_id": None,
                             "eos_token_id": 0, "max_position_embeddings": 96}  # fmt: skip
    model = tiny_model(torch.float32, **sizes)
    model.save_pretrained(place / "model")
    write_tokenizer(place / "model")
    random_adapter(model, LoraConfig(r=2), 0)
    save_adapter(model, place / "adapter")
    lines = [{"prompt": f"word {i}", "max_tokens": 6, "temperature": 0} for i in range(8)]
    (place / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"prompt": f"what is {i}?", "completion": f"it is {i * i}"} for i in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "text.txt").write_text(" ".join(str(i * i) for i in range(300)))
    assert main(["convert", str(place / "model"), str(place / "m.gguf"), "--dtype", "q4_0", "--quiet"]) == 0


def start(words: list[str], log: Path) -> int:
    """A fork that runs the command line; its process number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from llama2.cli import main

        code = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def end(child: int) -> int:
    """How it ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def disturb(command: Command, home: Path, chance: random.Random, length: float, two: bool, count: Count) -> None:
    """Starts one or two at once and kills each at a moment of its own; of two one may be left to its end."""
    count.rounds += 1
    began = time.perf_counter()
    running = {start(command.words(home), home.parent / f"{home.name}.{i}.log"): i for i in range(1 + two)}
    moments = {child: chance.uniform(0, length * (1.5 if two else 1.05)) for child in running}
    if two and chance.random() < 0.5:
        moments.popitem()
    for child, moment in sorted(moments.items(), key=lambda entry: entry[1]):
        time.sleep(max(0.0, moment - (time.perf_counter() - began)))
        os.kill(child, signal.SIGKILL)
    for child, i in running.items():
        code = end(child)
        count.kills += code == -signal.SIGKILL
        count.ended_before += code == 0
        if code not in (0, 1, -signal.SIGKILL):
            said = (home.parent / f"{home.name}.{i}.log").read_text()
            count.refused += "is being written by" in said
            if code != 2 or not two:
                count.faults.append(f"{home}: code {code}: {said[-300:]}")


def check(command: Command, home: Path, wanted: Bits, count: Count) -> None:
    """The command again, to its end: the same bits, and nothing besides."""
    log = home.parent / f"{home.name}.again.log"
    code = end(start([*command.words(home), *command.again], log))
    said = log.read_text()
    if code != 0 and "exists and is not empty" not in said:
        count.faults.append(f"{home}: going on gave {code}: {said[-400:]}")
        return
    found = command.bits(home)
    if differ := [name for name in {*found, *wanted} if found.get(name) != wanted.get(name)]:
        count.faults.append(f"{home}: other bits in {', '.join(map(str, differ[:4]))}")
    elif left := [p.name for p in home.rglob(".*")]:
        count.faults.append(f"{home}: left {left}")
    else:
        shutil.rmtree(home)
        for log in home.parent.glob(f"{home.name}.*.log"):
            log.unlink()


def rounds(place: Path, name: str, kills: int, seed: int) -> Count:
    """Rounds of one command until `kills` processes were killed."""
    command, count = commands(place)[name], Count()
    calm = place / f"{name}.calm"
    length = 0.0
    for _ in range(2):  # the second is not the first to touch files and pages
        shutil.rmtree(calm, ignore_errors=True)
        calm.mkdir()
        command.prepare(calm)
        began = time.perf_counter()
        log = place / f"{name}.calm.log"
        code = end(start(command.words(calm), log))
        assert code == 0, (name, code, log.read_text()[-2000:])
        length = count.length = time.perf_counter() - began
    wanted = command.bits(calm)
    while count.kills < kills and count.rounds < 4 * kills and len(count.faults) < 10:
        chance = random.Random(f"{seed}/{name}/{count.rounds}")
        home = place / f"{name}.{count.rounds}"
        home.mkdir()
        command.prepare(home)
        disturb(command, home, chance, length, two=count.rounds % 2 == 1, count=count)
        check(command, home, wanted, count)
    return count


def run(names: list[str], kills: int, seed: int, place: Path) -> dict[str, Count]:
    """All of it; a line a command."""
    warnings.simplefilter("ignore")
    prepare(place)
    found = {}
    for name in names or list(commands(place)):
        began = time.perf_counter()
        count = found[name] = rounds(place, name, kills, seed)
        print(
            f"{name}: {count.kills} kills in {count.rounds} rounds, {count.refused} refused by a lock, "
            f"{count.ended_before} ended before, {len(count.faults)} faults, {time.perf_counter() - began:.0f} s "
            f"({count.length:.1f} s a calm run)",
            flush=True,
        )
        for fault in count.faults:
            print(f"  {fault}", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        failed = any(c.faults for c in run(given.names, given.kills, given.seed, Path(folder)).values())
    sys.exit(failed)
