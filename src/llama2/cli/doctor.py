"""`llama2 doctor`: this machine and this installation on one screen, for a bug report."""

import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llama2
from llama2.cli.args import option
from llama2.cli.info import size

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "huggingface_hub", "fastapi", "uvicorn",
             "llguidance", "datasets", "transformers")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Report what this machine has (processor, instruction sets, memory and how fast it is read, threads, limits, GPU),
    what is installed, where files are kept, and what is wrong with it. Paste it into a bug report; it holds no keys."""

    json: bool = option(False, "one JSON object")
    no_measure: bool = option(False, "do not measure the memory's speed, which takes a second")


def run(options: DoctorOptions) -> int:
    """Runs the command: 0, or 1 where something is wrong."""
    problems: list[str] = []
    sections = {
        "software": _software(problems),
        "processor": _processor(problems),
        "memory": _memory(not options.no_measure, problems),
        "gpu": _gpu(),
        "files": _files(problems),
    }
    if options.json:
        print(json.dumps(sections | {"problems": problems}, indent=2))
        return 1 if problems else 0
    for title, rows in sections.items():
        print(title)
        print("\n".join(f"  {name:<18}{value}" for name, value in rows.items()))
    print("problems" if problems else "no problem was found")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _software(problems: list[str]) -> dict[str, str]:
    rows = {
        "llama2": f"{llama2.__version__}, {Path(llama2.__file__).parent}",
        "Python": f"{platform.python_version()}, {sys.executable}",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }
    libc, number = platform.libc_ver()
    if libc:
        rows["C library"] = f"{libc} {number}"
    rows["packages"] = ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)))
    missing = [name for name in _PACKAGES[1:6] if _version(name) is None]
    if missing:
        problems.append(f"{', '.join(missing)} not installed: run `pip install llama2` again")
    return rows


def _processor(problems: list[str]) -> dict[str, str]:
    from llama2 import compiled
    from llama2.evaluate.machine import processor

    rows = {"model": processor(), "threads": f"{compiled.default_threads()} used"}
    rows["threads"] += f", {os.cpu_count()} processors"
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
        if allowed != os.cpu_count():
            rows["threads"] += f", {allowed} allowed by the affinity mask"
    if (quota := compiled.processor_quota()) != float("inf"):
        rows["threads"] += f", {quota:g} granted by the control group"
    if hasattr(os, "getloadavg"):
        rows["load"] = f"{os.getloadavg()[0]:.1f} processes in the last minute"
    if not compiled.available():
        problems.append(
            "the native engine is not built: install a C++17 compiler, then llama2 again; until then models need torch"
        )
        return rows | {"native engine": "none"}
    sets = compiled.instruction_sets()
    asked = os.environ.get("LLAMA2_ISA")
    rows["native engine"] = sets[0] + (f" (also {', '.join(sets[1:])})" if sets[1:] else "")
    rows["native engine"] += f"; LLAMA2_ISA={asked}" if asked else ""
    if missing := compiled.left_out():
        rows["native engine"] += f"; this build leaves out {', '.join(missing)}"
    return rows


def _memory(measure: bool, problems: list[str]) -> dict[str, str]:
    from llama2 import compiled
    from llama2.evaluate.machine import READ_BYTES, limits
    from llama2.memory import available_bytes, total_bytes

    rows = {"in all": size(total_bytes()), "available": size(available_bytes())}
    if available_bytes() < 1 << 30:
        problems.append(f"only {size(available_bytes())} of memory are available")
    found = limits(compiled.make_pool(None)) if measure and compiled.available() else None
    if found is not None:
        threads = compiled.default_threads()
        rows["read"] = f"{found.read / 1e9:.1f} GB/s ({size(READ_BYTES)} on {threads} threads)"
    return rows


def _gpu() -> dict[str, str]:
    if _version("torch") is None:
        return {"torch": "not installed, so models run on the processor; `pip install 'llama2[torch]'` brings it"}
    import torch

    if not torch.cuda.is_available():
        return {"CUDA": f"no device for torch {torch.__version__}"}
    rows = {}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{card.name}, {size(card.total_memory)}, capability {card.major}.{card.minor}"
    return rows


def _files(problems: list[str]) -> dict[str, Any]:
    from huggingface_hub import constants

    from llama2.cli.names import names_path
    from llama2.cli.registry import folder
    from llama2.cli.settings import config_path

    cache = Path(constants.HF_HUB_CACHE)
    above = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(above).free
    rows = {
        "cache": f"{cache}, {size(free)} free" + ("" if cache.exists() else ", not there yet"),
        "settings": _there(config_path(os.environ)),
        "names": _there(names_path(os.environ)),
        "servers": _there(folder()),
    }
    if not os.access(above, os.W_OK):
        problems.append(f"{above} cannot be written: set HF_HOME to a folder of yours")
    if free < 5 << 30:
        problems.append(f"only {size(free)} are free for the cache at {above}")
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        if os.environ.get(name):
            rows[name] = os.environ[name]
    return rows


def _there(path: Path) -> str:
    return str(path) if path.exists() else f"{path}, not there"
