"""This machine's memory, as the control group grants it. No torch here."""

import os
from pathlib import Path

_UNBOUNDED = 1 << 60  # what version 1 of control groups says for no limit is near 2^63


def total_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use in all: those of the machine, or the control group's limit."""
    limits = [limit for limit, _ in _groups(root)]
    return min([_machine(root)[0], *limits])


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that can still be taken without swapping, within the limits of all control groups above."""
    left = [limit - used for limit, used in _groups(root)]
    return max(0, min([_machine(root)[1], *left]))


def _machine(root: Path) -> tuple[int, int]:
    """Bytes of the machine: in all, and available."""
    try:
        rows = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        return tuple(int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total // 2  # macOS has no count of what is available


def _groups(root: Path) -> list[tuple[int, int]]:
    """(limit, used) of this process's control group and of those above it, where they bound the memory."""
    found = []
    for base, path, names in _places(root):
        folder = base / path.strip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            try:
                limit, used = ((place / name).read_text().strip() for name in names)
                if limit != "max" and int(limit) < _UNBOUNDED:
                    found.append((int(limit), _used(place, int(used))))
            except (OSError, ValueError):
                continue
    return found


def _used(group: Path, counted: int) -> int:
    """Returns the memory of a control group, without the page cache that the kernel reclaims first."""
    try:
        rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return counted - int(rows.get("inactive_file", rows.get("total_inactive_file", "0")))
    except (OSError, ValueError):
        return counted


def _places(root: Path) -> list[tuple[Path, str, tuple[str, str]]]:
    """Where the control groups are: (mount, this process's path in it, names of the limit and of what is used)."""
    second = ("memory.max", "memory.current")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    mount = root / "sys/fs/cgroup"
    try:
        rows = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        rows = []
    places = [(mount, path, second) for number, _, path in rows if number == "0"]
    places += [(mount / "memory", path, first) for _, kinds, path in rows if "memory" in kinds.split(",")]
    # In a container the path of the host is not there, and the mount itself is the group.
    return [*places, (mount, "", second), (mount / "memory", "", first)]
