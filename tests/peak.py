"""Memory of this process, on Linux: what it has, and the most that it had since `begin`."""

import sys
from pathlib import Path


def begin() -> int:
    """The peak begins anew; bytes that the process has."""
    if sys.platform != "linux":
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return _bytes("VmRSS")


def peak() -> int:
    """Bytes that the process had at most since `begin`."""
    return _bytes("VmHWM") if sys.platform == "linux" else 0


def _bytes(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{what}:"))
