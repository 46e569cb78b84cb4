"""The compiled module and the threads it may use."""

import ctypes
import importlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from llama2.errors import InputError, MissingDependencyError

_REMEDY = (
    "the native CPU engine is not built: install a C++17 compiler (apt install g++, or clang) and run "
    "`pip install --force-reinstall --no-deps llama2`, or stay with the torch path (runner='torch')"
)


@cache
def native() -> Any:
    """The compiled module. Raises MissingDependencyError where the install had no compiler, and InputError where
    LLAMA2_ISA names an instruction set that is not here."""
    try:
        module = importlib.import_module("llama2._native")
    except ImportError as error:
        raise MissingDependencyError(f"{_REMEDY} ({error})") from error
    try:
        module.available_isas()
    except ValueError as error:
        raise InputError(str(error)) from error
    return module


def available() -> bool:
    """Whether the compiled module is here."""
    try:
        native()
    except MissingDependencyError:
        return False
    return True


@cache
def kernels() -> Any:
    """The compiled module, or None where the install had no compiler."""
    return native() if available() else None


def instruction_sets() -> list[str]:
    """Kernel builds that this process may run, best first, "scalar" last: those of this build and this machine, from
    the one that the environment variable LLAMA2_ISA names on (auto: all)."""
    return list(native().available_isas())


def left_out() -> list[str]:
    """Instruction sets that this processor runs and that the build leaves out (LLAMA2_ISAS in CMakeLists.txt)."""
    return list(native().left_out_isas())


def processor_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Processors that the control group grants, or infinity."""
    try:
        limit, period = (root / "cpu.max").read_text().split()[:2]
        if limit != "max":
            return int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        if limit_us > 0 and period_us > 0:
            return limit_us / period_us
    except (OSError, ValueError):
        pass
    return float("inf")


def _processors() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class OneOpenMpThread:
    """A scope in which the calling thread's OpenMP, torch's, starts no team; without one in this process, nothing.

    A team waits for work by spinning. Two teams on the same processors, ours and OpenMP's, take them from each other:
    an operation of 50 us on 49,152 logits then costs milliseconds. Not torch.set_num_threads: that also counts for
    threads that use torch for the first time while it holds.
    """

    def __enter__(self) -> None:
        get, put = _openmp()
        self._before = get() if get else 1
        if self._before > 1:
            put(1)

    def __exit__(self, *error: object) -> None:
        if self._before > 1:
            _openmp()[1](self._before)


@cache
def _openmp() -> tuple[Any, Any]:
    """OpenMP's own omp_get_max_threads and omp_set_num_threads, found where torch has loaded them for all."""
    try:
        loaded = ctypes.PyDLL(None)
        return loaded.omp_get_max_threads, loaded.omp_set_num_threads
    except (AttributeError, OSError, TypeError):  # no such functions; Windows has no library of everything
        return None, None


def default_threads() -> int:
    """One thread per processor that the affinity mask and the control group's quota allow."""
    return max(1, int(min(len(_processors()), processor_quota())))


def make_pool(threads: int | None) -> Any:
    """A pool of `threads` (None: default_threads()), pinned in processor order where there are as many processors."""
    count = default_threads() if threads is None else threads
    if not 1 <= count <= 1024:
        raise InputError(f"threads is {count}; give 1 to 1024, or None for one per processor")
    processors = _processors()
    return _pool(count, tuple(processors[:count]) if count <= len(processors) and count <= processor_quota() else ())


@cache
def _pool(count: int, processors: tuple[int, ...]) -> Any:
    """One pool for all models: two would fight for the same processors."""
    return native().Pool(count, list(processors))


@cache
def pool() -> Any:
    """The pool for what runs on torch's own threads where it can, and on these where torch has no OpenMP."""
    return make_pool(None)
