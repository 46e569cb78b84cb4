"""The machine and its limits: its processor, its limits, who else is busy, the energy it counts.

No torch. What a machine does not tell is None, never a guess.
"""

import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama2.compiled import available, default_threads, native
from llama2.memory import total_bytes

BUSY = 0.1  # share of the processors that others take, above which figures are not to be trusted
READ_BYTES = 256 << 20  # well beyond any cache
POWERCAP = Path("/sys/class/powercap")

# Arithmetic of a product's inner loop, as csrc counts it: packed blocks in bytes, bfloat16 pairs, float32.
INT8, BFLOAT16, FLOAT32 = 0, 1, 2


def describe() -> dict[str, Any]:
    """The processor, how many threads run by default, the memory in bytes, the system."""
    return {
        "processor": processor(),
        "threads": default_threads(),
        "memory_bytes": total_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Limits(NamedTuple):
    """Bytes per second of a plain read, and operations per second of register-only loops by kind."""

    read: float
    operations: tuple[float, float, float]


def limits(pool: Any, rounds: int = 3) -> Limits | None:
    """The best of some rounds of each loop of csrc/probes.inl on `pool`; None without the compiled module.

    A product is a multiplication and an addition, and counts as two operations.
    """
    if not available():
        return None
    import numpy as np  # --help of the commands that measure stays without it

    n, buffer = native(), np.ones(READ_BYTES, np.uint8)
    read = max(n.read_bandwidth(pool, "auto", buffer) for _ in range(rounds))
    operations = [max(n.peak(pool, "auto", kind, 2_000_000) for _ in range(rounds)) for kind in range(3)]
    return Limits(read, (operations[0], operations[1], operations[2]))


class Load:
    """How much of the processors others take: measured from its making, or the last `taken`, on.

    Linux only: `taken` gives None where /proc/stat is not there.
    """

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._before = self._now()

    def taken(self) -> float | None:
        """The share of this process's processors that was neither idle nor its own since the last call."""
        before, self._before = self._before, self._now()
        if before is None or self._before is None:
            return None
        total, busy, own = (new - old for new, old in zip(self._before, before, strict=True))
        return None if total <= 0 else min(max((busy - own) / total, 0.0), 1.0)

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds of the processors so far, those not idle, and those of this process and its children."""
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        try:
            lines = self._stat.read_text().splitlines()
        except OSError:
            return None
        total = busy = 0.0
        for line in lines:
            name, *fields = line.split()
            if not name.startswith("cpu") or not name[3:].isdigit() or (allowed and int(name[3:]) not in allowed):
                continue
            ticks = [float(field) for field in fields[:8]]  # user nice system idle iowait irq softirq steal
            total += sum(ticks)
            busy += sum(ticks) - ticks[3] - ticks[4]
        times = os.times()
        hertz = os.sysconf("SC_CLK_TCK")
        return total / hertz, busy / hertz, sum(times[:4])


def busy_now(seconds: float = 0.5) -> float | None:
    """The share of the processors that others take at this moment."""
    load = Load()
    time.sleep(seconds)
    return load.taken()


class Energy:
    """Joules that the processor's packages count (RAPL, of Intel and AMD), from its making on."""

    def __init__(self, root: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package, intel-rapl:0:0 a part of it; AMD's stand under the same name.
        self._zones = sorted(zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self._before = self._read()

    @property
    def measurable(self) -> bool:
        """Whether this machine counts energy, and lets this user read it."""
        return self._before is not None

    def used(self) -> float | None:
        """Joules since the last call; None where the machine does not tell."""
        before, self._before = self._before, self._read()
        if before is None or self._before is None:
            return None
        return sum((new - old) % wrap for (new, wrap), (old, _) in zip(self._before, before, strict=True)) / 1e6

    def _read(self) -> Sequence[tuple[int, int]] | None:
        """Microjoules of each package and where its counter begins again."""
        try:
            found = [
                (int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text()) + 1)
                for zone in self._zones
            ]
        except (OSError, ValueError):  # newer systems let only root read it, since it leaks what others compute
            return None
        return found or None


def peak_memory() -> int | None:
    """Bytes of memory that this process has held at most, files that it maps included."""
    try:
        import resource
    except ImportError:
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
