"""Many short tensor operations on several Python threads, each of which computes on its own."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_single_threads(read: Callable[[Item], Result], names: Iterable[Item]) -> Iterator[Result]:
    """read(name) for each name, in order, on as many Python threads as torch has, each computing on its own.

    Dequantising a file is thousands of short operations. Spread over OpenMP threads each one waits for the slowest
    core; on a busy machine that made a load of 0.4 s take 2 to 30 s (docs/LOG.md).
    """
    count = torch.get_num_threads()
    if count == 1:
        yield from map(read, names)
        return
    barrier = threading.Barrier(count)

    def compute_alone(_: int) -> None:
        torch.get_num_threads()  # a thread takes over the process's number at its first call, so let that pass
        torch.set_num_threads(1)
        barrier.wait()

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(compute_alone, range(count)))
        torch.set_num_threads(count)  # for threads to come; the workers keep 1
        yield from pool.map(read, names)
