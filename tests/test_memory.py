"""Memory as control groups of both versions grant it, over trees as the kernel lays them out."""

from pathlib import Path

import pytest

from llama2.memory import available_bytes, total_bytes

GIB = 1 << 30
MEMINFO = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in ({"proc/meminfo": MEMINFO} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


GROUP = "sys/fs/cgroup/user/app"


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 16, 8),
        ({"proc/self/cgroup": "0::/user/app\n", f"{GROUP}/memory.max": "max\n", f"{GROUP}/memory.current": "5"}, 16, 8),
        ({"proc/self/cgroup": "0::/user/app\n", f"{GROUP}/memory.max": f"{4 * GIB}\n",
          f"{GROUP}/memory.current": f"{3 * GIB}"}, 4, 1),
        # what the page cache holds is given up first
        ({"proc/self/cgroup": "0::/user/app\n", f"{GROUP}/memory.max": f"{4 * GIB}\n",
          f"{GROUP}/memory.current": f"{3 * GIB}", f"{GROUP}/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n"}, 4, 3),
        # the limit is that of a group above
        ({"proc/self/cgroup": "0::/user/app\n", f"{GROUP}/memory.max": "max", f"{GROUP}/memory.current": "1",
          "sys/fs/cgroup/user/memory.max": f"{2 * GIB}", "sys/fs/cgroup/user/memory.current": f"{GIB}"}, 2, 1),
        # in a container: the host's path is not there
        ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/memory.max": f"{2 * GIB}",
          "sys/fs/cgroup/memory.current": f"{GIB}"}, 2, 1),
        # version 1
        ({"proc/self/cgroup": "5:cpu:/a\n4:memory:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{3 * GIB}",
          "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{GIB}",
          "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
          "sys/fs/cgroup/memory/memory.usage_in_bytes": "5"}, 3, 2),
        ({"proc/self/cgroup": "0::/user/app\n", f"{GROUP}/memory.max": f"{GIB}",
          f"{GROUP}/memory.current": f"{2 * GIB}"}, 1, 0),
    ],
)  # fmt: skip
def test_limits_and_what_is_left(tmp_path: Path, files: dict[str, str], total: int, available: int) -> None:
    root = tree(tmp_path, files)
    assert total_bytes(root) == total * GIB
    assert abs(available_bytes(root) - available * GIB) <= 1


def test_this_machine() -> None:
    assert 0 < available_bytes() <= total_bytes()
