"""Before and after: perplexity and speed of a model on the engine that serves it, and this process's peak memory."""

import contextlib
import gc
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.auto import AutoModelForCausalLM
from llama2.checkpoint.source import open_source
from llama2.evaluate.perplexity import perplexity
from llama2.memory import available_bytes

WINDOW = 512
_SHARE_OF_FREE_MEMORY = 0.4
_NEW_TOKENS = 32


@dataclass(frozen=True)
class Measured:
    """perplexity of `tokens` predicted tokens, and decoded tokens per second."""

    perplexity: float
    tokens: int
    speed: float


def measure(path: Path | str, held_out: Tensor) -> Measured:
    """Loads the model and measures it on the token ids (T,), in windows of at most 512."""
    model = AutoModelForCausalLM.from_pretrained(path)
    window = min(WINDOW, len(held_out), model.config.max_position_embeddings)
    found = perplexity(model, held_out, window)
    speed = _speed(model, held_out)
    del model
    gc.collect()
    return Measured(found.value, found.tokens, speed)


def why_not(path: Path | str) -> str:
    """Why the source is not measured, or "": its weights would take too much of the memory."""
    needed = sum(_bytes(stored.type, stored.shape) for stored in open_source(path, {}).tensors.values())
    free = available_bytes()
    if needed > _SHARE_OF_FREE_MEMORY * free:
        return f"its weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
    return ""


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    count = torch.Size(shape).numel()
    return count * (4 if kind in ("F32", "F64") else 2)


def _speed(model: Any, held_out: Tensor) -> float:
    prompt = held_out[:8][None]
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False)
        best = min(best, time.perf_counter() - began)
    return _NEW_TOKENS / best


# -- memory ------------------------------------------------------------------------------------------------------


def reset_peak() -> None:
    """Lets the peak of this process's memory count from here on, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The largest resident memory of this process since `reset_peak`, or since its start."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
