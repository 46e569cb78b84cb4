"""Timed units of the native engine with what makes them comparable: a label, and a plain read around each.

A machine may move its processors between chiplets, which halves or doubles the bandwidth: a cache-line ping-pong before
and after a unit labels it "same" (both under 200 ns), "cross" (both over 250 ns) or "mixed".
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama2.compiled import native

BUFFER_BYTES = 512 << 20


@dataclass(frozen=True)
class Unit:
    """One timed call: seconds, its label, and the faster of the two plain reads around it in bytes per second."""

    seconds: float
    label: str
    read: float


class Regime:
    """Times calls that run on `pool`, each between two ping-pongs and two reads of `buffer_bytes`."""

    def __init__(self, pool: Any, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.pool, self.buffer = pool, np.ones(buffer_bytes, np.uint8)

    def time(self, work: Callable[[], Any]) -> Unit:
        n = native()
        before = n.ping_pong(self.pool, 300) * 1e9
        read = n.read_bandwidth(self.pool, "auto", self.buffer)
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        read = max(read, n.read_bandwidth(self.pool, "auto", self.buffer))
        after = n.ping_pong(self.pool, 300) * 1e9
        label = "same" if max(before, after) < 200 else "cross" if min(before, after) > 250 else "mixed"
        return Unit(seconds, label, read)
