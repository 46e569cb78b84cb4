"""`llama2 serve` in several processes: who starts them, and what those that do not serve do.

With --tensor-parallel N the command starts N - 1 more processes of itself, on one machine. Under torchrun, which may
span machines, the processes are there already. The first one serves in either case.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llama2.cli import terminal
from llama2.cli.loading import RunOptions, load_tokenizer, local_model
from llama2.errors import InputError, Llama2Error

STORE = "LLAMA2_PARALLEL_STORE"  # a file through which the processes of one machine find each other


@dataclass(frozen=True)
class RankOptions:
    """Which process of how many this is, and how they find each other (None: as torchrun says)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    store: str | None = None


def ranks(count: int | None, environment: Mapping[str, str]) -> RankOptions | None:
    """The processes there are, or are to be; None for a server of one. Raises InputError where both differ."""
    if count is not None and count < 0:
        raise InputError(f"--tensor-parallel is {count}; give the number of processes, 1 for one")
    count = count or None  # SageMaker says SM_NUM_GPUS=0 where there is no GPU
    if "WORLD_SIZE" not in environment:
        return RankOptions(0, count, 0, count) if count is not None and count > 1 else None
    size, rank = int(environment["WORLD_SIZE"]), int(environment.get("RANK", "0"))
    if count not in (None, size):
        raise InputError(f"--tensor-parallel is {count} but {size} processes were started; leave it out")
    local = int(environment.get("LOCAL_RANK", rank)), int(environment.get("LOCAL_WORLD_SIZE", size))
    return RankOptions(rank, size, *local, environment.get(STORE)) if size > 1 else None


def check(options: Any) -> None:
    """Raises InputError for what a model in several processes cannot do."""
    refused = {
        "--runner native": options.runner == "native",
        "--adapter": options.adapter is not None,
        "--lora-adapters": bool(options.lora_adapters),
        "--draft": options.draft is not None,
        "--kv-cache": options.cache_dtype is not None,
        "--attn-implementation": options.attn_implementation is not None,
    }
    if given := [name for name, on in refused.items() if on]:
        raise InputError(f"{given[0]} and a model over several processes exclude each other; drop one of them")


class Others:
    """The other processes on this machine, started by the first."""

    def __init__(self, ranks: RankOptions, failed: Callable[[Llama2Error], None]) -> None:
        """failed: called, in a thread, once a process has ended before `close`."""
        self._folder = tempfile.TemporaryDirectory(prefix="llama2-")
        self.store, self._failed, self._closing = f"file://{self._folder.name}/store", failed, False
        known = {"WORLD_SIZE": str(ranks.size), "LOCAL_WORLD_SIZE": str(ranks.size), STORE: self.store}
        words = [sys.executable, "-m", "llama2", *sys.argv[1:]]
        self._processes = [
            subprocess.Popen(words, env={**os.environ, **known, "RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(1, ranks.size)
        ]
        for i, process in enumerate(self._processes, 1):
            threading.Thread(target=self._watch, args=(i, process), daemon=True).start()

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        code = process.wait()
        if not self._closing:
            self._failed(Llama2Error(f"process {rank} of the model has ended with {code}, so none can go on"))

    def close(self) -> None:
        """Waits for their end; where the first one failed they wait for ever, and are ended."""
        self._closing = True
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()


def load_part(options: RunOptions, ranks: RankOptions) -> tuple[Any, Any]:
    """This process's part of the model and the tokenizer, once all processes are there."""
    import torch

    from llama2 import cpu
    from llama2.checkpoint.arguments import resolve_device
    from llama2.engine import parallel

    path = local_model(options.model, options.revision)
    tokenizer = load_tokenizer(path)
    device = resolve_device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", ranks.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, cpu.default_threads() // ranks.local_size))
    place = parallel.join(device, ranks.store, ranks.rank, ranks.size)
    dtype = None if options.dtype == "auto" else options.dtype
    neighbours = ranks.local_size if device.type == "cpu" else 1
    return parallel.load_part(path, place, dtype, device, neighbours), tokenizer


def follow(options: RunOptions, ranks: RankOptions) -> int:
    """Runs a process that does not serve: its part of every step, until the first process ends."""
    from llama2.engine import parallel

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # meant for all: the first one drains and then ends the others
    try:
        model, _ = load_part(options, ranks)
    except Llama2Error:
        return 2  # the first one fails on the same and says so
    try:
        parallel.follow(model)
    except RuntimeError as error:
        terminal.notice(f"llama2: process {ranks.rank} lost the first one: {str(error).splitlines()[0][:200]}")
        return 1
    return 0
